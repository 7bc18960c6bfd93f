"""Malformed, huge and hostile messages to a running cluster: each gets an error reply if possible, and nothing breaks."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import aiomqtt
import msgpack
import numpy as np
import pytest

from potluck.bus import packets
from potluck.client import AsyncClient
from potluck.errors import PotluckError
from potluck.local_cluster import LocalCluster
from potluck.wire.births import CoordinatorStatus, NodeCapacity, NodeStatus, NodeTelemetry
from potluck.wire.commands import (
    AcknowledgeResult,
    CancelInference,
    ForgetJob,
    HoldBlob,
    LeaseShard,
    LoadModel,
    ReleaseBlob,
    RunInference,
    UnloadModel,
    WithdrawLease,
)
from potluck.wire.messages import AnyMessage
from potluck.wire.questions import CancelInfer, Infer, SubmitJob
from potluck.wire.reports import (
    BlobsStored,
    HoldFailed,
    InferenceFinished,
    LeaseRefused,
    LeaseRenewed,
    LeaseTaken,
    ModelLoaded,
    ModelLoadFailed,
    ModelUnloaded,
    ShardFailed,
    ShardFinished,
)
from support.eventually import eventually
from support.fake_nodes import fake_node
from support.grammar import odd_messages
from support.raw_mqtt import PUBLISH, RawClient

pytestmark = pytest.mark.timeout(120)

TRAIN = {"kind": "train", "model": "none", "dataset": "none"}
INBOX = "potluck/v1/hostile/clients/me/inbox"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    folder: Path = tmp_path_factory.mktemp("hostile")
    with LocalCluster(folder, cluster="hostile", nodes=0, discovery=False) as running:
        running._wait_joined(fake_node(running, "node-1"))
        yield running


@pytest.fixture
async def bus(cluster: LocalCluster) -> AsyncIterator[aiomqtt.Client]:
    async with aiomqtt.Client(cluster.broker_host, cluster.broker_port) as client:
        await client.subscribe(INBOX, qos=1)
        yield client


async def answer(bus: aiomqtt.Client, seconds: float = 10) -> dict[str, Any]:
    async with asyncio.timeout(seconds):
        message = await anext(aiter(bus.messages))
    assert isinstance(message.payload, bytes)
    found: dict[str, Any] = (
        json.loads(message.payload) if message.payload[:1] == b"{" else msgpack.unpackb(message.payload)
    )
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
async def test_the_answer_names_the_fault(
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
        b"\x81\x90\x01",
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


@pytest.mark.parametrize("encode", [json.dumps, msgpack.packb])
@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        ("coordinator/inbox", {"type": "GetJob", "job_id": {"a": 1}}),
        ("coordinator/inbox", {"type": "GetJob", "job_id": "j", "expires": "soon"}),
        ("coordinator/inbox", {"type": ["ListNodes"]}),
        ("coordinator/inbox", {}),
        ("jobs/submit", {"type": "SubmitJob", "job": ["train"]}),
        ("models/m/infer", {"type": "Infer", "inputs": [{"name": "x", "datatype": "FP32", "shape": "1"}]}),
        ("models/m/infer", {"type": "Infer", "inputs": "none"}),
    ],
)
async def test_a_field_of_another_type_is_answered_in_both_encodings(
    bus: aiomqtt.Client, leaf: str, message: dict[str, Any], encode: Callable[[Any], str | bytes]
) -> None:
    await bus.publish(topic(leaf), encode({**message, "id": "q", "reply_to": INBOX}), qos=1)
    found = await answer(bus)
    assert (found["type"], found["id"], found["error"]["code"]) == ("RequestFailed", "q", "bad_message")


TO = {"id": "q", "reply_to": INBOX}


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (json.dumps({"type": "ListNodes", **TO})[:-1] + ",}", "not valid json"),
        (json.dumps({"type": "GetJob", "job_id": "\ud800", **TO}), "surrogates"),
        (b'{"type": "GetJob", "job_id": "\xff", ' + json.dumps(TO).encode()[1:], "not valid json"),
        (msgpack.packb({**TO, "type": "ListNodes"})[:-1], "not valid msgpack"),
        (b"\x83\x90\x01" + msgpack.packb(TO)[1:], "unhashable"),
        (msgpack.packb({b"type": b"ListNodes", b"id": b"q", b"reply_to": INBOX.encode()}), "unknown message type"),
    ],
)
async def test_an_unreadable_question_is_answered_if_its_reply_topic_is_readable(
    bus: aiomqtt.Client, payload: str | bytes, said: str
) -> None:
    await bus.publish(topic("coordinator/inbox"), payload, qos=1)
    found = await answer(bus)
    assert (found["type"], found["id"], found["error"]["code"]) == ("RequestFailed", "q", "bad_message")
    assert said in found["error"]["message"]


async def put(cluster: LocalCluster, data: bytes) -> dict[str, Any]:
    """Bring a blob to the coordinator; its reference."""
    sha256 = hashlib.sha256(data).hexdigest()
    async with aiohttp.ClientSession() as http:
        async with http.put(f"{cluster.http_url}/blobs/{sha256}", data=data) as response:
            assert response.status in (200, 201)
    return {"sha256": sha256, "size": len(data)}


async def ask(bus: aiomqtt.Client, leaf: str, message: dict[str, Any], request_id: str = "q") -> dict[str, Any]:
    await bus.publish(topic(leaf), json.dumps({"id": request_id, "reply_to": INBOX, **message}), qos=1)
    return await answer(bus)


async def register(cluster: LocalCluster, bus: aiomqtt.Client, name: str) -> dict[str, Any]:
    """Register some bytes that are no model; their reference."""
    model = await put(cluster, f"not the model {name}, but a blob".encode())
    found = await ask(bus, "coordinator/inbox", {"type": "RegisterModel", "name": name, "model": model})
    assert found["model"]["version"] == 1
    return model


async def test_the_same_submission_twice_is_one_job(cluster: LocalCluster, bus: aiomqtt.Client) -> None:
    await register(cluster, bus, "odd")
    submit = {"type": "SubmitJob", "job": {"kind": "deploy", "model": "odd"}}
    first, second = [await ask(bus, "jobs/submit", submit, "s") for _ in range(2)]
    assert first["job_id"] == second["job_id"]


async def test_another_job_with_the_id_of_an_earlier_one_is_refused(cluster: LocalCluster, bus: aiomqtt.Client) -> None:
    model = await register(cluster, bus, "plain")
    data = json.dumps(
        {"count": 1, "format": {"kind": "arrays"}, "name": "one"} | {"shards": [{"blob": model, "count": 1}]}
    )
    manifest = await put(cluster, data.encode())
    found = await ask(bus, "coordinator/inbox", {"type": "AddDataset", "name": "one", "manifest": manifest})
    assert found["type"] == "DatasetAdded"
    evaluate = {"kind": "evaluate", "model": model, "dataset": "one"}
    deploy = {"kind": "deploy", "model": "plain"}
    for request_id, job, same, others in (
        ("evaluate", evaluate, [evaluate | {"batch_size": 32}], [evaluate | {"batch_size": 8}, deploy]),
        ("deploy", deploy, [deploy | {"model": "plain:1"}], [deploy | {"replicas": 2}, deploy | {"model": "plain:2"}]),
    ):
        made = await ask(bus, "jobs/submit", {"type": "SubmitJob", "job": job}, request_id)
        for again in (job, *same):
            found = await ask(bus, "jobs/submit", {"type": "SubmitJob", "job": again}, request_id)
            assert found["job_id"] == made["job_id"]
        for other in others:
            found = await ask(bus, "jobs/submit", {"type": "SubmitJob", "job": other}, request_id)
            assert (found["type"], found["error"]["code"]) == ("RequestFailed", "conflict")
            assert made["job_id"] in found["error"]["message"]


async def test_blobs_that_differ_from_their_reference(cluster: LocalCluster, bus: aiomqtt.Client) -> None:
    model = await put(cluster, b"a model of 21 bytes..")
    wrong, nowhere = model | {"size": 22}, {"sha256": "0" * 64, "size": 5, "holders": ["http://127.0.0.1:9"]}

    async def manifest(shard: dict[str, Any], **more: Any) -> dict[str, Any]:
        dataset = {"count": 1, "format": {"kind": "arrays"}, "name": "d", "shards": [{"blob": shard, "count": 1}]}
        return await put(cluster, json.dumps(dataset | more).encode())

    good, odd = await manifest(model), {"holders": ["//x"]}
    for question, code, said in (
        ({"type": "RegisterModel", "model": wrong}, "invalid_request", "has 21 bytes, not 22"),
        ({"type": "RegisterModel", "model": nowhere}, "not_found", "PUT it to"),
        ({"type": "AddDataset", "manifest": nowhere}, "not_found", "manifest blob 000000000000"),
        ({"type": "AddDataset", "manifest": good | {"size": 1}}, "invalid_request", "not 1"),
        ({"type": "AddDataset", "manifest": await manifest(wrong)}, "invalid_data", "has 22 bytes: it has 21"),
        ({"type": "AddDataset", "manifest": await manifest(nowhere)}, "invalid_data", "1 of 1 blob of"),
        ({"type": "AddDataset", "manifest": await manifest(model, keys=nowhere)}, "invalid_data", "1 of 2 blobs"),
        ({"type": "AddDataset", "manifest": await manifest(model | odd)}, "invalid_request", "names the holder '//x'"),
    ):
        found = await ask(bus, "coordinator/inbox", {"name": "d", **question})
        assert (found["type"], found["error"]["code"]) == ("RequestFailed", code), question
        assert said in found["error"]["message"]


def at_least_two(paths: Iterable[Path]) -> list[Path]:
    """The coordinator's and a node's copy, once both are there."""
    found = list(paths)
    return found if len(found) >= 2 else []


async def test_a_deployment_names_the_blob_that_could_not_be_fetched(
    cluster: LocalCluster, bus: aiomqtt.Client
) -> None:
    model = await register(cluster, bus, "lost")
    copies = await eventually(lambda: at_least_two(cluster.folder.glob(f"*/blobs/{model['sha256']}")))
    for copy in copies:
        copy.unlink()
    made = await ask(bus, "jobs/submit", {"type": "SubmitJob", "job": {"kind": "deploy", "model": "lost"}})
    await bus.subscribe(topic(f"jobs/{made['job_id']}/result"), qos=1)
    found = await answer(bus, 60)  # it is tried three times, with a rest between
    assert found["error"]["code"] == "unavailable"
    for part in ("lost:1", model["sha256"][:12], f"{cluster.http_url}: answered 404"):
        assert part in found["error"]["message"]


COMMANDS = (
    LeaseShard | WithdrawLease | AcknowledgeResult | ForgetJob | LoadModel | UnloadModel | HoldBlob | ReleaseBlob
    | RunInference | CancelInference
)  # fmt: skip
EVENTS = (
    LeaseTaken | LeaseRefused | LeaseRenewed | ShardFinished | ShardFailed | ModelLoaded | ModelLoadFailed | ModelUnloaded
    | InferenceFinished | BlobsStored | HoldFailed
)  # fmt: skip


def leaves_of(kind: Any, name: str, client_id: str) -> list[str]:
    """Where somebody listens to messages of this kind."""
    if issubclass(kind, COMMANDS):
        return ["nodes/node-1/inbox"]
    if issubclass(kind, EVENTS):
        return ["nodes/node-1/outbox"]
    if issubclass(kind, Infer | CancelInfer):
        return [f"models/{name}/infer"]
    own: dict[Any, list[str]] = {
        CoordinatorStatus: ["coordinator/status"],
        NodeStatus: ["nodes/node-1/status", "nodes/ghost/status"],
        NodeCapacity: ["nodes/node-1/capacity", "nodes/ghost/capacity"],
        NodeTelemetry: ["nodes/node-1/telemetry"],
        SubmitJob: ["jobs/submit"],
    }
    return own.get(kind, ["coordinator/inbox", f"clients/{client_id}/inbox"])


async def test_odd_values_in_every_field_of_every_message_end_no_process(
    cluster: LocalCluster, bus: aiomqtt.Client
) -> None:
    await register(cluster, bus, "sound")
    pids = [cluster.coordinator.pid, cluster.nodes[0].pid]
    broker = f"{cluster.broker_host}:{cluster.broker_port}"
    async with AsyncClient(broker, cluster="hostile", timeout=60) as client:
        await (await client.deploy("sound")).wait(timeout=60)
        connection = await client._connected()
        (deployed,) = [one for one in await client.deployments() if one.name == "sound:1"]
        known = {
            "epoch": (await connection.coordinator()).epoch,
            "replica_id": deployed.replicas[0].replica_id,
            "node_id": "node-1",
            "reply_to": topic("clients/nobody/inbox"),
        }
        sent = 0
        for kind in AnyMessage.__args__:
            if kind is UnloadModel:
                continue  # a correct command for the replica: the node must obey it
            for message in odd_messages(kind, known):
                if message.get("epoch", 0) > known["epoch"]:
                    continue  # the last value is of this kind
                for leaf in leaves_of(kind, "sound", connection.bus.client_id):
                    await bus.publish(topic(leaf), msgpack.packb(message), retain=leaf.endswith(("status", "capacity")))
                    sent += 1
        assert sent > 2000
        epoch = {"type": "CoordinatorStatus", "session": "x", "epoch": 2**53, "state": "online"}
        await bus.publish(topic("coordinator/status"), json.dumps(epoch), qos=1, retain=True)

        async def works() -> bool:
            try:
                found = await client.infer("sound", np.ones((1, 2), np.float32))
                return bool((found == 1).all()) and [node.state for node in await client.nodes()][-1] == "online"
            except PotluckError as error:
                raise AssertionError(error.message) from error

        await eventually(works, 60)
        for name in ("sound", "again"):
            if name == "again":
                await register(cluster, bus, name)
            await (await client.deploy(name)).wait(timeout=60)
    assert [cluster.coordinator.pid, cluster.nodes[0].pid] == pids
    assert cluster.coordinator.running
    assert cluster.nodes[0].running


async def test_whoever_asks_does_not_wait_until_thousands_of_commands_are_sent(cluster: LocalCluster) -> None:
    """All answers stood in line behind the commands to nodes: a busy coordinator seemed to be gone."""
    count = 5000
    birth = {"type": "NodeStatus", "node_id": "odd", "session": "1", "state": "online"}
    said = {
        "type": "NodeTelemetry", "node_id": "odd", "session": "1", "cpu_percent": 0, "memory_used_bytes": 0, "memory_available_bytes": 0,
        "replicas": [f"r{number}" for number in range(count)],
    }  # fmt: skip
    question = {"type": "ListModels", "id": "now", "reply_to": INBOX}

    def packet_of(leaf: str, message: dict[str, Any]) -> bytes:
        return packets.publish(topic(leaf), json.dumps(message).encode(), False, b"")

    async with RawClient(cluster.broker_port) as client:
        await client.connect("in-line")
        await client.subscribe(topic("nodes/odd/inbox"))
        await client.subscribe(INBOX)
        client.send(packet_of("nodes/odd/status", birth) + packet_of("nodes/odd/telemetry", said))
        told = 0
        while (packet := await client.packet(20)) is not None and packet.topic != INBOX:
            assert packet.kind == PUBLISH
            told += 1
            if told == 1:
                client.send(packet_of("coordinator/inbox", question))
        assert told < count, "the node is told to unload each of its replicas, which nobody knows"
