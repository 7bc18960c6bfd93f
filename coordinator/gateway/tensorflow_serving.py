"""TensorFlow Serving's REST API (1.8 and later): predict, classify, regress, a model's status and metadata, versions and labels.

Statuses and words of errors are TensorFlow Serving's. A label is an alias of the registry. Keras models have one signature,
`serving_default`. KServe's V1 protocol uses the same requests; the additional fields that it reads are here too.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec
from aiohttp import web

from coordinator.gateway import json_arrays, tensorflow_inputs
from coordinator.gateway.answers import encoded, guarded
from coordinator.gateway.asking import Asking
from coordinator.gateway.bodies import beside, plain
from coordinator.gateway.catalog import answers, version_of
from coordinator.serving.inputs import size_bytes
from potluck.errors import InvalidRequest, NotFound
from potluck.scores import of_classes
from potluck.wire.tensors import to_numpy
from potluck.wire.values import Signature, Tensor, TensorSpec

SIGNATURE = "serving_default"
_METHODS = {
    "predict": "tensorflow/serving/predict",
    "classify": "tensorflow/serving/classify",
    "regress": "tensorflow/serving/regress",
}
_DTYPES = {
    "BOOL": "DT_BOOL", "UINT8": "DT_UINT8", "UINT16": "DT_UINT16", "UINT32": "DT_UINT32", "UINT64": "DT_UINT64",
    "INT8": "DT_INT8", "INT16": "DT_INT16", "INT32": "DT_INT32", "INT64": "DT_INT64", "FP16": "DT_HALF",
    "FP32": "DT_FLOAT", "FP64": "DT_DOUBLE", "BYTES": "DT_STRING",
}  # fmt: skip
_NUMBER = re.compile(r"[0-9]{1,18}")


class Alive(msgspec.Struct):
    status: str


class PredictRequest(msgspec.Struct, omit_defaults=True):
    """Inputs in rows (`instances`) or in columns (`inputs`), not both."""

    signature_name: str = ""
    instances: list[Any] | msgspec.UnsetType = msgspec.UNSET
    inputs: Any | msgspec.UnsetType = msgspec.UNSET


class PredictResponse(msgspec.Struct, omit_defaults=True):
    predictions: list[Any] | msgspec.UnsetType = msgspec.UNSET
    outputs: Any | msgspec.UnsetType = msgspec.UNSET


class ExamplesRequest(msgspec.Struct, omit_defaults=True):
    """The body of `:classify` and `:regress`: a map of features for each example, and features that all share."""

    examples: list[dict[str, Any]]
    context: dict[str, Any] = {}
    signature_name: str = ""


class ClassifyResponse(msgspec.Struct):
    results: list[list[tuple[str, float]]]


class RegressResponse(msgspec.Struct):
    results: list[float]


class VersionError(msgspec.Struct):
    error_code: str
    error_message: str


class VersionStatus(msgspec.Struct):
    version: str
    state: Literal["UNKNOWN", "START", "LOADING", "AVAILABLE", "UNLOADING", "END"]
    status: VersionError


class ModelStatus(msgspec.Struct):
    """`name` and `ready` are fields of KServe."""

    model_version_status: list[VersionStatus]
    name: str
    ready: bool


class ModelSpec(msgspec.Struct):
    name: str
    signature_name: str
    version: str


class Metadata(msgspec.Struct):
    model_spec: ModelSpec
    metadata: dict[str, Any]


class TensorFlowServing:
    """The routes below `/v1`."""

    def __init__(self, asking: Asking) -> None:
        self._asking = asking

    def routes(self) -> list[web.RouteDef]:
        model = "/v1/models/{model:[^/:]+}"
        found = [web.get("/", guarded(self.alive))]
        for base in (model, f"{model}/versions/{{version:[^/:]+}}", f"{model}/labels/{{label:[^/:]+}}"):
            found.append(web.get(base, guarded(self.status)))
            found.append(web.get(f"{base}/metadata", guarded(self.metadata)))
            for verb, handler in (("predict", self.predict), ("classify", self.classify), ("regress", self.regress)):
                found.append(web.post(f"{base}:{verb}", self._asking.answering(handler)))
        return found

    async def alive(self, request: web.Request) -> web.Response:
        """The health check of KServe's V1 protocol."""
        return encoded(Alive("alive"))

    # --- questions --------------------------------------------------------------------------------------------------------

    async def predict(self, request: web.Request) -> web.Response:
        asked, size = await self._asked(request, "predict")
        model, signature = self._deployed(request)
        rows = "instances" in asked
        if rows and "inputs" in asked:
            raise InvalidRequest(
                "JSON Value: Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist"
            )
        if rows:
            inputs = await beside(size, lambda: tensorflow_inputs.from_rows(signature, asked["instances"]))
        elif "inputs" in asked:
            inputs = await beside(size, lambda: tensorflow_inputs.from_columns(signature, asked["inputs"]))
        else:
            raise InvalidRequest("Missing 'inputs' or 'instances' key")
        asked.clear()  # values as objects take many times the memory of tensors, and the answer may take long
        answer = await self._asking.infer(request, model, inputs)

        def written() -> bytes:
            columns = {tensor.name: json_arrays.nested(tensor) for tensor in answer.outputs}
            said = {"predictions": tensorflow_inputs.as_rows(columns)} if rows else {"outputs": _alone(columns)}
            return json_arrays.written(said)

        size = sum([size_bytes(tensor) for tensor in answer.outputs])
        return web.Response(body=await beside(size, written), content_type="application/json")

    async def classify(self, request: web.Request) -> web.Response:
        name, scores = await self._examples(request, "classify")
        values = to_numpy(scores)
        if values.ndim == 1:
            values = values[:, None]
        if values.ndim != 2 or values.dtype.kind not in "fiu":
            raise InvalidRequest(
                f"Expected Tensor shape: [?, classes] of numbers, and '{scores.name}' is {_of(scores)}"
            )
        values, labels = of_classes(values, self._asking.catalog.info(name).classes)
        labels = labels or ("",) * values.shape[1]
        results = [[[label, score] for label, score in zip(labels, row, strict=True)] for row in values.tolist()]
        return web.Response(body=json_arrays.written({"results": results}), content_type="application/json")

    async def regress(self, request: web.Request) -> web.Response:
        _, found = await self._examples(request, "regress")
        values = to_numpy(found)
        if values.ndim == 2 and values.shape[1] == 1:
            values = values[:, 0]
        if values.ndim != 1 or values.dtype.kind not in "fiu":
            raise InvalidRequest(f"Expected Tensor shape: [?] or [?, 1] of numbers, and '{found.name}' is {_of(found)}")
        return web.Response(body=json_arrays.written({"results": values.tolist()}), content_type="application/json")

    # --- what is there ------------------------------------------------------------------------------------------------------

    async def status(self, request: web.Request) -> web.Response:
        name, version = self._meant(request)
        found = self._asking.catalog.deployments(f"{name}:{version}" if version else name)
        if not found:
            which = f"version {version} of" if version else "any versions of"
            raise NotFound(f"Could not find {which} model {name}")
        states = [
            VersionStatus(version_of(one), "AVAILABLE" if answers(one) else "LOADING", VersionError("OK", ""))
            for one in found
        ]
        return encoded(ModelStatus(states, name, any(answers(one) for one in found)))

    async def metadata(self, request: web.Request) -> web.Response:
        model, signature = self._deployed(request)
        name, _, version = model.partition(":")
        if not version:
            version = self._asking.deployed(name)[0].partition(":")[2]
        definition = {
            "inputs": {spec.name: _info(spec, f"{SIGNATURE}_{spec.name}:0") for spec in signature.inputs},
            "outputs": {
                spec.name: _info(spec, f"StatefulPartitionedCall:{at}") for at, spec in enumerate(signature.outputs)
            },
            "method_name": _METHODS["predict"],
        }
        said = {"signature_def": {"signature_def": {SIGNATURE: definition}}}
        return encoded(Metadata(ModelSpec(name, "", version), said))

    # --- what a request means -------------------------------------------------------------------------------------------------

    def _meant(self, request: web.Request) -> tuple[str, str]:
        """(name, version) in a path; version "": none is given. Raises InvalidRequest, NotFound."""
        path = request.match_info
        name, version, label = path["model"], path.get("version", ""), path.get("label", "")
        if "version" in path and not _NUMBER.fullmatch(version):
            raise InvalidRequest(f"Malformed request: {request.method} {request.path}")
        if not label:
            return name, str(int(version)) if version else ""
        self._asking.catalog.info(name)  # raises another error for a name that is not registered
        try:
            found = self._asking.catalog.info(f"{name}:{label}")
        except NotFound as error:
            raise InvalidRequest(f"Unrecognized servable version label: {label}") from error
        if label == str(found.version):
            raise InvalidRequest(f"Unrecognized servable version label: {label}")
        return name, str(found.version)

    def _deployed(self, request: web.Request) -> tuple[str, Signature]:
        """The model to ask, `name` or `name:version`, and its signature. Raises NotFound in TensorFlow Serving's words."""
        try:
            name, version = self._meant(request)
            model = f"{name}:{version}" if version else name
            _, signature = self._asking.deployed(model)
        except NotFound as error:
            name, version = request.match_info["model"], request.match_info.get("version", "")
            which = f"Specific({name}, {version})" if version else f"Latest({name})"
            raise NotFound(f"Servable not found for request: {which}: {error.message}") from error
        if signature is None:
            raise NotFound(f"Servable not found for request: Latest({model}): it is being loaded")
        return model, signature

    async def _asked(self, request: web.Request, verb: str) -> tuple[dict[str, Any], int]:
        """The request's JSON object, its signature checked, and how many bytes it had. Raises InvalidRequest."""
        body = await self._asking.bodies.read(request)
        if not body:
            raise InvalidRequest("JSON Parse error: The document is empty")
        try:
            asked = await beside(len(body), lambda: plain(body))
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"JSON Parse error: Invalid value: {error}") from error
        if not isinstance(asked, dict):
            raise InvalidRequest("JSON Value: Is not object")
        signature = asked.get("signature_name", "")
        if not isinstance(signature, str):
            raise InvalidRequest("JSON Value: not formatted correctly. 'signature_name' key must be a string value.")
        if signature not in ("", SIGNATURE, _METHODS[verb]):
            raise InvalidRequest(f'Serving signature name: "{signature[:80]}" not found in signature def')
        return asked, len(body)

    async def _examples(self, request: web.Request, verb: str) -> tuple[str, Tensor]:
        """(the deployment that answered, its only output)"""
        asked, size = await self._asked(request, verb)
        model, signature = self._deployed(request)
        inputs = await beside(size, lambda: tensorflow_inputs.from_examples(signature, asked, verb))
        answer = await self._asking.infer(request, model, inputs)
        if len(answer.outputs) != 1:
            have = ", ".join(tensor.name for tensor in answer.outputs)
            raise InvalidRequest(f"Expected one output to {verb} by, and the model has {have}: ask it with :predict")
        return answer.model, answer.outputs[0]


def _alone(columns: dict[str, Any]) -> Any:
    """Outputs in the column format; a single output has no name."""
    if len(columns) == 1:
        (values,) = columns.values()
        return values
    return columns


def _of(tensor: Tensor) -> str:
    return f"{tensor.datatype} of shape {list(tensor.shape)}"


def _info(spec: TensorSpec, name: str) -> dict[str, Any]:
    """A TensorInfo, as in protobuf's JSON."""
    dims = [{"size": str(length), "name": ""} for length in spec.shape]
    return {"dtype": _DTYPES[spec.datatype], "tensor_shape": {"dim": dims, "unknown_rank": False}, "name": name}
