"""Inference of the Open Inference Protocol (V2, REST), with the extensions that Triton's clients use: tensors as bytes,
classification, priorities, and the time that an answer may take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from aiohttp import web

from coordinator.gateway import binary
from coordinator.gateway.answers import encoded
from coordinator.gateway.asking import Asking
from coordinator.gateway.bodies import beside, decoded
from coordinator.serving.inputs import size_bytes
from potluck.errors import InvalidRequest
from potluck.scores import of_classes
from potluck.wire.questions import Inferred, ModelInfo
from potluck.wire.tensors import from_numpy, packed, plain, to_numpy
from potluck.wire.values import Shape, Signature, Tensor

_MICROSECONDS = 1e-6
_OCTETS = "application/octet-stream"


class RequestTensor(msgspec.Struct):
    """A tensor of an inference request: V2, "$request_input"."""

    name: str
    shape: Shape
    datatype: str
    data: list[Any] | None = None
    parameters: dict[str, Any] | None = None


class RequestOutput(msgspec.Struct):
    """An output that is asked for: V2, "$request_output"."""

    name: str
    parameters: dict[str, Any] | None = None


class InferRequest(msgspec.Struct):
    """V2, "$inference_request"."""

    inputs: list[RequestTensor]
    id: str = ""
    parameters: dict[str, Any] | None = None
    outputs: list[RequestOutput] | None = None


class ResponseTensor(msgspec.Struct, omit_defaults=True):
    """A tensor of an answer: V2, "$response_output"."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: list[Any] | None = None
    parameters: dict[str, Any] | None = None


class InferResponse(msgspec.Struct, omit_defaults=True):
    """V2, "$inference_response"."""

    model_name: str
    model_version: str
    outputs: list[ResponseTensor]
    id: str = ""


_decode = msgspec.json.Decoder(InferRequest).decode


class Inferring:
    """Answers `POST .../infer`."""

    def __init__(self, asking: Asking) -> None:
        self._asking = asking

    async def infer(self, request: web.Request) -> web.Response:
        path = request.match_info
        model = path["model"]
        if "version" in path:
            model = f"{model}:{path['version']}"
        text, tail = binary.split(await self._asking.bodies.read(request), request.headers.get(binary.HEADER))
        asked = await beside(len(text), lambda: decoded(text, _decode, InferRequest, "an inference request"))
        wanted = _Wanted(asked)
        name, signature = self._asking.deployed(model)
        inputs = await beside(len(text), lambda: _inputs(asked, tail))
        asked.inputs.clear()  # values as objects take many times the memory of tensors, and the answer may take long
        if signature is not None:
            check(name, signature, inputs)
        seconds, priority = _timeout_seconds(asked.parameters), _priority(asked.parameters)
        answer = await self._asking.infer(request, model, inputs, seconds, priority)
        size = sum([size_bytes(tensor) for tensor in answer.outputs])
        return await beside(size, lambda: wanted.answer(answer, asked.id, self._asking))


class _Wanted:
    """How a request wants its outputs. Raises InvalidRequest for bad flags."""

    def __init__(self, asked: InferRequest) -> None:
        self._as_bytes = _flag(asked.parameters, "binary_data_output", False)
        self._each: dict[str, tuple[bool, int]] = {}
        for output in asked.outputs or ():
            as_bytes = _flag(output.parameters, "binary_data", self._as_bytes)
            self._each[output.name] = as_bytes, _classes(output.parameters)

    def answer(self, answer: Inferred, id_: str, asking: Asking) -> web.Response:
        """`answer` as it goes to the client. Raises InvalidRequest for outputs that the model does not have."""
        outputs: Sequence[Tensor] = answer.outputs
        if self._each:
            outputs = [tensor for tensor in outputs if tensor.name in self._each]
            if len(outputs) != len(self._each):
                have = ", ".join([tensor.name for tensor in answer.outputs])
                raise InvalidRequest(f"the model's outputs are {have}, but others were asked for")
        told: list[ResponseTensor] = []
        behind: list[bytes] = []
        for tensor in outputs:
            as_bytes, classes = self._each.get(tensor.name, (self._as_bytes, 0))
            if classes:
                tensor = _classified(tensor, classes, asking.catalog.info(answer.model))
            one = ResponseTensor(tensor.name, tensor.datatype, tensor.shape)
            if as_bytes:
                behind.append(packed(tensor))
                one.parameters = {binary.SIZE: len(behind[-1])}
            else:
                one.data = tensor.data if isinstance(tensor.data, list) else to_numpy(tensor).ravel().tolist()
            told.append(one)
        name, _, version = answer.model.partition(":")
        said = InferResponse(name, version, told, id_)
        if not behind:
            return encoded(said)
        head = msgspec.json.encode(said)
        return web.Response(
            body=b"".join((head, *behind)), headers={binary.HEADER: str(len(head))}, content_type=_OCTETS
        )


def check(name: str, signature: Signature, inputs: Sequence[Tensor]) -> None:
    """Check names and datatypes against the model's. Raises InvalidRequest. (`Inference` checks the shapes.)"""
    specs = {spec.name: spec for spec in signature.inputs}
    given = [tensor.name for tensor in inputs]
    if len(given) != len(specs) or specs.keys() != set(given):
        raise InvalidRequest(
            f"model '{name}' has the inputs {', '.join(specs)}, but the request has {', '.join(given) or 'none'}"
        )
    for tensor in inputs:
        wanted = specs[tensor.name].datatype
        if tensor.datatype != wanted:
            raise InvalidRequest(
                f"input '{tensor.name}' of model '{name}' is {wanted}, but the request has {tensor.datatype}"
            )


def _inputs(asked: InferRequest, tail: bytes) -> tuple[Tensor, ...]:
    """The input tensors, with data from the JSON or from the bytes after it, as bytes or texts. Raises InvalidRequest."""
    reader = binary.TensorReader(tail)
    inputs = []
    for one in asked.inputs:
        size = None if one.parameters is None else one.parameters.get(binary.SIZE)
        if (size is None) == (one.data is None):
            raise InvalidRequest(f"tensor '{one.name}' needs either data or the parameter {binary.SIZE}")
        data = one.data if size is None else reader.take(one.name, one.datatype, size)
        assert data is not None
        # Checked here, so that an error fails only its own request.
        inputs.append(plain(Tensor(name=one.name, datatype=one.datatype, shape=one.shape, data=data)))
    reader.close()
    return tuple(inputs)


def _timeout_seconds(parameters: dict[str, Any] | None) -> float | None:
    """Triton's parameter `timeout`, given in microseconds; 0: no timeout. Raises InvalidRequest."""
    value = None if parameters is None else parameters.get("timeout")
    if value is None or (value == 0 and value is not False):
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**63:
        raise InvalidRequest(f"the parameter timeout is {value!r:.40}: expected microseconds, a whole number")
    return value * _MICROSECONDS


def _priority(parameters: dict[str, Any] | None) -> int:
    """Triton's `priority` (1 is the highest, 0 is none) as ours (10 is the highest). Raises InvalidRequest."""
    value = 0 if parameters is None else parameters.get("priority", 0)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InvalidRequest(f"the parameter priority is {value!r:.40}: expected a whole number, 1 for the highest")
    return max(-10, 11 - value) if value else 0


def _flag(parameters: dict[str, Any] | None, key: str, default: bool) -> bool:
    value = default if parameters is None else parameters.get(key, default)
    if not isinstance(value, bool):
        raise InvalidRequest(f"the parameter {key} is {value!r:.40}: expected true or false")
    return value


def _classes(parameters: dict[str, Any] | None) -> int:
    """How many classes to answer for an output; 0: the tensor itself. Raises InvalidRequest."""
    value = 0 if parameters is None else parameters.get("classification", 0)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InvalidRequest(f"the parameter classification is {value!r:.40}: expected a number of classes")
    return value


def _classified(tensor: Tensor, count: int, info: ModelInfo) -> Tensor:
    """The best `count` classes of each row as `score:index[:label]`, best first (Triton's classification extension)."""
    scores = to_numpy(tensor)
    if scores.ndim < 1 or scores.dtype.kind not in "fiu":
        raise InvalidRequest(f"output '{tensor.name}' is {tensor.datatype}: classification takes scores")
    scores, labels = of_classes(scores, info.classes)
    rows = scores.reshape(-1, scores.shape[-1])
    best = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, :count]
    texts = [
        [f"{row[at]:f}:{at}" + (f":{labels[at]}" if labels else "") for at in places]
        for row, places in zip(rows, best.tolist(), strict=True)
    ]
    shape = (*scores.shape[:-1], best.shape[1])
    return from_numpy(tensor.name, np.asarray(texts, object).reshape(shape))
