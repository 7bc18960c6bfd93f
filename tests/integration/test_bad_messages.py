"""Malformed, huge and hostile messages against a running cluster: an error reply where one can be sent, and nothing breaks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiomqtt
import pytest

from potluck.local_cluster import LocalCluster

pytestmark = pytest.mark.timeout(120)

TRAIN = {"kind": "train", "model": "none", "dataset": "none"}
INBOX = "potluck/v1/hostile/clients/me/inbox"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    folder: Path = tmp_path_factory.mktemp("hostile")
    with LocalCluster(folder, cluster="hostile", nodes=1, discovery=False) as running:
        yield running


@pytest.fixture
async def bus(cluster: LocalCluster) -> AsyncIterator[aiomqtt.Client]:
    async with aiomqtt.Client(cluster.broker_host, cluster.broker_port) as client:
        await client.subscribe(INBOX, qos=1)
        yield client


async def answer(bus: aiomqtt.Client) -> dict[str, Any]:
    async with asyncio.timeout(10):
        message = await anext(aiter(bus.messages))
    assert isinstance(message.payload, bytes)
    found: dict[str, Any] = json.loads(message.payload)
    return found


def topic(leaf: str) -> str:
    return f"potluck/v1/hostile/{leaf}"


@pytest.mark.parametrize(
    ("leaf", "message", "code", "said"),
    [
        (
            "jobs/submit",
            {"type": "SubmitJob", "job": {"kind": "train", "model": 3, "dataset": "d"}},
            "bad_message",
            "model",
        ),
        ("jobs/submit", {"type": "SubmitJob", "job": {"kind": "dance"}}, "bad_message", "kind"),
        ("jobs/submit", {"type": "SubmitJob"}, "bad_message", "job"),
        ("jobs/submit", {"type": "SubmitJob", "job": {**TRAIN, "epochs": 2**63}}, "bad_message", "epochs"),
        ("jobs/submit", {"type": "SubmitJob", "job": {**TRAIN, "epochs": 10**400}}, "bad_message", "epochs"),
        ("jobs/submit", {"type": "SubmitJob", "job": {**TRAIN, "seed": -1}}, "bad_message", "seed"),
        ("jobs/submit", {"type": "SubmitJob", "job": {**TRAIN, "batch_size": 2**60}}, "bad_message", "batch_size"),
        ("jobs/submit", {"type": "Nonsense"}, "bad_message", "Nonsense"),
        ("coordinator/inbox", {"type": "GetJob", "job_id": "none"}, "not_found", "none"),
        ("coordinator/inbox", {"type": "GetJob", "job_id": 7}, "bad_message", "job_id"),
        ("coordinator/inbox", {"type": "LeaseTaken", "attempt_id": "x"}, "invalid_request", "LeaseTaken"),
        (
            "jobs/submit",
            {"type": "SubmitJob", "job": {"kind": "train", "model": "none", "dataset": "none"}},
            "not_found",
            "model",
        ),
        (
            "jobs/submit",
            {"type": "SubmitJob", "job": {"kind": "evaluate", "model": "m", "dataset": "d", "batch_size": 0}},
            "bad_message",
            "batch_size",
        ),
        ("models/none/infer", {"type": "Infer", "inputs": []}, "not_found", "none"),
        ("coordinator/inbox", {"type": "ListNodes", "pad": "x" * 300_000}, "too_large", "limit"),
    ],
)
async def test_the_answer_names_what_is_wrong(
    bus: aiomqtt.Client, leaf: str, message: dict[str, Any], code: str, said: str
) -> None:
    await bus.publish(topic(leaf), json.dumps({"id": "q", "reply_to": INBOX, **message}), qos=1)
    found = await answer(bus)
    assert (found["type"], found["id"], found["error"]["code"]) == ("RequestFailed", "q", code)
    assert said in found["error"]["message"]


async def test_noise_on_every_topic_leaves_everything_running(cluster: LocalCluster, bus: aiomqtt.Client) -> None:
    noise = [
        b"\x00\xff\xfe",
        b"{",
        b"[1,2]",
        b"\x81\xa4type",
        b"null",
        b'{"type":"LeaseShard"}',
        b"\xdf\xff\xff\xff\xff",
        b"x" * 300_000,
    ]
    leaves = [
        "jobs/submit", "coordinator/inbox", "models/m/infer", "nodes/node-1/inbox", "nodes/node-1/outbox",
        "nodes/node-1/telemetry", "nodes/ghost/status", "nodes/ghost/capacity", "nodes/ghost/outbox",
    ]  # fmt: skip
    for leaf in leaves:
        for payload in noise:
            await bus.publish(topic(leaf), payload, qos=1)
    spoof = {"type": "NodeStatus", "node_id": "node-1", "session": "s", "state": "offline"}
    await bus.publish(topic("nodes/ghost/status"), json.dumps(spoof), qos=1)
    await bus.publish(
        topic("coordinator/inbox"), json.dumps({"type": "ListNodes", "id": "n", "reply_to": INBOX}), qos=1
    )
    found = await answer(bus)
    assert [(node["node_id"], node["state"]) for node in found["nodes"]] == [("node-1", "online")]
    assert cluster.coordinator.running
    assert cluster.nodes[0].running


async def test_nobody_makes_the_coordinator_speak_to_a_node(cluster: LocalCluster, bus: aiomqtt.Client) -> None:
    await bus.subscribe(topic("nodes/node-1/inbox"), qos=1)
    question = {"type": "ListNodes", "id": "n", "reply_to": topic("nodes/node-1/inbox")}
    await bus.publish(topic("coordinator/inbox"), json.dumps(question), qos=1)
    await bus.publish(topic("coordinator/inbox"), json.dumps({"type": "ListJobs", "id": "j", "reply_to": INBOX}), qos=1)
    found = await answer(bus)
    assert (found["type"], found["id"]) == ("JobsListed", "j")


async def test_the_same_submission_twice_is_one_job(cluster: LocalCluster, bus: aiomqtt.Client) -> None:
    import hashlib

    from aiohttp import ClientSession

    model = b"not a model, but a blob"
    sha256 = hashlib.sha256(model).hexdigest()
    async with ClientSession() as http, http.put(f"{cluster.http_url}/blobs/{sha256}", data=model) as response:
        assert response.status == 201
    register = {
        "type": "RegisterModel",
        "id": "r",
        "reply_to": INBOX,
        "name": "odd",
        "model": {"sha256": sha256, "size": 23},
    }
    await bus.publish(topic("coordinator/inbox"), json.dumps(register), qos=1)
    assert (await answer(bus))["model"]["version"] == 1
    submit = {"type": "SubmitJob", "id": "s", "reply_to": INBOX, "job": {"kind": "deploy", "model": "odd"}}
    ids = set()
    for _ in range(2):
        await bus.publish(topic("jobs/submit"), json.dumps(submit), qos=1)
        ids.add((await answer(bus))["job_id"])
    assert len(ids) == 1
