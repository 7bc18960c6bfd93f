"""The gateway's routes: a file for each protocol, the questions of `Control` and the events, and metrics for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web

from coordinator.control import Control
from coordinator.gateway import metrics, openapi
from coordinator.gateway.asking import Asking
from coordinator.gateway.catalog import Catalog
from coordinator.gateway.events import FollowedEvents
from coordinator.gateway.open_inference import OpenInference
from coordinator.gateway.plain import Plain
from coordinator.gateway.questions import Questions
from coordinator.gateway.shelf import Shelf
from coordinator.gateway.tensorflow_serving import TensorFlowServing
from coordinator.membership import Membership
from coordinator.serving.inference import Inference
from coordinator.serving.serving import Serving
from potluck.bus.mqtt import Bus
from potluck.settings import CoordinatorSettings


def routes(
    control: Control,
    serving: Serving,
    inference: Inference,
    membership: Membership,
    settings: CoordinatorSettings,
    shelf: Shelf,
    bus: Bus | None = None,
    *,
    closed: bool = False,
    more_metrics: Callable[[], str] = lambda: "",
) -> list[web.RouteDef]:
    """Routes for the coordinator's HTTP application. Questions go to `control`, and requests for inference go to `inference`.
    Metrics are read where they are kept. While `bus` is not connected, nothing is ready. Without `bus`, that shows only once
    the nodes count as lost. `closed`: how a `Gate` that stands before them is described; they themselves refuse nobody.
    `more_metrics`: families of others for the page of metrics.
    """

    async def prometheus(request: web.Request) -> web.Response:
        text = metrics.exposition(serving, inference, membership) + more_metrics()
        return web.Response(text=text, headers={"Content-Type": metrics.CONTENT_TYPE})

    asking = Asking(Catalog(control), inference, serving.signature, settings, shelf)
    return [
        web.get("/metrics", prometheus),
        *OpenInference(asking, bus).routes(),
        *TensorFlowServing(asking).routes(),
        *Plain(asking).routes(),
        *Questions(control, asking).routes(),
        *FollowedEvents(control).routes(),
        openapi.route(openapi.description(closed=closed)),
    ]
