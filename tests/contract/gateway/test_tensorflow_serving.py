"""TensorFlow Serving's REST API: rows, columns, examples, status, metadata, versions, labels, and its words for each error."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from potluck.errors import Unavailable
from potluck.wire.values import Signature, TensorSpec
from support.eventually import eventually
from support.serving_lab import Lab, question

Deploy = Callable[..., Awaitable[None]]
Http = tuple[str, aiohttp.ClientSession]
TWO = Signature(
    inputs=(
        TensorSpec(name="a", datatype="FP32", shape=(-1, 2)),
        TensorSpec(name="b", datatype="INT32", shape=(-1,)),
    ),
    outputs=(
        TensorSpec(name="s", datatype="FP32", shape=(-1, 2)),
        TensorSpec(name="t", datatype="FP32", shape=(-1, 2)),
    ),
)
TEXTS = Signature(
    inputs=(TensorSpec(name="x", datatype="BYTES", shape=(-1,)),),
    outputs=(TensorSpec(name="y_bytes", datatype="BYTES", shape=(-1,)),),
)
COLUMN = Signature(
    inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 1)),),
    outputs=(TensorSpec(name="y", datatype="FP32", shape=(-1, 1)),),
)
IMAGES = Signature(
    inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 1, 3)),),
    outputs=(TensorSpec(name="y", datatype="FP32", shape=(-1, 1, 3)),),
)


async def ask(http: Http, path: str, body: object) -> tuple[int, Any]:
    base, session = http
    data = body if isinstance(body, str) else json.dumps(body)
    async with session.post(f"{base}/v1/models/{path}", data=data) as response:
        assert response.content_type == "application/json"
        return response.status, json.loads(await response.text())


@pytest.mark.parametrize("path", ["m:predict", "m/versions/1:predict", "m/labels/prod:predict"])
async def test_rows_and_columns(lab: Lab, http: Http, path: str) -> None:
    lab.registry.set_alias("m:1", "prod")
    for asked, wanted in (
        ({"instances": [[1, 2.5], [3, 4]]}, {"predictions": [[2.0, 5.0], [6.0, 8.0]]}),
        ({"instances": [{"x": [1, 2]}]}, {"predictions": [[2.0, 4.0]]}),
        ({"inputs": [[1, 2]]}, {"outputs": [[2.0, 4.0]]}),
        ({"inputs": {"x": [[1, 2]]}, "signature_name": "serving_default"}, {"outputs": [[2.0, 4.0]]}),
    ):
        assert await ask(http, path, asked) == (200, wanted)


async def test_several_inputs_and_outputs(http: Http, deploy: Deploy) -> None:
    await deploy("two", TWO)
    rows = [{"a": [1, 2], "b": 7}, {"a": [3, 4], "b": 8}]
    wanted = [{"s": [2.0, 4.0], "t": [2.0, 4.0]}, {"s": [6.0, 8.0], "t": [6.0, 8.0]}]
    assert await ask(http, "two:predict", {"instances": rows}) == (200, {"predictions": wanted})
    columns = {"a": [[1, 2]], "b": [7]}
    said = {"outputs": {"s": [[2.0, 4.0]], "t": [[2.0, 4.0]]}}
    assert await ask(http, "two:predict", {"inputs": columns}) == (200, said)


async def test_numbers_that_json_does_not_have(http: Http) -> None:
    status, said = await ask(http, "m:predict", '{"instances": [[NaN, -Infinity]]}')
    assert status == 200
    assert str(said) == "{'predictions': [[nan, -inf]]}"


async def test_texts_and_bytes(http: Http, deploy: Deploy) -> None:
    await deploy("texts", TEXTS)
    for asked in ({"instances": ["ab", "c"]}, {"instances": [{"b64": "YWI="}, {"b64": "Yw=="}]}):
        assert await ask(http, "texts:predict", asked) == (200, {"predictions": [{"b64": "YWJhYg=="}, {"b64": "Y2M="}]})
    asked = {"inputs": [{"b64": "/w=="}]}  # no text in UTF-8
    assert await ask(http, "texts:predict", asked) == (200, {"outputs": [{"b64": "//8="}]})


async def test_classify_and_regress(http: Http, deploy: Deploy) -> None:
    for signature in ("", "serving_default", "tensorflow/serving/classify"):
        asked: dict[str, object] = {"examples": [{"x": [1, 2]}, {"x": [3.5, 4]}], "signature_name": signature}
        assert await ask(http, "m:classify", asked) == (
            200, {"results": [[["", 2.0], ["", 4.0]], [["", 7.0], ["", 8.0]]]},
        )  # fmt: skip
    await deploy("column", COLUMN)
    asked = {"examples": [{"x": 1.5}, {"x": [2]}, {}], "context": {"x": 5}}
    assert await ask(http, "column:regress", asked) == (200, {"results": [3.0, 4.0, 10.0]})
    await deploy("labelled", COLUMN, classes=("only",))
    assert await ask(http, "labelled:classify", {"examples": [{"x": 1}]}) == (200, {"results": [[["only", 2.0]]]})
    await deploy("second", COLUMN, classes=("no", "yes"))  # one score, of the second class
    asked = {"examples": [{"x": 0.375}]}
    assert await ask(http, "second:classify", asked) == (200, {"results": [[["no", 0.25], ["yes", 0.75]]]})
    await deploy("images", IMAGES)
    status, said = await ask(http, "images:regress", {"examples": [{"x": [1, 2, 3]}]})
    assert status == 400
    assert "Expected Tensor shape: [?] or [?, 1]" in said["error"]
    status, said = await ask(http, "images:predict", {"instances": [[[1, 2, 3]]]})
    assert (status, said) == (200, {"predictions": [[[2.0, 4.0, 6.0]]]})


async def test_status_and_metadata(lab: Lab, http: Http) -> None:
    base, session = http
    lab.registry.set_alias("m:1", "prod")
    available = {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    for path in ("m", "m/versions/1", "m/labels/prod"):
        async with session.get(f"{base}/v1/models/{path}") as response:
            said = await response.json()
        assert said == {"model_version_status": [available], "name": "m", "ready": True}
        async with session.get(f"{base}/v1/models/{path}/metadata") as response:
            said = await response.json()
        assert said["model_spec"] == {"name": "m", "signature_name": "", "version": "1"}
        definition = said["metadata"]["signature_def"]["signature_def"]["serving_default"]
        assert definition["method_name"] == "tensorflow/serving/predict"
        assert definition["inputs"] == {
            "x": {
                "dtype": "DT_FLOAT",
                "tensor_shape": {"dim": [{"size": "-1", "name": ""}, {"size": "2", "name": ""}], "unknown_rank": False},
                "name": "serving_default_x:0",
            }
        }
        assert list(definition["outputs"]) == ["y"]
    lab.leave("a")
    async with session.get(f"{base}/v1/models/m") as response:
        said = await response.json()
    assert said == {"model_version_status": [available | {"state": "LOADING"}], "name": "m", "ready": False}


NOT_THERE: list[Any] = [
    ("none", 404, "Could not find any versions of model none"),
    ("m/versions/9", 404, "Could not find version 9 of model m"),
    ("none/metadata", 404, "Servable not found for request: Latest(none)"),
    ("m/versions/9/metadata", 404, "Servable not found for request: Specific(m, 9)"),
    ("m/labels/1", 400, "Unrecognized servable version label: 1"),
    ("m/labels/beta", 400, "Unrecognized servable version label: beta"),
    ("m/versions/one", 400, "Malformed request: GET /v1/models/m/versions/one"),
    ("m/version/1", 400, "Malformed request: GET /v1/models/m/version/1"),
    ("m:predict", 405, "takes POST"),
]


async def test_what_is_not_there(http: Http) -> None:
    base, session = http
    for path, status, said in NOT_THERE:
        async with session.get(f"{base}/v1/models/{path}") as response:
            assert (response.status, (await response.json())["error"].find(said) >= 0) == (status, True), path


WRONG: list[Any] = [
    ("none:predict", {"instances": [1]}, 404, "Servable not found for request: Latest(none)"),
    ("m/versions/9:predict", {"instances": [1]}, 404, "Servable not found for request: Specific(m, 9)"),
    ("m/labels/beta:predict", {"instances": [1]}, 400, "Unrecognized servable version label: beta"),
    ("m/versions/HELLO:predict", {"instances": [1]}, 400, "Malformed request: POST /v1/models/m/versions/HELLO:predict"),
    ("m:guess", {"instances": [1]}, 400, "Malformed request: POST /v1/models/m:guess"),
    ("m:predict", "", 400, "JSON Parse error: The document is empty"),
    ("m:predict", "instances = [1, 2]", 400, "JSON Parse error: Invalid value"),
    ("m:predict", "[" * 100_000, 400, "JSON Parse error"),
    ("m:predict", [], 400, "Is not object"),
    ("m:predict", {}, 400, "Missing 'inputs' or 'instances' key"),
    ("m:predict", {"instances": [[1, 2]], "inputs": [[1, 2]]}, 400, "Not formatted correctly expecting only one of"),
    ("m:predict", {"instances": 1}, 400, "Excepting 'instances' to be an list/array"),
    ("m:predict", {"instances": []}, 400, "No values in 'instances' array"),
    ("m:predict", {"instances": [[1, 2]], "signature_name": 5}, 400, "'signature_name' key must be a string value"),
    ("m:predict", {"instances": [[1, 2]], "signature_name": "foo"}, 400, 'Serving signature name: "foo" not found in signature def'),
    ("m:predict", {"instances": [[1, "a"]]}, 400, 'JSON Value: "a" Type: String is not of expected type: float'),
    ("m:predict", {"instances": [[True, False]]}, 400, "JSON Value: true Type: Boolean is not of expected type: float"),
    ("m:predict", {"instances": [[1, 2], [3, None]]}, 400, "element: 1 of 'instances' list. Error: JSON Value: null Type: Null"),
    ("m:predict", {"instances": [[1, 2], [3, 4, 5]]}, 400, "element: 1 of 'instances' list. Error: Expecting tensor size: 2 but got: 3"),
    ("m:predict", {"instances": [[1, 2], [[3, 4]]]}, 400, "Error: Expecting shape [2] but got: [1, 2]"),
    ("m:predict", {"instances": [[1, 16777217]]}, 400, "16777217 to float without loss of precision"),
    ("m:predict", {"instances": [[1, 1e300]]}, 400, "without loss of precision"),
    ("m:predict", {"instances": [{"z": [1, 2]}]}, 400, "element: 0 key: z of 'instances' list. Error: JSON object: does not have named input: z"),
    ("m:predict", {"instances": [{}]}, 400, "must only have keys: x"),
    ("m:predict", {"instances": [{"x": [1, 2]}, [1, 2]]}, 400, "Expecting object but got list at item 1"),
    ("m:predict", {"instances": [[1, 2], {"x": [1, 2]}]}, 400, "Expecting value/list but got object at item 1"),
    ("m:predict", {"inputs": {"z": [[1, 2]]}}, 400, "Missing named input: x in 'inputs' object."),
    ("m:predict", {"inputs": [[1, 2], [3]]}, 400, "Encountered list at unexpected size: 1 at level: 1 expected size: 2"),
    ("m:predict", {"inputs": [[1, 2], 3]}, 400, "found at incorrect level: 2 in the JSON DOM. Expected at level: 2"),
    ("m:predict", {"inputs": [1, [2]]}, 400, "Encountered list at unexpected level: 1 expected < 1"),
    ("m:predict", '{"inputs": ' + "[" * 40 + "]" * 40 + "}", 400, "nested deeper"),
    ("texts:predict", {"instances": [{"b64": "?"}]}, 400, "Unable to base64 decode"),
    ("texts:predict", {"instances": [{"b64": "\x80"}]}, 400, "Unable to base64 decode"),
    ("texts:predict", {"instances": ["a", 1]}, 400, "JSON Value: 1 Type: Number is not of expected type: string"),
    ("two:predict", {"instances": [[1, 2]]}, 400, "instances is a plain list, but expecting list of objects"),
    ("two:predict", {"inputs": [[1, 2]]}, 400, "inputs is a plain value/list, but expecting an object"),
    ("two:predict", {"instances": [{"a": [1, 2], "b": 1.5}]}, 400, "1.5 Type: Number is not of expected type: int32"),
    ("two:predict", {"instances": [{"a": [1, 2], "b": 2**31}]}, 400, "2147483648 Type: Number is not of expected type: int32"),
    ("two:classify", {"examples": [{"a": [1, 2], "b": 1}]}, 400, "Expected one output to classify by"),
    ("m:classify", {}, 400, "key 'examples' is expected and was not found"),
    ("m:classify", {"examples": {}}, 400, "Expecting 'examples' value to be an list/array"),
    ("m:classify", {"examples": []}, 400, "'examples' value is an empty array"),
    ("m:classify", {"examples": [[1, 2]]}, 400, "Example must be JSON object but got JSON Array"),
    ("m:classify", {"examples": [{"z": [1, 2]}]}, 400, "Feature: x (data type: float) is required but could not be found"),
    ("m:classify", {"examples": [{"x": [1, 2, 3]}]}, 400, "Number of float values != expected. values size: 3 but output shape: [2]"),
    ("m:classify", {"examples": [{"x": [[], []]}]}, 400, "Feature: x of example 0 is not a flat list"),
    ("m:regress", {"examples": [{"x": [1, 2]}], "signature_name": "tensorflow/serving/classify"}, 400, "not found in signature def"),
    ("m:regress", {"examples": [{"x": [1, 2]}]}, 400, "Expected Tensor shape: [?] or [?, 1]"),
]  # fmt: skip


async def test_errors_have_the_words_of_tensorflow_serving(http: Http, deploy: Deploy) -> None:
    await deploy("two", TWO)
    await deploy("texts", TEXTS)
    for path, body, status, said in WRONG:
        found, answer = await ask(http, path, body)
        assert said in answer.get("error", ""), (path, body, answer)
        assert found == status, (path, body)


async def test_overload_and_deadlines(lab: Lab, http: Http) -> None:
    base, session = http
    lab.nodes["a"].mute = True
    async with session.post(
        f"{base}/v1/models/m:predict", json={"instances": [[1, 2]]}, headers={"Request-Timeout": "0.05"}
    ) as response:
        assert response.status == 504
    asked = [
        asyncio.create_task(lab.inference.infer("m", question(1, 1).inputs, 30))
        for _ in range(lab.settings.queue_limit + 1)
    ]
    await eventually(lambda: len(lab.inference.router("m").queue) == lab.settings.queue_limit)
    async with session.post(f"{base}/v1/models/m:predict", json={"instances": [[1, 2]]}) as response:
        assert response.status == 429
        assert int(response.headers["Retry-After"]) >= 1
    await lab.serving.undeploy("m")
    assert all(isinstance(error, Unavailable) for error in await asyncio.gather(*asked, return_exceptions=True))
