"""The gateway over a real socket, in front of Serving with scripted nodes."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from coordinator.gateway import routes as gateway
from coordinator.gateway.problems import BODY_LIMIT_BYTES
from coordinator.serving.inference import INPUT_LIMIT_BYTES
from potluck.errors import Unavailable
from potluck.http import serve_http
from potluck.messages import BlobRef, ErrorInfo
from support.eventually import eventually
from support.serving_lab import Lab, question


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as opened:
        yield opened


@pytest.fixture
async def lab(tmp_path: Path, stack: AsyncExitStack) -> Lab:
    made = Lab(tmp_path)
    await made.open(stack)
    return made


@pytest.fixture
async def http(lab: Lab, stack: AsyncExitStack) -> tuple[str, aiohttp.ClientSession]:
    await lab.join(stack, "a")
    lab.add_model()
    await lab.deploy("m", 1)
    sock = socket.create_server(("127.0.0.1", 0))
    found = gateway.routes(lab.serving, lab.inference, lab.registry, lab.membership, lab.settings, lab.bus)
    await stack.enter_async_context(serve_http(sock, found, BODY_LIMIT_BYTES))
    session = await stack.enter_async_context(aiohttp.ClientSession())
    return f"http://127.0.0.1:{sock.getsockname()[1]}", session


Http = tuple[str, aiohttp.ClientSession]
GOOD = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}


async def test_open_inference_protocol(http: Http) -> None:
    base, session = http
    for path, wanted in (
        ("/v2", {"name": "potluck", "extensions": ["binary_tensor_data"]}),
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
        ("/v2/models/m/ready", {"name": "m", "ready": True}),
        ("/v2/models/m/versions/1/ready", {"ready": True}),
        (
            "/v2/models/m",
            {"name": "m", "versions": ["1"], "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]},
        ),
    ):
        async with session.get(base + path) as response:
            assert response.status == 200, path
            said = await response.json()
        assert {key: said[key] for key in wanted} == wanted
    for path in ("/v2/models/m/infer", "/v2/models/m/versions/1/infer"):
        async with session.post(base + path, json=GOOD | {"id": "7", "outputs": [{"name": "y"}]}) as response:
            assert response.status == 200
            assert await response.json() == {
                "id": "7", "model_name": "m", "model_version": "1",
                "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [2.0, 4.0]}],
            }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/v2/models/none/infer", json.dumps(GOOD), 404, "none"),
        ("/v2/models/m/versions/9/infer", json.dumps(GOOD), 404, "9"),
        ("/v2/models/m/infer", "{", 400, "not an inference request"),
        ("/v2/models/m/infer", "[]", 400, "not an inference request"),
        ("/v2/models/m/infer", json.dumps({"inputs": []}), 400, "input"),
        ("/v2/models/m/infer", json.dumps({"inputs": [{"name": "x"}]}), 400, "shape"),
        ("/v2/models/m/infer", json.dumps({"inputs": [GOOD["inputs"][0] | {"shape": [1, 3]}]}), 400, "3 values"),
        ("/v2/models/m/infer", json.dumps({"inputs": [GOOD["inputs"][0] | {"datatype": "FP31"}]}), 400, "FP31"),
        ("/v2/models/m/infer", json.dumps({"inputs": [GOOD["inputs"][0] | {"data": ["a", "b"]}]}), 400, "FP32"),
        ("/v2/models/m/infer", json.dumps(GOOD | {"outputs": [{"name": "z"}]}), 400, "outputs are y"),
        ("/v2/models/m/infer", json.dumps(GOOD | {"outputs": [{"name": ["y"]}]}), 400, "outputs[0].name"),
        ("/v2/models/m/infer", json.dumps(GOOD | {"outputs": [{}]}), 400, "outputs[0]"),
        ("/v2/models/m/infer", json.dumps({"inputs": [GOOD["inputs"][0] | {"shape": [-1, -2]}]}), 400, "shape"),
        ("/v2/models/m/infer", json.dumps({"inputs": [GOOD["inputs"][0] | {"shape": [2**60, 0]}]}), 400, "shape"),
        ("/v2/models/m/infer", json.dumps({"inputs": [GOOD["inputs"][0] | {"shape": [1] * 99}]}), 400, "shape"),
        ("/v2/models/m/infer", json.dumps({"inputs": [GOOD["inputs"][0] | {"data": 5}]}), 400, "data"),
        ("/v2/models/m/infer", json.dumps({"inputs": [GOOD["inputs"][0] | {"datatype": "BYTES"}]}), 400, "strings"),
        (
            "/v2/models/m/infer",
            json.dumps({"inputs": [GOOD["inputs"][0] | {"shape": [1, 70000], "data": [0] * 70000}]}),
            413,
            "fewer rows",
        ),
        ("/v2/models/m/infer", '{"inputs": ' + "[" * 100_000, 400, "not an inference request"),
        ("/v2/models/m/infer", "\x00\x01", 400, "not an inference request"),
        ("/v2/models/m/infer", json.dumps({"inputs": [GOOD["inputs"][0] | {"name": "\ud800"}]}), 400, "surrogate"),
        (
            "/v2/models/m/infer",
            '{"inputs": [{"name": "x", "datatype": "BYTES", "shape": [1], "data": ["\\uDFFF"]}]}',
            400,
            "surrogate",
        ),
        (
            "/v2/models/m/infer",
            json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2]}]}),
            400,
            "data",
        ),
        ("/v2/models/m/infer", json.dumps(GOOD | {"parameters": {"binary_data_output": 1}}), 400, "binary_data_output"),
        ("/v2/models/m:1/versions/1/infer", json.dumps(GOOD), 404, "no version"),
        ("/v2/models/m/infer", "x" * (BODY_LIMIT_BYTES + 1), 413, "body"),
    ],
)
async def test_what_is_wrong_has_its_status_and_is_named(
    http: Http, path: str, body: str, status: int, said: str
) -> None:
    base, session = http
    async with session.post(base + path, data=io.BytesIO(body.encode())) as response:
        assert response.status == status
        assert said in (await response.json())["error"]


async def test_overload_says_when_to_come_back(lab: Lab, http: Http) -> None:
    base, session = http
    lab.nodes["a"].mute = True
    asked = [
        asyncio.create_task(lab.inference.infer("m", question(1, 1).inputs, 30))
        for _ in range(lab.settings.queue_limit + 2)
    ]
    await eventually(lambda: len(lab.inference.router("m:1").queue) == lab.settings.queue_limit)
    async with session.post(f"{base}/v2/models/m/infer", json=GOOD) as response:
        assert response.status == 429
        assert int(response.headers["Retry-After"]) >= 1
    await lab.serving.undeploy("m")
    assert all(isinstance(error, Unavailable) for error in await asyncio.gather(*asked, return_exceptions=True))


async def test_metrics_are_prometheus_text(http: Http) -> None:
    base, session = http
    async with session.post(f"{base}/v2/models/m/infer", json=GOOD) as response:
        assert response.status == 200
    async with session.get(f"{base}/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        lines = (await response.text()).splitlines()
    assert 'potluck_requests_total{model="m:1",code="ok"} 1' in lines
    assert 'potluck_nodes{state="online"} 1' in lines
    assert 'potluck_request_seconds_count{model="m:1"} 1' in lines
    for line in lines:
        if not line.startswith("#"):
            float(line.rsplit(" ", 1)[1])


async def test_an_answer_that_is_a_blob_is_too_large_here(lab: Lab, http: Http) -> None:
    base, session = http
    lab.nodes["a"].bulky = True
    async with session.post(f"{base}/v2/models/m/infer", json=GOOD) as response:
        assert response.status == 413
        assert "send fewer rows" in (await response.json())["error"]


async def test_what_goes_wrong_at_a_replica_has_its_status(lab: Lab, http: Http) -> None:
    base, session = http
    for code, retryable, status in (
        ("invalid_request", False, 400), ("invalid_model", False, 400), ("conflict", False, 409), ("engine_failed", True, 503),
        ("internal", False, 500), ("internal", True, 503), ("of_a_later_version", False, 500), ("disk_full", True, 503),
    ):  # fmt: skip
        lab.nodes["a"].failing = ErrorInfo(code=code, message="what the node said", retryable=retryable)
        async with session.post(f"{base}/v2/models/m/infer", json=GOOD) as response:
            assert response.status == status
            assert "what the node said" in (await response.json())["error"]


async def test_a_model_that_is_not_ready_or_not_deployed(lab: Lab, http: Http) -> None:
    base, session = http
    lab.leave("a")
    async with session.get(f"{base}/v2/models/m/ready") as response:
        assert response.status == 503
        assert await response.json() == {"name": "m", "ready": False, "error": "no replica of m is ready"}
    await lab.serving.undeploy("m")
    async with session.get(f"{base}/v2/models/m/ready") as response:
        assert response.status == 404
        assert "potluck deploy m" in (await response.json())["error"]
    async with session.get(f"{base}/v2/models/m") as response:
        assert response.status == 200  # it is registered, and described
    async with session.get(f"{base}/v2/models/m/infer") as response:
        assert response.status == 405


async def test_who_goes_away_leaves_nothing(lab: Lab, http: Http) -> None:
    base, session = http
    lab.nodes["a"].mute = True
    with pytest.raises(TimeoutError):
        await session.post(f"{base}/v2/models/m/infer", json=GOOD, timeout=aiohttp.ClientTimeout(total=0.2))
    lab.nodes["a"].mute = False
    async with session.post(f"{base}/v2/models/m/versions/1/infer", json=GOOD) as response:
        assert response.status == 200


async def readiness(http: Http, path: str = "/v2/health/ready") -> tuple[int, str]:
    base, session = http
    async with session.get(base + path) as response:
        said = await response.json()
        assert said["ready"] is (response.status == 200)
        return response.status, said.get("error", "")


async def test_the_server_is_ready_when_all_that_is_deployed_is(lab: Lab, stack: AsyncExitStack, http: Http) -> None:
    assert await readiness(http) == (200, "")
    node = await lab.join(stack, "b")
    node.slow_to_load = True
    lab.registry.add_model("other", BlobRef(sha256="9" * 64, size=1), now=1.0)
    loading = asyncio.create_task(lab.deploy("other", 1))
    await eventually(lambda: len(lab.serving.deployments()) == 2)
    assert await readiness(http) == (503, "no replica is ready of other")
    assert (await readiness(http, "/v2/models/m/ready"))[0] == 200
    node.slow_to_load = False
    await loading
    assert await readiness(http) == (200, "")
    await lab.serving.undeploy("m")
    await lab.serving.undeploy("other")
    assert await readiness(http) == (503, "no model is deployed")


async def test_a_new_version_that_still_loads_takes_nothing_away(lab: Lab, stack: AsyncExitStack, http: Http) -> None:
    node = await lab.join(stack, "b")
    node.slow_to_load = True
    lab.add_model(2)
    loading = asyncio.create_task(lab.deploy("m", 1))
    await eventually(lambda: len(lab.serving.deployments()) == 2)
    assert await readiness(http) == (200, "")
    assert (await readiness(http, "/v2/models/m/versions/2/ready"))[0] == 503
    node.slow_to_load = False
    await loading


async def test_nothing_is_ready_without_the_bus(lab: Lab, http: Http) -> None:
    lab.broker.stop()
    for path in ("/v2/health/ready", "/v2/models/m/ready"):
        status, said = await readiness(http, path)
        assert status == 503
        assert "bus" in said
    base, session = http
    async with session.get(f"{base}/v2/health/live") as response:
        assert response.status == 200
    lab.broker.start()
    await lab.bus.connected(5)
    assert await readiness(http) == (200, "")


async def test_the_protocol_document_names_routes_and_limits(lab: Lab) -> None:
    text = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")
    for route in gateway.routes(lab.serving, lab.inference, lab.registry, lab.membership, lab.settings):
        path = route.path.replace("{model}", "<name>").replace("/versions/{version}", "")
        assert f"`{route.method} {path}`" in text
    for limit in (BODY_LIMIT_BYTES, INPUT_LIMIT_BYTES):
        assert f"{limit:,} bytes" in text
    assert "`/versions/<version>`" in text


# --- the binary tensor extension --------------------------------------------------------------------------------------


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


async def test_texts_as_bytes_have_their_lengths_before_them(http: Http) -> None:
    base, session = http
    tail = b"".join(struct.pack("<I", len(text)) + text for text in ("ä".encode(), b""))
    request = {"inputs": [binary_input(len(tail), "BYTES")], "parameters": {"binary_data_output": True}}
    body, headers = with_tail(request, tail)
    async with session.post(f"{base}/v2/models/m/infer", data=body, headers=headers) as response:
        assert response.status == 200
        said = (await response.read())[int(response.headers["Inference-Header-Content-Length"]) :]
    assert said == struct.pack("<I", 4) + "ää".encode() + struct.pack("<I", 0)  # the node doubles what it gets


@pytest.mark.parametrize(
    ("request_", "tail", "said"),
    [
        ({"inputs": [binary_input(8)]}, b"1234567", "7 bytes are left"),
        ({"inputs": [binary_input(8)]}, b"123456789", "1 bytes behind the JSON"),
        ({"inputs": [binary_input(4)]}, b"1234", "8 bytes, but data has 4"),
        ({"inputs": [binary_input(-1)]}, b"", "binary_data_size is -1"),
        ({"inputs": [binary_input("8")]}, b"12345678", "binary_data_size is '8'"),
        ({"inputs": [binary_input(True)]}, b"1", "binary_data_size is True"),
        ({"inputs": [binary_input(8, data=[1, 2])]}, b"12345678", "either data or"),
        ({"inputs": [binary_input(8, "FP31")]}, b"12345678", "FP31"),
        ({"inputs": [binary_input(8, "BYTES")]}, struct.pack("<I", 5) + b"1234", "ends behind"),
        ({"inputs": [binary_input(5, "BYTES")]}, struct.pack("<I", 1) + b"\xff", "UTF-8"),
        (
            {"inputs": [binary_input(8)], "outputs": [{"name": "y", "parameters": {"binary_data": 1}}]},
            b"12345678",
            "true",
        ),
    ],
)
async def test_bytes_that_do_not_fit_are_named(http: Http, request_: dict[str, Any], tail: bytes, said: str) -> None:
    base, session = http
    body, headers = with_tail(request_, tail)
    async with session.post(f"{base}/v2/models/m/infer", data=body, headers=headers) as response:
        assert response.status == 400
        assert said in (await response.json())["error"]


@pytest.mark.parametrize("length", ["", "x", "-1", "1e3", "99999", "9" * 5000])
async def test_a_length_that_cannot_be_is_refused(http: Http, length: str) -> None:
    base, session = http
    headers = {"Inference-Header-Content-Length": length}
    async with session.post(f"{base}/v2/models/m/infer", json=GOOD, headers=headers) as response:
        assert response.status == 400
        assert "Inference-Header-Content-Length" in (await response.json())["error"]
