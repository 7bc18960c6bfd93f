"""The gateway's routes: a file for each protocol, and metrics for Prometheus."""

from __future__ import annotations

from aiohttp import web

from coordinator.gateway import metrics, openapi
from coordinator.gateway.asking import Asking
from coordinator.gateway.open_inference import OpenInference
from coordinator.gateway.plain import Plain
from coordinator.gateway.shelf import Shelf
from coordinator.gateway.tensorflow_serving import TensorFlowServing
from coordinator.membership import Membership
from coordinator.registry import Registry
from coordinator.serving.inference import Inference
from coordinator.serving.serving import Serving
from potluck.bus.mqtt import Bus
from potluck.settings import CoordinatorSettings


def routes(
    serving: Serving,
    inference: Inference,
    registry: Registry,
    membership: Membership,
    settings: CoordinatorSettings,
    shelf: Shelf,
    bus: Bus | None = None,
) -> list[web.RouteDef]:
    """Routes for the coordinator's HTTP application. While `bus` is not connected nothing is ready; without it that shows
    only once the nodes count as lost.
    """

    async def prometheus(request: web.Request) -> web.Response:
        text = metrics.exposition(serving, inference, membership)
        return web.Response(text=text, headers={"Content-Type": metrics.CONTENT_TYPE})

    asking = Asking(serving, inference, registry, settings, shelf)
    return [
        web.get("/metrics", prometheus),
        *OpenInference(asking, bus).routes(),
        *TensorFlowServing(asking).routes(),
        *Plain(asking).routes(),
        openapi.route(openapi.description()),
    ]
