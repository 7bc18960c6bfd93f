"""The gateway's routes: Open Inference Protocol V2 (REST, JSON), and metrics for Prometheus."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from coordinator.gateway import metrics
from coordinator.membership import Membership
from coordinator.serving.inference import Inference
from coordinator.serving.registry import Registry
from coordinator.serving.serving import Serving
from potluck import __version__
from potluck.codec import finite
from potluck.errors import (
    InvalidRequest,
    NotFound,
    Overloaded,
    PotluckError,
    TimedOut,
    TooLarge,
    Unavailable,
)
from potluck.messages import BlobRef, Count, Tensor, TensorSpec
from potluck.settings import CoordinatorSettings
from potluck.tensors import as_lists

log = logging.getLogger(__name__)

BODY_LIMIT_BYTES = 4 * 2**20
STATUS: dict[type[PotluckError], int] = {NotFound: 404, Overloaded: 429, TooLarge: 413, TimedOut: 504, Unavailable: 503}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class _RequestTensor(msgspec.Struct):
    """A tensor of an inference request: V2, "$request_input"."""

    name: str
    shape: tuple[Count, ...]
    datatype: str
    data: list[Any]
    parameters: dict[str, Any] = {}


class _RequestOutput(msgspec.Struct):
    """An output that is asked for: V2, "$request_output"."""

    name: str
    parameters: dict[str, Any] = {}


class _InferRequest(msgspec.Struct):
    inputs: list[_RequestTensor]
    id: str = ""
    parameters: dict[str, Any] = {}
    outputs: list[_RequestOutput] = []


def routes(
    serving: Serving, inference: Inference, registry: Registry, membership: Membership, settings: CoordinatorSettings
) -> list[web.RouteDef]:
    """Routes for the coordinator's HTTP application."""
    gateway = _Gateway(serving, inference, registry, settings)

    async def prometheus(request: web.Request) -> web.Response:
        text = metrics.exposition(serving, inference, membership)
        return web.Response(text=text, headers={"Content-Type": metrics.CONTENT_TYPE})

    found = [web.get("/metrics", prometheus)]
    for path, handler in (
        ("/v2", gateway.server),
        ("/v2/health/live", gateway.live),
        ("/v2/health/ready", gateway.live),
    ):
        found.append(web.get(path, _guarded(handler)))
    for base in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        found.append(web.get(base, _guarded(gateway.model)))
        found.append(web.get(f"{base}/ready", _guarded(gateway.ready)))
        found.append(web.post(f"{base}/infer", _guarded(gateway.infer)))
    return found


class _Gateway:
    def __init__(
        self, serving: Serving, inference: Inference, registry: Registry, settings: CoordinatorSettings
    ) -> None:
        self._serving = serving
        self._inference = inference
        self._registry = registry
        self._settings = settings

    async def server(self, request: web.Request) -> web.Response:
        return web.json_response({"name": "potluck", "version": __version__, "extensions": []})

    async def live(self, request: web.Request) -> web.Response:
        key = request.path.rsplit("/", 1)[1]
        return web.json_response({key: True})

    async def model(self, request: web.Request) -> web.Response:
        info = self._registry.model(_name(request))
        signature = info.signature
        return web.json_response(
            {
                "name": info.name,
                "versions": list(self._serving.versions(info.name)) or [str(info.version)],
                "platform": "tensorflow_keras",
                "inputs": [_spec(spec) for spec in signature.inputs] if signature else [],
                "outputs": [_spec(spec) for spec in signature.outputs] if signature else [],
            }
        )

    async def ready(self, request: web.Request) -> web.Response:
        name = _name(request)
        if not self._serving.ready(name):
            raise Unavailable(f"no replica of {name} is ready")
        return web.json_response({"name": request.match_info["model"], "ready": True})

    async def infer(self, request: web.Request) -> web.Response:
        if "Inference-Header-Content-Length" in request.headers:
            raise InvalidRequest("the binary tensor extension is not supported yet: send `data` as lists")
        asked = _decode(await request.read())
        inputs = tuple(
            Tensor(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape, data=tensor.data)
            for tensor in asked.inputs
        )
        answer = await self._inference.infer(_name(request), inputs, self._settings.inference_seconds)
        name, _, version = answer.model.partition(":")
        wanted = {output.name for output in asked.outputs}
        outputs = [as_lists(tensor) for tensor in answer.outputs if not wanted or tensor.name in wanted]
        if wanted and len(outputs) != len(wanted):
            have = ", ".join(tensor.name for tensor in answer.outputs)
            raise InvalidRequest(f"the model's outputs are {have}, but others were asked for")
        if any(isinstance(tensor.data, BlobRef) for tensor in outputs):
            raise TooLarge("the answer does not fit into a message: send fewer rows at once, or ask over MQTT")
        body = {
            "model_name": name,
            "model_version": version,
            "outputs": [
                {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape), "data": tensor.data}
                for tensor in outputs
            ],
        }
        if asked.id:
            body["id"] = asked.id
        return web.json_response(finite(body))  # JSON knows no NaN


def _decode(body: bytes) -> _InferRequest:
    try:
        value = json.loads(body.decode("utf-8-sig"))
        if b"\\ud" in body or b"\\uD" in body:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair cannot be sent on
        return msgspec.convert(value, _InferRequest)
    except (ValueError, RecursionError) as error:  # msgspec.ValidationError is a ValueError
        raise InvalidRequest(f"the body is not an inference request: {error}") from error


def _name(request: web.Request) -> str:
    model, version = request.match_info["model"], request.match_info.get("version", "")
    return f"{model}:{version}" if version else model


def _spec(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def _guarded(handler: Handler) -> Handler:
    """Errors as the protocol has them: `{"error": "..."}` with a status that says whose fault it is."""

    async def guarded(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPRequestEntityTooLarge:
            return _problem(413, f"the body is over {BODY_LIMIT_BYTES} bytes", None)
        except PotluckError as error:
            status = next((code for kind, code in STATUS.items() if isinstance(error, kind)), 400)
            return _problem(status, error.message, error.retry_after_seconds)

    return guarded


def _problem(status: int, text: str, retry_after_seconds: float | None) -> web.Response:
    headers = {"Retry-After": str(max(1, round(retry_after_seconds)))} if retry_after_seconds else None
    return web.json_response({"error": text}, status=status, headers=headers)
