"""The binary tensor extension of the Open Inference Protocol."""

from __future__ import annotations

import json
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from potluck.wire.values import Signature, TensorSpec

Deploy = Callable[..., Awaitable[None]]
Http = tuple[str, aiohttp.ClientSession]
GOOD = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}


def with_tail(request: dict[str, Any], tail: bytes) -> tuple[bytes, dict[str, str]]:
    """(body, headers)"""
    head = json.dumps(request).encode()
    return head + tail, {"Inference-Header-Content-Length": str(len(head))}


def binary_input(
    size: object, datatype: str = "FP32", shape: tuple[int, ...] = (1, 2), **more: object
) -> dict[str, Any]:
    return {"name": "x", "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": size}, **more}


@pytest.mark.parametrize(
    ("asked", "binary"),
    [
        ({}, False),
        ({"parameters": {"binary_data_output": True}}, True),
        ({"outputs": [{"name": "y", "parameters": {"binary_data": True}}]}, True),
        (
            {
                "parameters": {"binary_data_output": True},
                "outputs": [{"name": "y", "parameters": {"binary_data": False}}],
            },
            False,
        ),
    ],
)
async def test_tensors_travel_as_bytes(http: Http, asked: dict[str, Any], binary: bool) -> None:
    base, session = http
    for body, headers in (
        with_tail({"inputs": [binary_input(8)], "id": "7", **asked}, struct.pack("<2f", 1, 2)),
        (json.dumps(GOOD | {"id": "7"} | asked).encode(), {}),
    ):
        async with session.post(f"{base}/v2/models/m/infer", data=body, headers=headers) as response:
            assert response.status == 200
            said = await response.read()
            length = int(response.headers.get("Inference-Header-Content-Length", len(said)))
            assert response.content_type == ("application/octet-stream" if binary else "application/json")
        told = json.loads(said[:length])
        assert (told["id"], told["model_name"]) == ("7", "m")
        (output,) = told["outputs"]
        if binary:
            assert output == {"name": "y", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}
            assert struct.unpack("<2f", said[length:]) == (2, 4)
        else:
            assert output == {"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [2, 4]}


TEXTS = Signature(
    inputs=(TensorSpec(name="x", datatype="BYTES", shape=(-1, 2)),),
    outputs=(TensorSpec(name="y", datatype="BYTES", shape=(-1, 2)),),
)


async def test_texts_as_bytes_have_their_lengths_before_them(http: Http, deploy: Deploy) -> None:
    base, session = http
    await deploy("texts", TEXTS)
    tail = b"".join(struct.pack("<I", len(text)) + text for text in ("ä".encode(), b""))
    request = {"inputs": [binary_input(len(tail), "BYTES")], "parameters": {"binary_data_output": True}}
    body, headers = with_tail(request, tail)
    async with session.post(f"{base}/v2/models/texts/infer", data=body, headers=headers) as response:
        assert response.status == 200
        said = (await response.read())[int(response.headers["Inference-Header-Content-Length"]) :]
    assert said == struct.pack("<I", 4) + "ää".encode() + struct.pack("<I", 0)  # the node doubles what it gets


WRONG: list[Any] = [
    ({"inputs": [binary_input(8)]}, b"1234567", "7 bytes are left"),
    ({"inputs": [binary_input(8)]}, b"123456789", "1 byte after the JSON"),
    ({"inputs": [binary_input(4)]}, b"1234", "8 bytes, but data has 4"),
    ({"inputs": [binary_input(-1)]}, b"", "binary_data_size is -1"),
    ({"inputs": [binary_input("8")]}, b"12345678", "binary_data_size is '8'"),
    ({"inputs": [binary_input(True)]}, b"1", "binary_data_size is True"),
    ({"inputs": [binary_input(8, data=[1, 2])]}, b"12345678", "either data or"),
    ({"inputs": [binary_input(8, "FP31")]}, b"12345678", "FP31"),
    ({"inputs": [binary_input(8, "BYTES")]}, struct.pack("<I", 5) + b"1234", "goes beyond"),
    (
        {"inputs": [binary_input(8)], "outputs": [{"name": "y", "parameters": {"binary_data": 1}}]},
        b"12345678",
        "true",
    ),
]


async def test_bytes_that_do_not_fit_are_named(http: Http) -> None:
    base, session = http
    for request, tail, said in WRONG:
        body, headers = with_tail(request, tail)
        async with session.post(f"{base}/v2/models/m/infer", data=body, headers=headers) as response:
            assert said in (await response.json()).get("error", ""), request
            assert response.status == 400, request


async def test_a_length_that_cannot_be_is_refused(http: Http) -> None:
    base, session = http
    for length in ["", "x", "-1", "1e3", "99999", "9" * 5000]:
        headers = {"Inference-Header-Content-Length": length}
        async with session.post(f"{base}/v2/models/m/infer", json=GOOD, headers=headers) as response:
            assert response.status == 400
            assert "Inference-Header-Content-Length" in (await response.json())["error"]
