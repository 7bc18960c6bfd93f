"""The description of the gateway's routes in OpenAPI 3.1, its schemas made from the structs that requests are decoded into."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from coordinator.gateway import events, inferring, open_inference, plain, questions, streaming, tensorflow_serving
from coordinator.gateway.answers import Problem
from coordinator.gateway.asking import TIMEOUT_HEADER
from coordinator.gateway.gate import ANYBODY, NEEDS
from potluck import __version__
from potluck.wire.codec import CONTENT_TYPES
from potluck.wire.identities import CALLER_HEADER, IDENTITY_PATTERN

_STRUCTS = (
    Problem,
    open_inference.ServerMetadata,
    open_inference.ServerLive,
    open_inference.ServerReady,
    open_inference.ModelReady,
    open_inference.ModelMetadata,
    open_inference.IndexRequest,
    open_inference.IndexEntry,
    inferring.InferRequest,
    inferring.InferResponse,
    tensorflow_serving.Alive,
    tensorflow_serving.PredictRequest,
    tensorflow_serving.PredictResponse,
    tensorflow_serving.ExamplesRequest,
    tensorflow_serving.ClassifyResponse,
    tensorflow_serving.RegressResponse,
    tensorflow_serving.ModelStatus,
    tensorflow_serving.Metadata,
    plain.Classified,
    plain.Outputs,
    plain.DeployedModel,
)
_OCTETS = "application/octet-stream"
_JSON = "application/json"
_FAILURES = {
    "400": "The request cannot be answered as it is.",
    "401": "Nobody knows who asks.",
    "403": "Whoever asks may not do this.",
    "404": "There is no such thing, or it is not deployed.",
    "409": "A name that is taken, or a state that forbids it.",
    "413": "The body, or an output, is too large.",
    "415": "This Content-Type is not taken.",
    "429": "Too much waits already: come back after Retry-After.",
    "500": "A fault of the coordinator or a node.",
    "503": "Nothing can answer now.",
    "504": "No answer in time.",
}
_OF_MODELS = ("400", "404", "413", "429", "500", "503", "504")
"""Statuses of errors of a request to a model."""
_SCHEMES = {
    "certificate": {"type": "mutualTLS", "description": "The certificate of a member of the cluster"},
    "bearer": {"type": "http", "scheme": "bearer", "description": "An operator of the cluster makes one"},
}
Json = dict[str, Any]


def description(*, closed: bool = False) -> Json:
    """The document for `/openapi.json`. `closed`: only members of the cluster may ask."""
    found = _described()
    if closed:
        found["components"]["securitySchemes"] = _SCHEMES
        found["security"] = [{name: []} for name in _SCHEMES]
        for path, operations in found["paths"].items():
            for method, operation in operations.items():
                needed = NEEDS[f"{method.upper()} {path}"]
                if needed == ANYBODY:
                    operation["security"] = []
                else:
                    operation["description"] = f"Needs the role `{needed}`."
                    operation["responses"] |= {status: _problem(status) for status in ("401", "403")}
    return found


def _described() -> Json:
    _, components = msgspec.json.schema_components(_STRUCTS, ref_template="#/components/schemas/{name}")
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "potluck",
            "version": __version__,
            "summary": "Questions to deployed models (Open Inference Protocol, TensorFlow Serving's REST, plain files), and to the cluster.",
        },
        "paths": _open_inference() | _tensorflow_serving() | _plain() | _cluster(),
        "components": {"schemas": components},
    }


def route(document: Json) -> web.RouteDef:
    body = msgspec.json.encode(document)

    async def openapi(request: web.Request) -> web.Response:
        return web.Response(body=body, content_type=_JSON)

    return web.get("/openapi.json", openapi)


def _open_inference() -> Json:
    paths: Json = {
        "/v2": {"get": _get("The server's name, version and extensions", "ServerMetadata")},
        "/v2/health/live": {"get": _get("Whether the coordinator runs", "ServerLive")},
        "/v2/health/ready": {"get": _get("Whether all deployed models can answer", "ServerReady", unready="ServerReady")},
        "/v2/repository/index": {
            "post": _post("Every version, and whether it can answer", _ref("IndexRequest"), _listed("IndexEntry"), body_needed=False)
        },
    }  # fmt: skip
    for base, names in (("/v2/models/{model}", ("model",)), ("/v2/models/{model}/versions/{version}", ("model", "version"))):  # fmt: skip
        paths |= {
            base: {"get": _get("A model's versions, inputs and outputs", "ModelMetadata", names)},
            f"{base}/ready": {"get": _get("Whether a replica can answer", "ModelReady", names, unready="ModelReady")},
            f"{base}/infer": {
                "post": _post("Inference", _ref("InferRequest"), _ref("InferResponse"), names, octets=True)
            },
        }
    return paths


def _tensorflow_serving() -> Json:
    paths: Json = {"/": {"get": _get("Whether the coordinator runs", "Alive")}}
    for suffix, names in (
        ("", ("model",)),
        ("/versions/{version}", ("model", "version")),
        ("/labels/{label}", ("model", "label")),
    ):
        base = f"/v1/models/{{model}}{suffix}"
        paths |= {
            base: {"get": _get("The deployed versions and their state", "ModelStatus", names)},
            f"{base}/metadata": {"get": _get("A model's signature", "Metadata", names)},
            f"{base}:predict": {
                "post": _post("Outputs, by rows or columns", _ref("PredictRequest"), _ref("PredictResponse"), names)
            },
            f"{base}:classify": {
                "post": _post("Labels and scores", _ref("ExamplesRequest"), _ref("ClassifyResponse"), names)
            },
            f"{base}:regress": {"post": _post("Numbers", _ref("ExamplesRequest"), _ref("RegressResponse"), names)},
        }
    return paths


def _plain() -> Json:
    classify = _post("The classes of a file", {}, _ref("Classified"), ("model",))
    classify["requestBody"]["content"] = {
        kind: {"schema": {"type": "string", "format": "binary"}}
        for kind in ("image/png", "image/jpeg", "audio/wav", "text/plain", _OCTETS)
    }
    top = {"type": "integer", "minimum": 1, "maximum": 999_999_999, "default": plain.SHOWN_CLASSES}
    classify["parameters"].append({"name": "top", "in": "query", "schema": top})
    arrays = {"description": "An array, or a map of arrays by the input's name"}
    infer = _post("Arrays in, arrays out", arrays, _ref("Outputs"), ("model",))
    infer["responses"]["200"]["content"][streaming.CONTENT_TYPE] = {"schema": {"type": "string"}}
    return {
        "/models": {"get": _get("What is deployed", _listed("DeployedModel"))},
        "/models/{model}/classify": {"post": classify},
        "/models/{model}/infer": {"post": infer},
    }


def _cluster() -> Json:
    message = {
        "type": "object",
        "properties": {"type": {"type": "string"}, "id": {"type": "string"}},
        "required": ["type"],
        "description": "A message as on MQTT, by its `type`: docs/protocol.md",
    }
    failures = tuple(status for status in _FAILURES if status not in ("401", "403"))
    ask = _post("A question to the coordinator, and its answer", message, message, failures=failures)
    encodings = {kind: {"schema": message} for kind in CONTENT_TYPES.values()}
    ask["requestBody"]["content"] = ask["responses"]["200"]["content"] = encodings
    caller = {"type": "string", "pattern": IDENTITY_PATTERN}
    about = "Who asks: with the message's `id` it names a question that may be asked again"
    ask["parameters"].append({"name": CALLER_HEADER, "in": "header", "description": about, "schema": caller})
    number: Json = {"type": "integer", "minimum": 0, "maximum": 10**events.NUMBER_SIGNS - 1}
    follow = _get("What happens in the cluster: server-sent events, each a `ClusterEvent` with its number as `id`", {})
    follow["responses"]["200"]["content"] = {streaming.CONTENT_TYPE: {"schema": {"type": "string"}}}
    follow["responses"] |= {status: _problem(status) for status in ("400", "429", "503")}
    follow["parameters"] = [
        {
            "name": name,
            "in": where,
            "description": "Begin after this event; without it, with the next one",
            "schema": number,
        }
        for name, where in (("after", "query"), (events.LAST_HEADER, "header"))
    ]
    return {questions.PATH: {"post": ask}, events.PATH: {"get": follow}}


def _get(summary: str, answer: str | Json, names: tuple[str, ...] = (), unready: str = "") -> Json:
    found: Json = {
        "summary": summary,
        "parameters": [_in_path(name) for name in names],
        "responses": {"200": _answer(summary, _ref(answer) if isinstance(answer, str) else answer)},
    }
    if unready:
        found["responses"]["503"] = _answer("It cannot.", _ref(unready))
    if names:
        found["responses"] |= {status: _problem(status) for status in ("400", "404")}
    return found


def _post(
    summary: str,
    body: Json,
    answer: Json,
    names: tuple[str, ...] = (),
    *,
    octets: bool = False,
    body_needed: bool = True,
    failures: tuple[str, ...] = _OF_MODELS,
) -> Json:
    timeout = {"type": "number", "exclusiveMinimum": 0}
    found: Json = {
        "summary": summary,
        "parameters": [_in_path(name) for name in names],
        "requestBody": {"required": body_needed, "content": {_JSON: {"schema": body}}},
        "responses": {"200": _answer(summary, answer)} | {status: _problem(status) for status in failures},
    }
    if names:
        about = "How many seconds the client waits"
        found["parameters"].append({"name": TIMEOUT_HEADER, "in": "header", "description": about, "schema": timeout})
    if octets:
        found["responses"]["200"]["content"][_OCTETS] = {"schema": {"type": "string", "format": "binary"}}
    return found


def _in_path(name: str) -> Json:
    schema: Json = {"type": "string", "minLength": 1}
    if name == "model":
        schema["pattern"] = "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _answer(text: str, schema: Json) -> Json:
    return {"description": text, "content": {_JSON: {"schema": schema}}}


def _problem(status: str) -> Json:
    found = _answer(_FAILURES[status], _ref("Problem"))
    if status == "429":
        found["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds"}}
    return found


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _listed(name: str) -> Json:
    return {"type": "array", "items": _ref(name)}
