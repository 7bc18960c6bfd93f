"""The Open Inference Protocol: health, metadata, inference, and the status and words of each error."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import platform
import time
import zlib
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest

from potluck import __version__
from potluck.errors import Unavailable
from potluck.wire.births import NodeStatus
from potluck.wire.values import BlobRef, ErrorInfo, ModelFormat, Signature, TensorSpec
from support.eventually import eventually
from support.serving_lab import Lab, question

Deploy = Callable[..., Awaitable[None]]
Http = tuple[str, aiohttp.ClientSession]
GOOD = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}


async def test_open_inference_protocol(http: Http) -> None:
    base, session = http
    for path, wanted in (
        ("/v2", {"name": "potluck", "version": __version__}),
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


WRONG: list[Any] = [
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
    (
        "/v2/models/m/infer",
        json.dumps({"inputs": [GOOD["inputs"][0] | {"name": "z"}]}),
        400,
        "has the inputs x, but the request has z",
    ),
    (
        "/v2/models/m/infer",
        json.dumps({"inputs": GOOD["inputs"] * 2}),
        400,
        "has the inputs x, but the request has x, x",
    ),
    (
        "/v2/models/m/infer",
        json.dumps({"inputs": [GOOD["inputs"][0] | {"datatype": "FP64"}]}),
        400,
        "is FP32, but the request has FP64",
    ),
    ("/v2/models/m/infer", json.dumps(GOOD | {"parameters": {"timeout": 1.5}}), 400, "timeout is 1.5"),
    ("/v2/models/m/infer", json.dumps(GOOD | {"parameters": {"timeout": -1}}), 400, "timeout is -1"),
    ("/v2/models/m/infer", json.dumps(GOOD | {"parameters": {"priority": -1}}), 400, "priority is -1"),
    (
        "/v2/models/m/infer",
        json.dumps(GOOD | {"outputs": [{"name": "y", "parameters": {"classification": "2"}}]}),
        400,
        "classification is '2'",
    ),
    ("/v2/models/m:1/versions/1/infer", json.dumps(GOOD), 404, "no version"),
    ("/v2/models/m/infer", "x" * (4 * 2**20 + 1), 413, "over 4194304 bytes"),
]


async def test_each_error_has_its_status_and_names_the_fault(http: Http) -> None:
    base, session = http
    for path, body, status, said in WRONG:
        async with session.post(base + path, data=io.BytesIO(body.encode())) as response:
            assert said in (await response.json()).get("error", ""), (path, body[:200])
            assert response.status == status, (path, body[:200])


TEXTS = Signature(
    inputs=(TensorSpec(name="x", datatype="BYTES", shape=(-1, 1)),),
    outputs=(TensorSpec(name="y", datatype="BYTES", shape=(-1, 1)),),
)


async def test_data_may_be_nested_as_their_shape_is(http: Http, deploy: Deploy) -> None:
    base, session = http
    await deploy("texts", TEXTS)

    async def asked(model: str, datatype: str, shape: list[int], data: Any) -> tuple[int, dict[str, Any]]:
        body = {"inputs": [{"name": "x", "datatype": datatype, "shape": shape, "data": data}]}
        async with session.post(f"{base}/v2/models/{model}/infer", json=body) as response:
            return response.status, await response.json()

    for texts in (["a", "b"], [["a"], ["b"]], [[["a"]], [["b"]]], ["a", ["b"]]):
        status, said = await asked("texts", "BYTES", [2, 1], texts)
        assert (status, said["outputs"][0]["data"]) == (200, ["aa", "bb"]), texts  # the node doubles what it gets
    for numbers in ([1, 2, 3, 4], [[1, 2], [3, 4]], [[1], [2], [3], [4]]):
        status, said = await asked("m", "FP32", [2, 2], numbers)
        assert (status, said["outputs"][0]["data"]) == (200, [2, 4, 6, 8]), numbers
    for model, datatype, data, reason in (
        ("texts", "BYTES", ["a"], "needs 2 values, but data has 1"),
        ("texts", "BYTES", [["a"], ["b", "c"]], "needs 2 values, but data has 3"),
        ("texts", "BYTES", [], "needs 2 values, but data has 0"),
        ("texts", "BYTES", [["a"], [1]], "a list of strings"),
        ("texts", "BYTES", [["a"], [None]], "a list of strings"),
        ("texts", "BYTES", [["a"], {"b64": "YQ=="}], "a list of strings"),
        ("texts", "BYTES", [["a"], ["\ud800"]], "surrogate"),
        ("m", "FP32", [[1], [2, 3]], "does not fit FP32"),
        ("m", "FP32", [[1], ["2"]], "does not fit FP32"),
        ("m", "FP32", [[1], {"a": 2}], "does not fit FP32"),
        ("m", "FP32", [[[1, 2, 3]]], "needs 2 values, but data has 3"),
    ):
        status, said = await asked(model, datatype, [2, 1], data)
        assert reason in said.get("error", ""), (data, said)
        assert status == 400, data


async def test_json_that_is_not_utf8_is_refused(http: Http) -> None:
    base, session = http
    for path in ("/v2/models/m/infer", "/v1/models/m:predict", "/models/m/infer"):
        async with session.post(base + path, data=b'{"inputs": [{"name": "\xff"}], "instances": ["\xff"]}') as response:
            assert "utf-8" in (await response.json())["error"]
            assert response.status == 400


async def test_a_request_that_is_not_http_is_one_line_in_the_log(http: Http, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "aiohttp.server")
    reader, writer = await asyncio.open_connection(*http[0].removeprefix("http://").split(":"))
    writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n")
    assert b" 400 " in await reader.readline()
    writer.close()
    [record] = [record for record in caplog.records if record.name == "aiohttp.server"]
    assert (record.levelname, record.exc_info) == ("INFO", None)
    assert record.getMessage().startswith('request is not HTTP reason="Invalid character in Content-Length')


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


async def test_metrics_are_prometheus_text(lab: Lab, http: Http) -> None:
    base, session = http
    software = {"potluck": "1.2", "tensorflow": '2."x', 'odd"} 1': "3"}
    lab.membership.on_status(NodeStatus(node_id="a", session="1", state="online", software=software), 0.0)
    async with session.post(f"{base}/v2/models/m/infer", json=GOOD) as response:
        assert response.status == 200
    async with session.get(f"{base}/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        lines = (await response.text()).splitlines()
    assert 'potluck_requests_total{model="m:1",code="ok"} 1' in lines
    assert 'potluck_nodes{state="online"} 1' in lines
    assert f'potluck_build_info{{potluck="{__version__}",python="{platform.python_version()}"}} 1' in lines
    assert 'potluck_node_info{node="a",potluck="1.2",tensorflow="2.\\"x"} 1' in lines, "what is no label is left out"
    assert 'potluck_traffic_percent{model="m:1",role="stable"} 100' in lines
    assert 'potluck_replica_bytes{model="m:1"} 0' in lines  # the node did not say
    assert 'potluck_request_seconds_count{model="m:1"} 1' in lines
    for line in lines:
        if not line.startswith("#"):
            float(line.rsplit(" ", 1)[1])


async def test_an_error_of_a_replica_has_its_status(lab: Lab, http: Http) -> None:
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


async def test_a_client_that_goes_away_leaves_nothing(lab: Lab, http: Http) -> None:
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


async def test_the_server_is_ready_when_all_deployments_are(lab: Lab, stack: AsyncExitStack, http: Http) -> None:
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


async def test_the_server_stays_ready_while_a_new_version_loads(lab: Lab, stack: AsyncExitStack, http: Http) -> None:
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
        assert "no connection to the broker" in said
    base, session = http
    async with session.get(f"{base}/v2/health/live") as response:
        assert response.status == 200
    lab.broker.start()
    await lab.bus.connected(5)
    assert await readiness(http) == (200, "")


async def test_unknown_paths_and_methods_are_answered_in_json(http: Http) -> None:
    base, session = http
    async with session.get(f"{base}/v2/modules/m") as response:
        assert response.status == 404
        assert "/v2/modules/m" in (await response.json())["error"]
    async with session.delete(f"{base}/v2/models/m") as response:
        assert response.status == 405
        assert response.headers["Allow"] == "GET,HEAD"
        assert "GET" in (await response.json())["error"]


async def test_the_index_says_what_can_answer(lab: Lab, http: Http) -> None:
    base, session = http
    lab.add_model(2)
    first = {"name": "m", "version": "1", "state": "READY", "reason": ""}
    second = {"name": "m", "version": "2", "state": "UNAVAILABLE", "reason": "not deployed"}
    async with session.post(f"{base}/v2/repository/index") as response:
        assert await response.json() == [first, second]
    async with session.post(f"{base}/v2/repository/index", json={"ready": True}) as response:
        assert await response.json() == [first]
    async with session.post(f"{base}/v2/repository/index", json={"ready": 1}) as response:
        assert response.status == 400
    lab.leave("a")
    async with session.post(f"{base}/v2/repository/index", json={}) as response:
        assert (await response.json())[0] == first | {"state": "LOADING", "reason": "no replica is ready"}


async def test_classification_gives_the_best_with_their_labels(http: Http, deploy: Deploy) -> None:
    base, session = http
    signature = Signature(
        inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 3)),),
        outputs=(TensorSpec(name="y", datatype="FP32", shape=(-1, 3)),),
    )
    await deploy("classes", signature, classes=("cat", "dog", "eel"))
    asked = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 3], "data": [1, 3, 2, 0.25, 0, 0]}],
        "outputs": [{"name": "y", "parameters": {"classification": 2}}],
    }
    async with session.post(f"{base}/v2/models/classes/infer", json=asked) as response:
        (output,) = (await response.json())["outputs"]
    assert output == {
        "name": "y", "datatype": "BYTES", "shape": [2, 2],
        "data": ["6.000000:1:dog", "4.000000:2:eel", "0.500000:0:cat", "0.000000:1:dog"],
    }  # fmt: skip


async def test_one_score_for_two_classes_is_that_of_the_second(http: Http, deploy: Deploy) -> None:
    base, session = http
    signature = Signature(
        inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 1)),),
        outputs=(TensorSpec(name="y", datatype="FP32", shape=(-1, 1)),),
    )
    await deploy("sentiment", signature, classes=("neg", "pos"))
    asked = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 1], "data": [0.375, 0.125]}],
        "outputs": [{"name": "y", "parameters": {"classification": 1}}],
    }
    async with session.post(f"{base}/v2/models/sentiment/infer", json=asked) as response:
        (output,) = (await response.json())["outputs"]
    assert (output["shape"], output["data"]) == ([2, 1], ["0.750000:1:pos", "0.750000:0:neg"])


@pytest.mark.parametrize("model_format", ["keras", "savedmodel", "tflite"])
async def test_the_platform_is_that_of_the_format(lab: Lab, http: Http, model_format: ModelFormat) -> None:
    base, session = http
    lab.add_model(2, format=model_format)
    async with session.get(f"{base}/v2/models/m/versions/2") as response:
        metadata = await response.json()
    platforms = {"keras": "tensorflow_keras", "savedmodel": "tensorflow_savedmodel", "tflite": "litert_tflite"}
    assert metadata["platform"] == platforms[model_format]


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
async def test_bodies_are_compressed_both_ways(http: Http, coding: str) -> None:
    base, session = http
    squeeze = {"gzip": gzip.compress, "deflate": zlib.compress}[coding]
    rows = 400
    asked = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [rows, 2], "data": [1] * 2 * rows}]}
    headers = {"Content-Encoding": coding, "Accept-Encoding": f"br, {coding}"}
    body = squeeze(json.dumps(asked).encode())
    async with session.post(f"{base}/v2/models/m/infer", data=body, headers=headers) as response:
        assert response.status == 200
        assert response.headers["Content-Encoding"] == coding
        assert (await response.json())["outputs"][0]["data"] == [2.0] * 2 * rows
    for refused in ("identity", f"{coding};q=0"):
        headers["Accept-Encoding"] = refused
        async with session.post(f"{base}/v2/models/m/infer", data=body, headers=headers) as response:
            assert "Content-Encoding" not in response.headers
            assert response.status == 200


async def test_compressed_bodies_are_bounded_and_checked(http: Http) -> None:
    base, session = http
    for body, status, said in (
        (gzip.compress(bytes(8 * 2**20)), 413, "over 4194304 bytes"),
        (b"no gzip at all", 400, "the body cannot be read as gzip: Error -3"),
        (gzip.compress(b"{}")[:-3], 400, "its gzip is cut off"),
        (gzip.compress(b"{}") + b"more", 400, "something follows the end of its gzip"),
    ):
        headers = {"Content-Encoding": "gzip"}
        async with session.post(f"{base}/v2/models/m/infer", data=body, headers=headers) as response:
            assert response.status == status
            assert said in (await response.json())["error"]


async def test_an_unknown_coding_is_named(http: Http) -> None:
    base, session = http
    headers = {"Content-Encoding": "br"}
    async with session.post(f"{base}/v2/models/m/infer", data=b"x", headers=headers) as response:
        assert response.status == 400
        assert "'br' is not known" in (await response.json())["error"]


async def test_bodies_held_at_once_have_a_limit(lab: Lab, http: Http) -> None:
    base, session = http
    lab.nodes["a"].mute = True
    body = json.dumps(GOOD).encode() + b" " * 3 * 2**20
    connector = aiohttp.TCPConnector(local_addr=("127.0.0.2", 0))
    held = []
    async with aiohttp.ClientSession(connector=connector) as neighbour:
        for count, one, whose in ((3, session, "bytes of your requests"), (2, neighbour, "bytes of requests")):
            for _ in range(count):
                held.append(asyncio.create_task(one.post(f"{base}/v2/models/m/infer", data=io.BytesIO(body))))
            router = lab.inference.router("m")
            await eventually(lambda router=router: len(router.queue) + router.in_flight == len(held))  # type: ignore[misc]
            async with one.post(f"{base}/v2/models/m/infer", data=io.BytesIO(body)) as response:
                assert response.status == 429
                assert response.headers["Retry-After"] == "1"
                error = (await response.json())["error"]
                assert whose in error
                assert "are already being answered" in error
        await lab.serving.undeploy("m")
        for answer in held:
            assert (await answer).status == 503
    async with session.post(f"{base}/v2/models/m/infer", data=io.BytesIO(body)) as response:
        assert response.status == 404  # there is room again


@pytest.mark.parametrize(
    ("headers", "parameters"),
    [({"Request-Timeout": "0.05"}, {}), ({}, {"timeout": 50_000}), ({"Request-Timeout": "20"}, {"timeout": 50_000})],
)
async def test_the_client_says_how_long_it_waits(
    lab: Lab, http: Http, headers: dict[str, str], parameters: dict[str, int]
) -> None:
    base, session = http
    lab.nodes["a"].mute = True
    asked = GOOD | {"parameters": parameters}
    started = time.monotonic()
    async with session.post(f"{base}/v2/models/m/infer", json=asked, headers=headers) as response:
        assert response.status == 504
        assert "in time" in (await response.json())["error"]
    assert time.monotonic() - started < 5  # of the 30 that are allowed


async def test_an_invalid_timeout_is_refused(http: Http) -> None:
    base, session = http
    for seconds in ["", "soon", "0", "-1", "nan", "inf"]:
        headers = {"Request-Timeout": seconds}
        async with session.post(f"{base}/v2/models/m/infer", json=GOOD, headers=headers) as response:
            assert response.status == 400
            assert "Request-Timeout" in (await response.json())["error"]


async def test_priorities_are_as_triton_counts_them(lab: Lab, http: Http) -> None:
    base, session = http
    lab.nodes["a"].mute = True
    router = lab.inference.router("m")
    asked = [asyncio.create_task(session.post(f"{base}/v2/models/m/infer", json=GOOD)) for _ in range(2)]
    await eventually(lambda: router.in_flight == 2)
    for count, priority in enumerate((0, 1, 11, 99), 1):
        body = GOOD | {"parameters": {"priority": priority}}
        asked.append(asyncio.create_task(session.post(f"{base}/v2/models/m/infer", json=body)))
        await eventually(lambda: len(router.queue) == count)  # noqa: B023 - awaited within the turn
    assert sorted(request.priority for request in router.queue) == [-10, 0, 0, 10]
    for task in asked:
        task.cancel()
    await asyncio.wait(asked)


async def test_requests_of_a_client_that_left_are_not_computed(lab: Lab, http: Http) -> None:
    base, session = http
    node = lab.nodes["a"]
    node.mute = True
    router = lab.inference.router("m")
    asked = [asyncio.create_task(session.post(f"{base}/v2/models/m/infer", json=GOOD)) for _ in range(6)]
    await eventually(lambda: len(router.queue) + router.in_flight == 6)
    waiting = len(router.queue)
    assert waiting
    for task in asked:
        task.cancel()
    await asyncio.wait(asked)
    await eventually(lambda: not router.queue)
    assert lab.inference.metrics.answers["m:1", "cancelled"] == 6
