"""The Open Inference Protocol (V2, REST): health, metadata, and the index of the repository. `inferring` does inference."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from aiohttp import web

from coordinator.gateway import binary
from coordinator.gateway.answers import encoded, guarded
from coordinator.gateway.asking import Asking
from coordinator.gateway.bodies import decoded
from coordinator.gateway.catalog import answers, stable, version_of
from coordinator.gateway.inferring import Inferring
from potluck import __version__
from potluck.bus.mqtt import Bus
from potluck.errors import Unavailable
from potluck.wire.values import ModelFormat, TensorSpec

PLATFORMS: dict[ModelFormat, str] = {
    "keras": "tensorflow_keras",
    "h5": "tensorflow_keras",
    "savedmodel": "tensorflow_savedmodel",
    "tflite": "litert_tflite",
}
"""`<project>_<format>`, as in the protocol."""
EXTENSIONS = (binary.EXTENSION, "classification", "schedule_policy", "model_repository(index)")
_CONNECTED_SECONDS = 0.05
"""How long a probe waits for the bus: it should not report a reconnect that is about to succeed."""


class ServerMetadata(msgspec.Struct):
    name: str
    version: str
    extensions: tuple[str, ...]


class ServerLive(msgspec.Struct):
    live: bool


class ServerReady(msgspec.Struct, omit_defaults=True):
    ready: bool
    error: str | msgspec.UnsetType = msgspec.UNSET


class ModelReady(msgspec.Struct, omit_defaults=True):
    name: str
    ready: bool
    error: str | msgspec.UnsetType = msgspec.UNSET


class MetadataTensor(msgspec.Struct):
    name: str
    datatype: str
    shape: tuple[int, ...]


class ModelMetadata(msgspec.Struct):
    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: list[MetadataTensor]
    outputs: list[MetadataTensor]


class IndexRequest(msgspec.Struct):
    """`ready`: list only models that can answer."""

    ready: bool = False


class IndexEntry(msgspec.Struct):
    name: str
    version: str
    state: Literal["READY", "LOADING", "UNAVAILABLE"]
    reason: str


_decode_index = msgspec.json.Decoder(IndexRequest).decode


class OpenInference:
    """The routes below `/v2`. While `bus` is not connected, nothing is ready. Without `bus`, that shows only once the nodes
    count as lost.
    """

    def __init__(self, asking: Asking, bus: Bus | None) -> None:
        self._asking = asking
        self._catalog = asking.catalog
        self._bus = bus

    def routes(self) -> list[web.RouteDef]:
        infer = self._asking.answering(Inferring(self._asking).infer)
        found = [
            web.get("/v2", guarded(self.server)),
            web.get("/v2/health/live", guarded(self.live)),
            web.get("/v2/health/ready", guarded(self.server_ready)),
            web.post("/v2/repository/index", self._asking.answering(self.index)),
        ]
        for base in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            found.append(web.post(f"{base}/infer", infer))  # first, as routes are searched in order
            found.append(web.get(base, guarded(self.model)))
            found.append(web.get(f"{base}/ready", guarded(self.ready)))
        return found

    async def server(self, request: web.Request) -> web.Response:
        return encoded(ServerMetadata("potluck", __version__, EXTENSIONS))

    async def live(self, request: web.Request) -> web.Response:
        return encoded(ServerLive(True))

    async def server_ready(self, request: web.Request) -> web.Response:
        """Whether all deployed models are ready (the protocol's "server ready"), and there is at least one."""
        found = self._catalog.deployments()
        names = {one.name.partition(":")[0] for one in found}
        waiting = sorted(names - {one.name.partition(":")[0] for one in stable(found) if answers(one)})
        reason = await self._closed()
        if not reason and not names:
            reason = "no model is deployed"
        if not reason and waiting:
            reason = f"no replica is ready of {', '.join(waiting[:12])}"
        return encoded(ServerReady(False, reason), 503) if reason else encoded(ServerReady(True))

    async def model(self, request: web.Request) -> web.Response:
        info = self._catalog.info(model_of(request))
        signature, deployed = info.signature, self._catalog.deployments(info.name)
        return encoded(
            ModelMetadata(
                name=info.name,
                versions=tuple(map(version_of, deployed)) or (str(info.version),),
                platform=PLATFORMS[info.format],
                inputs=_specs(signature.inputs) if signature else [],
                outputs=_specs(signature.outputs) if signature else [],
            )
        )

    async def ready(self, request: web.Request) -> web.Response:
        model = model_of(request)
        ready = self._catalog.ready(model)
        reason = await self._closed()
        if not reason and not ready:
            reason = f"no replica of {model} is ready"
        name = request.match_info["model"]
        return encoded(ModelReady(name, False, reason), 503) if reason else encoded(ModelReady(name, True))

    async def index(self, request: web.Request) -> web.Response:
        """All registered versions, and whether each can answer (Triton's model repository extension)."""
        body = await self._asking.bodies.read(request)
        asked = decoded(body, _decode_index, IndexRequest, "an index request") if body else IndexRequest()
        deployed = {one.name: answers(one) for one in self._catalog.deployments()}
        entries = [
            _entry(info.name, str(info.version), deployed.get(f"{info.name}:{info.version}"))
            for info in self._catalog.models()
        ]
        return encoded([entry for entry in entries if entry.state == "READY" or not asked.ready])

    async def _closed(self) -> str:
        """Why no model answers now; empty when the bus is connected, and requests are taken."""
        if self._asking.stopping:
            return "the coordinator is stopping"
        try:
            if self._bus is not None:
                await self._bus.connected(_CONNECTED_SECONDS)
        except Unavailable as error:
            return error.message
        return ""


def _entry(name: str, version: str, ready: bool | None) -> IndexEntry:
    """`ready`: whether it can answer; None: it is not deployed."""
    if ready is None:
        return IndexEntry(name, version, "UNAVAILABLE", "not deployed")
    return IndexEntry(name, version, "READY" if ready else "LOADING", "" if ready else "no replica is ready")


def model_of(request: web.Request) -> str:
    """The `name` or `name:version` in a path."""
    path: Any = request.match_info
    model, version = path["model"], path.get("version", "")
    return f"{model}:{version}" if version else str(model)


def _specs(specs: tuple[TensorSpec, ...]) -> list[MetadataTensor]:
    return [MetadataTensor(spec.name, spec.datatype, spec.shape) for spec in specs]
