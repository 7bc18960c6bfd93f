"""Tensors that do not fit into a message travel as blobs, and nothing is left of them."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import struct
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from msgspec.structs import replace

from coordinator.serving.inputs import INPUT_LIMIT_BYTES
from potluck.blobs import server as blob_server
from potluck.blobs.rights import OPEN
from potluck.blobs.store import BlobStore
from potluck.credentials import Credentials
from potluck.net.http import serve_http
from potluck.wire.values import BlobRef, Signature, TensorSpec
from support.eventually import eventually
from support.serving_lab import Lab

Http = tuple[str, aiohttp.ClientSession]
ROWS = INPUT_LIMIT_BYTES // 4
"""Rows of two FP32: twice as many as fit into a message."""


def asked(rows: int, *, as_json: bool = False) -> dict[str, Any]:
    tensor = {"name": "x", "datatype": "FP32", "shape": [rows, 2]}
    data = {"data": [0.5] * 2 * rows} if as_json else {"parameters": {"binary_data_size": 8 * rows}}
    return {"inputs": [tensor | data], "parameters": {"binary_data_output": True}}


async def post(http: Http, rows: int, *, value: float = 0.5, as_json: bool = False) -> tuple[int, bytes]:
    """(status, the bytes after the JSON, or the whole body if there are none)"""
    base, session = http
    head = json.dumps(asked(rows, as_json=as_json)).encode()
    tail = b"" if as_json else np.full(2 * rows, value, np.float32).tobytes()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    async with session.post(f"{base}/v2/models/m/infer", data=io.BytesIO(head + tail), headers=headers) as response:
        said = await response.read()
        return response.status, said[int(response.headers.get("Inference-Header-Content-Length", 0)) :]


@pytest.fixture
async def keep(stack: AsyncExitStack, tmp_path: Path) -> Callable[[bytes], BlobRef]:
    """Puts bytes into the store of a node, which serves them."""
    store = BlobStore(tmp_path / "theirs", 2**30)
    sock = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{sock.getsockname()[1]}"
    await stack.enter_async_context(
        serve_http(sock, blob_server.routes(store, writable=False, max_bytes=0, rights=OPEN), Credentials())
    )
    return lambda data: replace(store.put_bytes(data), holders=(address,))


@pytest.mark.parametrize("as_json", [False, True])
async def test_large_inputs_are_lent_as_blobs(
    lab: Lab, store: BlobStore, http: Http, keep: Callable[[bytes], BlobRef], as_json: bool
) -> None:
    node = lab.nodes["a"]
    node.keep = keep
    node.fetch = lambda ref: store.read(ref.sha256)
    status, said = await post(http, ROWS, as_json=as_json)
    assert status == 200
    assert said == np.ones(2 * ROWS, np.float32).tobytes()
    (sent,) = node.inputs[-1]
    assert isinstance(sent.data, BlobRef)
    assert sent.data.holders == (http[0],)
    assert store.size_bytes == 0  # nothing is left
    status, _ = await post(http, INPUT_LIMIT_BYTES // 8 - 32)
    assert status == 200
    assert isinstance(node.inputs[-1][0].data, bytes)  # this one fits


async def test_requests_may_share_a_blob_and_blobs_of_others_stay(lab: Lab, store: BlobStore, http: Http) -> None:
    node = lab.nodes["a"]
    node.mute = True
    node.fetch = lambda ref: store.read(ref.sha256)
    kept = store.put_bytes(np.full(2 * ROWS, 3.0, np.float32).tobytes())  # somebody else's
    pending = [asyncio.create_task(post(http, ROWS, value=value)) for value in (0.5, 0.5, 3.0)]
    router = lab.inference.router("m")
    await eventually(lambda: len(router.queue) + router.in_flight == 3)
    assert store.size_bytes == 2 * kept.size
    pending[0].cancel()  # its client leaves; the other one still needs the blob
    await eventually(lambda: lab.inference.metrics.answers["m:1", "cancelled"] == 1)
    assert store.size_bytes == 2 * kept.size
    await lab.serving.undeploy("m")
    assert [status for status, _ in await asyncio.gather(*pending[1:])] == [503, 503]
    await eventually(lambda: store.size_bytes == kept.size)
    assert store.has(kept.sha256)


async def test_large_outputs_are_fetched(
    lab: Lab, store: BlobStore, http: Http, keep: Callable[[bytes], BlobRef]
) -> None:
    holders = keep(b"").holders
    lab.nodes["a"].keep = keep
    status, said = await post(http, 2)
    assert status == 200
    assert said == struct.pack("<4f", 1, 1, 1, 1)
    assert store.size_bytes == 0
    lab.nodes["a"].keep = lambda data: BlobRef(sha256="0" * 64, size=2**30, holders=holders)
    status, said = await post(http, 2)
    assert status == 413
    assert b"send fewer rows" in said
    lab.nodes["a"].keep = lambda data: BlobRef(sha256="0" * 64, size=8, holders=holders)
    status, said = await post(http, 2)
    assert status == 503
    assert b"there is no blob" in said or b"404" in said


async def test_large_texts_are_lent_too(lab: Lab, store: BlobStore, http: Http) -> None:
    base, session = http
    node = lab.nodes["a"]
    node.signature = Signature(
        inputs=(TensorSpec(name="x", datatype="BYTES", shape=(-1,)),),
        outputs=(TensorSpec(name="y", datatype="BYTES", shape=(-1,)),),
    )
    lab.registry.add_model("texts", BlobRef(sha256="5" * 64, size=1), now=1.0)
    await lab.deploy("texts", 1)
    node.fetch = lambda ref: store.read(ref.sha256)
    texts = ["ä" * INPUT_LIMIT_BYTES, "", "b"]
    tensor = {"name": "x", "datatype": "BYTES", "shape": [3], "data": texts}
    node.keep = None
    node.mute = True
    body = io.BytesIO(json.dumps({"inputs": [tensor]}).encode())
    task = asyncio.create_task(session.post(f"{base}/v2/models/texts/infer", data=body))
    router = lab.inference.router("texts")
    await eventually(lambda: router.in_flight == 1)
    ((request,),) = [batch.requests for lane in router.lanes.values() for batch in lane.batches.values()]
    (sent,) = request.inputs
    assert isinstance(sent.data, BlobRef)
    assert store.read(sent.data.sha256).startswith(struct.pack("<I", 2 * INPUT_LIMIT_BYTES) + "ä".encode())
    task.cancel()
