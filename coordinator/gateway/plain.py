"""The plain routes, for users with a file: post an image, a text or a recording, and get JSON."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import numpy as np
from aiohttp import web

from coordinator.gateway import forms, json_arrays, streaming
from coordinator.gateway.answers import encoded, guarded
from coordinator.gateway.asking import Asking
from coordinator.gateway.bodies import beside, plain
from coordinator.gateway.catalog import answers
from coordinator.serving.inputs import size_bytes
from potluck.data import images, items
from potluck.errors import InvalidData, InvalidRequest
from potluck.net.http import media_type
from potluck.scores import of_classes
from potluck.wire.questions import Inferred, ModelInfo
from potluck.wire.tensors import from_numpy, to_numpy
from potluck.wire.values import Signature, Tensor

SHOWN_CLASSES = 5
"""Classes in an answer, unless `?top=` says how many."""
DECODED_AT_ONCE = 2
"""How many images are decoded at once: decoding takes memory."""
_UNSAID = ("", "application/octet-stream", "application/x-www-form-urlencoded")
"""Content types that programs send by default (curl's --data-binary sends the last). Then the bytes tell the type."""
_IMAGES = (b"\x89PNG", b"\xff\xd8", b"GIF8", b"BM", b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
_PORTABLE = tuple([b"P%d\n" % number for number in range(1, 7)])
"""How PBM, PGM and PPM files begin, as programs write them."""


class Score(msgspec.Struct):
    label: str
    score: float


class Classified(msgspec.Struct):
    """The best class, and the best few with their scores. Classes without names are given by number."""

    model: str
    label: str
    score: float
    scores: list[Score]


class Outputs(msgspec.Struct):
    """Arrays by the name of the output."""

    model: str
    outputs: dict[str, Any]


class DeployedModel(msgspec.Struct):
    model: str
    ready: bool
    classes: tuple[str, ...]


class Plain:
    """The routes below `/models`."""

    def __init__(self, asking: Asking) -> None:
        self._asking = asking
        self._decoding = asyncio.Semaphore(DECODED_AT_ONCE)

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/models", guarded(self.models)),
            web.post("/models/{model}/classify", self._asking.answering(self.classify)),
            web.post("/models/{model}/infer", self._asking.answering(self.infer)),
        ]

    async def models(self, request: web.Request) -> web.Response:
        """The deployed models."""
        catalog = self._asking.catalog
        return encoded(
            [DeployedModel(one.name, answers(one), catalog.info(one.name).classes) for one in catalog.deployments()]
        )

    async def classify(self, request: web.Request) -> web.Response:
        """The classes of one file. `?top=`: how many."""
        top = _top(request)
        model = request.match_info["model"]
        name, signature = self._asking.deployed(model)
        info = _described(self._asking.catalog.info(name), signature)
        body = await self._asking.bodies.read(request)
        content_type, data = await asyncio.to_thread(_file, request, body)
        async with self._decoding:
            item = await asyncio.to_thread(_item, content_type, data, info)
        if info.signature is None or len(info.signature.inputs) != 1:
            raise InvalidRequest(f"model {name} has several inputs: ask it at /models/{model}/infer")
        answer = await self._asking.infer(request, model, (from_numpy(info.signature.inputs[0].name, item),))
        scores = _scores(answer, self._asking.catalog.info(answer.model))
        best = sorted(scores, key=lambda one: -one.score)[:top]
        return encoded(Classified(answer.model, best[0].label, best[0].score, best))

    async def infer(self, request: web.Request) -> web.StreamResponse:
        """Arrays in, arrays out: one array for a model with one input, else a map by name. As events if the client asks for them."""
        model = request.match_info["model"]
        name, signature = self._asking.deployed(model)
        try:
            body = await self._asking.bodies.read(request)
            asked = await beside(len(body), lambda: plain(body))
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"the body is not JSON: {error}") from error
        if signature is None:
            raise InvalidRequest(f"model {name} does not say yet what its inputs are: it is being loaded")
        inputs = await beside(len(body), lambda: _arrays(name, signature, asked))
        asked = None  # values as objects take many times the memory of tensors, and the answer may take long
        if streaming.wanted(request):
            return await streaming.stream(self._asking, request, model, inputs)
        answer = await self._asking.infer(request, model, inputs)
        size = sum([size_bytes(tensor) for tensor in answer.outputs])

        def written() -> web.Response:
            return encoded(
                Outputs(answer.model, {tensor.name: json_arrays.nested(tensor) for tensor in answer.outputs})
            )

        return await beside(size, written)


def _top(request: web.Request) -> int:
    text = request.query.get("top", str(SHOWN_CLASSES))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text)):
        raise InvalidRequest(f"top is {text[:40]!r}: expected a number of classes, at least 1")
    return int(text)


def _described(info: ModelInfo, signature: Signature | None) -> ModelInfo:
    """The model with the signature that was learnt when it was loaded."""
    return info if info.signature is not None else msgspec.structs.replace(info, signature=signature)


def _file(request: web.Request, body: bytes) -> tuple[str, bytes]:
    """(its type, its bytes): the body, or the first file in a form. Raises InvalidRequest."""
    content_type = media_type(request)
    if content_type == "multipart/form-data":
        content_type, body = forms.first_file(request.headers["Content-Type"], body)
    if not body:
        raise InvalidRequest("the body is empty: send an image, a text or a recording (curl: --data-binary @image.png)")
    return content_type, body


def _item(content_type: str, data: bytes, info: ModelInfo) -> np.ndarray[Any, Any]:
    """A batch of one for the model. Raises InvalidData, InvalidRequest."""
    kind = content_type.partition("/")[0]
    if content_type in _UNSAID:
        kind = _kind(data)
    if kind == "image":
        options = items.image_options(info, ", so it takes arrays: ask it at /infer")
        return items.image(data, options, dtype=items.input_dtype(info))[np.newaxis]
    if kind == "audio":
        return items.recording(data, info)
    if kind == "text":
        return items.text(data, info)
    raise InvalidData(
        f"a body of type {content_type[:80]} is not understood: send an image, text/plain, or a WAV recording (audio/wav)"
    )


def _kind(data: bytes) -> str:
    """The content type of bytes that came without one."""
    if data[:4] == b"RIFF":
        return "audio" if data[8:12] == b"WAVE" else "image"
    known = data.startswith((*_IMAGES, *_PORTABLE)) or images.unread_format(data) is not None
    return "image" if known else "text"


def _scores(answer: Inferred, info: ModelInfo) -> list[Score]:
    """The scores in the only row of the only output. Raises InvalidRequest if the model is not a classifier."""
    values = to_numpy(answer.outputs[0])
    if len(answer.outputs) != 1 or values.ndim != 2 or len(values) != 1 or values.dtype.kind not in "fiu":
        shown = ", ".join(f"{one.name} {one.datatype} {list(one.shape)}" for one in answer.outputs)
        raise InvalidRequest(f"model {answer.model} answers {shown}, not scores of classes: ask it at /infer")
    scores, labels = of_classes(values, info.classes)
    row = [float(score) for score in scores[0].tolist()]
    return [Score(label, score) for label, score in zip(labels or map(str, range(len(row))), row, strict=True)]


def _arrays(name: str, signature: Signature, asked: Any) -> tuple[Tensor, ...]:
    """Raises InvalidRequest."""
    specs = {spec.name: spec for spec in signature.inputs}
    if not isinstance(asked, dict):
        if len(specs) != 1:
            raise InvalidRequest(f"model {name} has the inputs {', '.join(specs)}: send a map of arrays by name")
        asked = {next(iter(specs)): asked}
    if asked.keys() != specs.keys():
        given = ", ".join(str(key)[:80] for key in asked) or "none"
        raise InvalidRequest(f"model {name} has the inputs {', '.join(specs)}, but the request has {given}")
    found = []
    for key, spec in specs.items():
        value = asked[key]
        # If an item is one text, a list of texts is a batch.
        of_one_text = spec.datatype == "BYTES" and tuple(spec.shape[1:]) == (1,)
        if len(json_arrays.shape_of(value)) == len(spec.shape) - 1 - of_one_text:
            value = [value]  # add the missing batch axis of a single item
        found.append(json_arrays.tensor(spec, value))
    return tuple(found)
