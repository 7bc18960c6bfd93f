"""The plain routes: a file in, its classes out; arrays in, arrays out."""

from __future__ import annotations

import io
import json
import re
import struct
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import numpy as np
import pytest
from PIL import Image

from potluck.data import audio
from potluck.wire.tensors import to_numpy
from potluck.wire.values import ErrorInfo, ImageOptions, Signature, TensorSpec
from support.eventually import eventually
from support.serving_lab import Lab

Deploy = Callable[..., Awaitable[None]]
Http = tuple[str, aiohttp.ClientSession]


def signature(shape: tuple[int, ...], datatype: str = "FP32") -> Signature:
    """The signature of a model whose output is like its input: the scripted node doubles it."""
    return Signature(
        inputs=(TensorSpec(name="x", datatype=datatype, shape=shape),),
        outputs=(TensorSpec(name="y", datatype=datatype, shape=shape),),
    )


def png(width: int, height: int, value: int = 51) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def pcm(count: int, rate: int = 8000) -> bytes:
    return audio.encode(np.full((count, 1), 16384, np.int16), rate)


async def post(http: Http, path: str, data: Any, content_type: str | None = None) -> tuple[int, Any]:
    base, session = http
    headers = {"Content-Type": content_type} if content_type else {}
    async with session.post(f"{base}/models/{path}", data=data, headers=headers) as response:
        return response.status, await response.json()


def sent(lab: Lab) -> np.ndarray[Any, Any]:
    """The last input that the model got."""
    return to_numpy(lab.nodes["a"].inputs[-1][0])


@pytest.mark.parametrize("content_type", ["image/png", "application/octet-stream", "application/x-www-form-urlencoded"])
async def test_an_image_becomes_the_models_input(lab: Lab, http: Http, deploy: Deploy, content_type: str) -> None:
    await deploy("images", signature((-1, 2, 3, 1)), image=ImageOptions(height=2, width=3, channels=1, scale=1 / 255))
    status, said = await post(http, "images/classify", png(30, 20), content_type)
    assert sent(lab).shape == (1, 2, 3, 1)
    np.testing.assert_allclose(sent(lab), 0.2, rtol=1e-6)
    assert (status, said["error"]) == (
        400, "model images:1 answers y FP32 [1, 2, 3, 1], not scores of classes: ask it at /infer",
    )  # fmt: skip


async def test_a_form_carries_a_file(lab: Lab, http: Http, deploy: Deploy) -> None:
    await deploy("images", signature((-1, 2, 2, 3)))
    form = aiohttp.FormData()
    form.add_field("note", "hello")
    form.add_field("file", png(4, 4, 255), filename="four.png", content_type="image/png")
    await post(http, "images/classify", form)
    assert sent(lab).shape == (1, 2, 2, 3)  # as the signature has it, where no training said more
    assert sent(lab).max() == 1


async def test_classes_come_with_their_scores_the_best_first(http: Http, deploy: Deploy) -> None:
    await deploy("sounds", signature((-1, 3)), classes=("cat", "dog", "eel"), rate=8000)
    wav = pcm(2)  # padded to three samples: 0.5, 0.5, 0
    wanted = [{"label": "cat", "score": 1.0}, {"label": "dog", "score": 1.0}, {"label": "eel", "score": 0.0}]
    assert await post(http, "sounds/classify", wav, "audio/wav") == (
        200, {"model": "sounds:1", "label": "cat", "score": 1.0, "scores": wanted},
    )  # fmt: skip
    status, said = await post(http, "sounds:1/classify?top=1", wav)
    assert (status, said["scores"]) == (200, wanted[:1])
    await deploy("unnamed", signature((-1, 3)))
    status, said = await post(http, "unnamed/classify", wav)
    assert (status, said["label"]) == (200, "0")


async def test_texts(lab: Lab, http: Http, deploy: Deploy) -> None:
    await deploy("texts", signature((-1,), "BYTES"))
    for content_type in ("text/plain", "text/plain; charset=utf-8", "application/octet-stream"):
        status, said = await post(http, "texts/classify", "größer".encode(), content_type)
        assert sent(lab).tolist() == ["größer"]
        assert status == 400
        assert "not scores of classes" in said["error"]


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
WRONG: list[Any] = [
    ("none/classify", b"x", "image/png", 404, "none"),
    ("images/classify", b"", "image/png", 400, "the body is empty"),
    ("images/classify", b"no image", "image/png", 400, "not an image"),
    ("images/classify", png(4, 4)[:45], "image/png", 400, "cannot be read as an image"),
    ("images/classify", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image/eps", 400, "not an image"),
    ("images/classify", HEIC, "image/heic", 400, "HEIC files cannot be read: convert it to JPEG or PNG"),
    ("images/classify", HEIC, "application/octet-stream", 400, "HEIC files cannot be read: convert it to JPEG or PNG"),
    ("images/classify", b"text", "text/plain", 400, "takes no text"),
    ("images/classify", pcm(3), "audio/wav", 400, "does not take (samples,)"),
    ("images/classify", b"{}", "application/json", 400, "a body of type application/json is not understood"),
    ("images/classify?top=0", png(4, 4), "image/png", 400, "top is '0'"),
    ("images/classify?top=x", png(4, 4), "image/png", 400, "top is 'x'"),
    ("m/classify", png(4, 4), "image/png", 400, "model m:1 takes no images: its input has the shape ("),
    ("images/classify", b'<?xml version="1.0"?>\n<svg/>', "", 400, "SVG"),
    ("m/classify", b"RIFF....WAVE", "audio/wav", 400, "cut off"),
    ("images/classify", b"--b\r\n\r\n--b--", "multipart/form-data; boundary=b", 400, "the form has no file"),
    ("images/classify", b"", "multipart/form-data", 400, "the form cannot be read: its Content-Type has no boundary"),
]


async def test_what_is_wrong_is_said(http: Http, deploy: Deploy) -> None:
    await deploy("images", signature((-1, 2, 2, 3)))
    for path, data, content_type, status, said in WRONG:
        found, answer = await post(http, path, data, content_type)
        assert said in answer.get("error", ""), (path, data, answer)
        assert found == status, (path, data)


async def test_an_image_that_would_fill_the_memory_is_refused(http: Http, deploy: Deploy) -> None:
    await deploy("images", signature((-1, 2, 2, 1)))
    bomb = png(1, 1)
    at = bomb.index(b"IHDR")
    head = b"IHDR" + struct.pack(">II", 9000, 10000) + bomb[at + 12 : at + 17]
    bomb = bomb[:at] + head + struct.pack(">I", zlib.crc32(head)) + bomb[at + 21 :]
    status, said = await post(http, "images/classify", bomb, "image/png")
    assert status == 400
    assert "pixels, but at most 89478485 are decoded" in said["error"]


async def test_arrays(lab: Lab, http: Http) -> None:
    for asked in ([1, 2], [[1, 2]], {"x": [[1, 2]]}):
        assert await post(http, "m/infer", json.dumps(asked)) == (200, {"model": "m:1", "outputs": {"y": [[2.0, 4.0]]}})
    base, session = http
    async with session.get(f"{base}/models") as response:
        assert await response.json() == [{"model": "m:1", "ready": True, "classes": []}]


async def test_a_list_of_texts_is_a_batch(lab: Lab, http: Http, deploy: Deploy) -> None:
    await deploy("film", signature((-1, 1), "BYTES"))
    await deploy("flat", signature((-1,), "BYTES"))
    for asked, one, flat in (
        ("good", ["good"], ["good"]),
        (["good"], ["good"], ["good"]),
        (["good", "bad"], ["good", "bad"], ["good", "bad"]),
        ([["good"], ["bad"]], [["good"], ["bad"]], None),
    ):
        await post(http, "film/infer", json.dumps(asked))
        assert sent(lab).tolist() == one  # the node gives each text its axis
        if flat is not None:
            await post(http, "flat/infer", json.dumps(asked))
            assert sent(lab).tolist() == flat


UNFIT: list[Any] = [
    ("{", "the body is not JSON"),
    ("", "the body is not JSON"),
    ('{"z": [1, 2]}', "has the inputs x, but the request has z"),
    ('["a", "b"]', "not of expected type: float"),
    ("[[1, 2], [3]]", "unexpected size: 1"),
]


async def test_arrays_that_do_not_fit(http: Http) -> None:
    for body, said in UNFIT:
        status, answer = await post(http, "m/infer", body)
        assert said in answer.get("error", ""), (body, answer)
        assert status == 400, body


async def test_rows_are_answered_as_they_are_done(lab: Lab, http: Http) -> None:
    base, session = http
    headers = {"Accept": "text/event-stream"}
    rows = [[number, 0.5] for number in range(100)]
    async with session.post(f"{base}/models/m/infer", json=rows, headers=headers) as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        events = (await response.text()).split("\n\n")
    assert events.pop() == ""
    found = {}
    for event in events:
        number, data = re.fullmatch(r"id: (\d+)\ndata: (.*)", event).groups()  # type: ignore[union-attr]
        found[int(number)] = json.loads(data)
    assert found == {number: {"model": "m:1", "outputs": {"y": [[2.0 * number, 1.0]]}} for number in range(100)}
    assert max(lab.nodes["a"].batches) > 1  # rows that wait leave together

    lab.nodes["a"].failing = ErrorInfo(code="invalid_request", message="not this row")
    async with session.post(f"{base}/models/m/infer", json=[[1, 2]], headers=headers) as response:
        assert await response.text() == 'event: error\nid: 0\ndata: {"error":"not this row"}\n\n'


async def test_a_client_that_leaves_ends_its_stream(lab: Lab, http: Http) -> None:
    base, session = http
    node, router = lab.nodes["a"], lab.inference.router("m")
    node.mute = True
    headers = {"Accept": "text/event-stream"}
    response = await session.post(f"{base}/models/m/infer", json=[[1, 2]] * 500, headers=headers)
    await eventually(lambda: len(router.queue) + router.in_flight == 32)
    assert len(router.queue) + router.in_flight == 32  # others have room
    response.close()
    await eventually(lambda: not router.queue)
    assert lab.inference.metrics.answers["m:1", "cancelled"] == 32
