"""Questions to the coordinator over HTTP: answered as on the bus, and refused if a web page could have sent them."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import msgpack
import numpy as np
import pytest
from msgspec.structs import replace

from coordinator.control import Control
from coordinator.dispatch.dispatcher import Dispatcher
from potluck.wire import codec, tensors
from potluck.wire.births import NodeStatus
from potluck.wire.questions import (
    GetJob,
    GetModel,
    JobEnded,
    ListDeployments,
    ListEvents,
    ListModels,
    ListNodes,
    RemoveAlias,
    Undeploy,
)
from potluck.wire.reports import ShardFailed
from potluck.wire.values import INLINE_LIMIT_BYTES, Message
from support.serving_lab import Lab

Http = tuple[str, aiohttp.ClientSession]
JSON, MSGPACK = "application/json", "application/msgpack"


async def ask(http: Http, body: bytes, content_type: str = JSON, **headers: str) -> tuple[int, dict[str, Any]]:
    """(status, answer)"""
    base, session = http
    headers = {"Content-Type": content_type, **{name.replace("_", "-"): text for name, text in headers.items()}}
    async with session.post(f"{base}/v1/control", data=body, headers=headers) as response:
        answer = await response.read()
        assert not [name for name in response.headers if name.lower().startswith("access-control")]
        packed = response.content_type == MSGPACK
        return response.status, msgpack.unpackb(answer) if packed else json.loads(answer)


@pytest.mark.parametrize("question", [ListModels(id="q"), ListDeployments(id="q"), GetModel(id="q", model="m")])
async def test_an_answer_is_that_of_the_bus(http: Http, control: Control, question: Message) -> None:
    answer = control.answer(question)
    assert isinstance(answer, Message)
    answer = replace(answer, id="q")
    for encoding, content_type in codec.CONTENT_TYPES.items():
        found = await ask(http, codec.encode(question, encoding), content_type)
        expected = codec.encode(answer, encoding)
        assert found == (200, json.loads(expected) if encoding == "json" else msgpack.unpackb(expected))


async def test_an_answer_that_takes_time_is_waited_for(lab: Lab, http: Http) -> None:
    status, answer = await ask(http, codec.encode(Undeploy(id="q", model="m"), "json"))
    assert (status, answer) == (200, {"type": "Undeployed", "id": "q", "deployments": ["m:1"]})
    assert lab.serving.deployments() == ()
    _, events = await ask(http, codec.encode(ListEvents(last=1), "json"))
    assert [(event["what"], event["name"]) for event in events["events"]] == [("undeployed", "m:1")]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b'{"type": "GetModel", "model": "n"}', 404, "there is no model 'n'"),
        (b'{"type": "GetModel"}', 400, "`model`"),
        (b'{"type": "Nonsense"}', 400, "unknown message type 'Nonsense'"),
        (b"[]", 400, "neither a msgpack nor a JSON map"),
        (b"", 400, "the payload is empty"),
        (b'{"type": "ListNodes", "expires": 1.0}', 504, "after its time was up"),
        (codec.encode(NodeStatus(node_id="a", session="2", state="offline"), "json"), 400, "is not a question"),
        (codec.encode(ShardFailed(attempt_id="a", error=cast(Any, {"code": "", "message": ""})), "json"), 400, "is not a question"),
        (b'{"type": "Infer", "inputs": []}', 400, "is not a question"),
        (b'{"type": "FollowEvents", "id": "q"}', 400, "has many answers: GET /v1/events gives them"),
        (b'{"type": "ListNodes", "id": "' + bytes([0x61]) * INLINE_LIMIT_BYTES + b'"}', 413, "send large data as a blob"),
        (b'{"type": "ListJobs"}', 500, "a defect of potluck"),  # of these tests: there is no dispatcher
    ],
)  # fmt: skip
async def test_errors_are_answered_as_everywhere_in_the_gateway(
    http: Http, body: bytes, status: int, said: str
) -> None:
    found, answer = await ask(http, body)
    assert (found, list(answer)) == (status, ["error"])
    assert said in answer["error"]


async def test_a_page_of_another_origin_cannot_ask(lab: Lab, http: Http) -> None:
    base, session = http
    body = codec.encode(Undeploy(model="m"), "json")
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        status, answer = await ask(http, body, content_type, Origin="http://elsewhere.example")
        assert (status, "application/msgpack" in answer["error"]) == (415, True)
    # Nor can a page whose host name means this machine (DNS rebinding), so that the browser takes it for ours.
    assert (await ask(http, body, Origin=base.replace("127.0.0.1", "elsewhere.example")))[0] == 403
    assert lab.serving.ready("m")
    headers = {"Origin": "http://elsewhere.example", "Access-Control-Request-Method": "POST"}
    async with session.options(f"{base}/v1/control", headers=headers) as response:
        assert response.status == 405
        assert "Access-Control-Allow-Origin" not in response.headers


async def test_a_client_that_names_itself_may_ask_again(lab: Lab, http: Http) -> None:
    lab.registry.set_alias("m:1", "prod")
    question = codec.encode(RemoveAlias(id="q-1", model="m:prod"), "json")
    for _ in range(2):
        assert (await ask(http, question, Potluck_Caller="client:shell-1"))[0] == 200
    assert (await ask(http, question, Potluck_Caller="client:shell-2"))[0] == 404
    assert (await ask(http, question))[0] == 404


async def test_a_deadline_is_measured_by_the_clock_of_the_coordinator(http: Http) -> None:
    status, answer = await ask(http, codec.encode(ListNodes(expires=time.time() + 60), "json"))
    assert (status, [node["node_id"] for node in answer["nodes"]]) == (200, ["a"])


async def test_a_result_has_its_tensors_as_lists_in_json(
    http: Http, control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tensors.from_numpy("y", np.float32([[1, 2]]))
    ended = JobEnded(job_id="j", kind="predict", state="succeeded", created_at=1, started_at=1, ended_at=1, outputs=(output,))  # fmt: skip
    found: Any = SimpleNamespace(job=lambda job_id: None, ended=lambda job: ended)
    monkeypatch.setattr(control, "_dispatcher", cast(Dispatcher, found))
    _, answer = await ask(http, codec.encode(GetJob(job_id="j"), "json"))
    assert answer["outputs"][0]["data"] == [1.0, 2.0]
    _, answer = await ask(http, codec.encode(GetJob(job_id="j")), MSGPACK)
    assert answer["outputs"][0]["data"] == np.float32([1, 2]).tobytes()
