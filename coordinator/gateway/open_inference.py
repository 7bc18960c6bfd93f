"""The Open Inference Protocol (V2, REST) with its binary tensor extension: health, metadata, and inference."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import web

from coordinator.gateway import binary
from coordinator.gateway.problems import guarded, readiness
from coordinator.serving.inference import Inference
from coordinator.serving.registry import Registry
from coordinator.serving.serving import Serving
from potluck import __version__
from potluck.bus import Bus
from potluck.codec import finite
from potluck.errors import InvalidRequest, TooLarge, Unavailable
from potluck.messages import BlobRef, Count, Tensor, TensorSpec
from potluck.settings import CoordinatorSettings
from potluck.tensors import as_lists, to_numpy

_CONNECTED_SECONDS = 0.05
"""What a probe waits for the bus: a reconnect that is about to succeed is none of its business."""


class _RequestTensor(msgspec.Struct):
    """A tensor of an inference request: V2, "$request_input"."""

    name: str
    shape: tuple[Count, ...]
    datatype: str
    data: list[Any] | None = None
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


class OpenInference:
    """The routes below `/v2`. While `bus` is not connected nothing is ready; without it that shows only once the nodes count
    as lost.
    """

    def __init__(
        self,
        serving: Serving,
        inference: Inference,
        registry: Registry,
        settings: CoordinatorSettings,
        bus: Bus | None,
    ) -> None:
        self._serving = serving
        self._inference = inference
        self._registry = registry
        self._settings = settings
        self._bus = bus

    def routes(self) -> list[web.RouteDef]:
        found = [
            web.get("/v2", guarded(self.server)),
            web.get("/v2/health/live", guarded(self.live)),
            web.get("/v2/health/ready", guarded(self.server_ready)),
        ]
        for base in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            found.append(web.get(base, guarded(self.model)))
            found.append(web.get(f"{base}/ready", guarded(self.ready)))
            found.append(web.post(f"{base}/infer", guarded(self.infer)))
        return found

    async def server(self, request: web.Request) -> web.Response:
        return web.json_response({"name": "potluck", "version": __version__, "extensions": [binary.EXTENSION]})

    async def live(self, request: web.Request) -> web.Response:
        return web.json_response({"live": True})

    async def server_ready(self, request: web.Request) -> web.Response:
        """All models that are deployed are ready (the protocol's "server ready"); with none, nothing could be answered."""
        names = sorted({deployment.name.partition(":")[0] for deployment in self._serving.deployments()})
        waiting = [name for name in names if not self._serving.ready(name)]
        reason = await self._disconnected()
        if not reason and not names:
            reason = "no model is deployed"
        if not reason and waiting:
            reason = f"no replica is ready of {', '.join(waiting[:12])}"
        return readiness({}, reason)

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
        ready = self._serving.ready(name)
        reason = await self._disconnected()
        if not reason and not ready:
            reason = f"no replica of {name} is ready"
        return readiness({"name": request.match_info["model"]}, reason)

    async def _disconnected(self) -> str:
        """Why no node can be reached; empty when the bus is connected."""
        try:
            if self._bus is not None:
                await self._bus.connected(_CONNECTED_SECONDS)
        except Unavailable as error:
            return error.message
        return ""

    async def infer(self, request: web.Request) -> web.Response:
        text, tail = binary.split(await request.read(), request.headers.get(binary.HEADER))
        asked = _decode(text)
        as_bytes = _wanted_as_bytes(asked)
        inputs = _inputs(asked, tail)
        answer = await self._inference.infer(_name(request), inputs, self._settings.inference_seconds)
        name, _, version = answer.model.partition(":")
        wanted = {output.name for output in asked.outputs}
        outputs = [tensor for tensor in answer.outputs if not wanted or tensor.name in wanted]
        if wanted and len(outputs) != len(wanted):
            have = ", ".join(tensor.name for tensor in answer.outputs)
            raise InvalidRequest(f"the model's outputs are {have}, but others were asked for")
        if any(isinstance(tensor.data, BlobRef) for tensor in outputs):
            raise TooLarge("the answer does not fit into a message: send fewer rows at once, or ask over MQTT")
        body: dict[str, Any] = {"model_name": name, "model_version": version, "outputs": []}
        if asked.id:
            body["id"] = asked.id
        behind: list[bytes] = []
        for tensor in outputs:
            told: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
            if as_bytes(tensor.name):
                behind.append(binary.packed(tensor))
                told["parameters"] = {binary.SIZE: len(behind[-1])}
            else:
                told["data"] = finite(as_lists(tensor).data)  # JSON knows no NaN
            body["outputs"].append(told)
        if not behind:
            return web.json_response(body)
        head = json.dumps(body).encode()
        return web.Response(
            body=head + b"".join(behind),
            headers={binary.HEADER: str(len(head))},
            content_type="application/octet-stream",
        )


def _decode(body: bytes) -> _InferRequest:
    try:
        value = json.loads(body.decode("utf-8-sig"))
        if b"\\ud" in body or b"\\uD" in body:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair cannot be sent on
        return msgspec.convert(value, _InferRequest)
    except (ValueError, RecursionError) as error:  # msgspec.ValidationError is a ValueError
        raise InvalidRequest(f"the body is not an inference request: {error}") from error


def _inputs(asked: _InferRequest, tail: bytes) -> tuple[Tensor, ...]:
    """The input tensors, their data from the JSON or from what is behind it. Raises InvalidRequest."""
    reader = binary.Reader(tail)
    inputs = []
    for one in asked.inputs:
        data: list[Any] | bytes | None = one.data
        if (binary.SIZE in one.parameters) != (data is None):
            raise InvalidRequest(f"tensor '{one.name}' needs either data or the parameter {binary.SIZE}")
        if data is None:
            data = reader.take(one.name, one.datatype, one.parameters[binary.SIZE])
        tensor = Tensor(name=one.name, datatype=one.datatype, shape=one.shape, data=data)
        if isinstance(data, bytes):
            to_numpy(tensor)  # as lists are, bytes are checked here, where only their own request can fail
        inputs.append(tensor)
    reader.close()
    return tuple(inputs)


def _wanted_as_bytes(asked: _InferRequest) -> Callable[[str], bool]:
    """Whether an output is asked for in binary, by its name. Raises InvalidRequest."""

    def flag(parameters: dict[str, Any], key: str, default: bool) -> bool:
        value = parameters.get(key, default)
        if not isinstance(value, bool):
            raise InvalidRequest(f"the parameter {key} is {value!r:.40}: expected true or false")
        return value

    all_of_them = flag(asked.parameters, "binary_data_output", False)
    each = {output.name: flag(output.parameters, "binary_data", all_of_them) for output in asked.outputs}
    return lambda name: each.get(name, all_of_them)


def _name(request: web.Request) -> str:
    model, version = request.match_info["model"], request.match_info.get("version", "")
    return f"{model}:{version}" if version else model


def _spec(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}
