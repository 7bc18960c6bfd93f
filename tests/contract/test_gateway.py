"""The gateway over a real socket, in front of Serving with scripted nodes."""

from __future__ import annotations

import asyncio
import io
import json
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import pytest

from coordinator.gateway import routes as gateway
from potluck.errors import Unavailable
from potluck.http import serve_http
from potluck.messages import ErrorInfo
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
    await lab.serving.deploy("m", 1)
    sock = socket.create_server(("127.0.0.1", 0))
    found = gateway.routes(lab.serving, lab.inference, lab.registry, lab.membership, lab.settings)
    await stack.enter_async_context(serve_http(sock, found, gateway.BODY_LIMIT_BYTES))
    session = await stack.enter_async_context(aiohttp.ClientSession())
    return f"http://127.0.0.1:{sock.getsockname()[1]}", session


Http = tuple[str, aiohttp.ClientSession]
GOOD = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}


async def test_open_inference_protocol(http: Http) -> None:
    base, session = http
    for path, wanted in (
        ("/v2", {"name": "potluck"}),
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
        ("/v2/models/m:1/versions/1/infer", json.dumps(GOOD), 404, "no version"),
        ("/v2/models/m/infer", "x" * (gateway.BODY_LIMIT_BYTES + 1), 413, "body"),
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
    for code, status in (("invalid_request", 400), ("invalid_model", 400), ("engine_failed", 503)):
        lab.nodes["a"].failing = ErrorInfo(code=code, message="what the node said", retryable=status == 503)
        async with session.post(f"{base}/v2/models/m/infer", json=GOOD) as response:
            assert response.status == status
            assert "what the node said" in (await response.json())["error"]


async def test_a_model_that_is_not_ready_or_not_deployed(lab: Lab, http: Http) -> None:
    base, session = http
    lab.leave("a")
    async with session.get(f"{base}/v2/models/m/ready") as response:
        assert response.status == 503
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
