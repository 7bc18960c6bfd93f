"""The node daemon as a real process on a real broker: how it starts, works and ends, and what it survives."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import aiohttp
import psutil
import pytest
from msgspec.structs import replace

from potluck.bus.mqtt import MqttBus
from potluck.credentials import Credentials
from potluck.net.discovery import Discovery, Service
from potluck.wire.births import CoordinatorStatus, NodeCapacity, NodeStatus, NodeTelemetry
from potluck.wire.commands import ForgetJob, LeaseHints, Rebirth, WithdrawLease
from potluck.wire.questions import ListNodes, RequestFailed
from potluck.wire.reports import (
    BlobsStored,
    InferenceFinished,
    LeaseRefused,
    LeaseRenewed,
    LeaseTaken,
    ModelLoaded,
    ModelUnloaded,
    ShardFailed,
    ShardFinished,
)
from potluck.wire.tasks import EvaluateResult, EvaluateTask, ExportTask, PredictResult, TrainResult
from potluck.wire.values import BlobRef, DataFormat, DataSlice, Message, Tensor
from support.brokers import TestBroker, some_kind
from support.eventually import eventually
from support.node_lab import TOPICS, Lab, NodeProcess, node_lab
from support.relay import relay

BIRTH_SECONDS = 1.5
REST_SECONDS = 20.0
MEMORY_LIMIT_BYTES = 60e6
CORE_LIMIT = 0.01
STATUS_SECONDS = 5.0
SENT_LIMIT = 200
"""Bytes a second, with the headers of TCP and IP."""


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    async with node_lab(tmp_path) as lab:
        yield lab


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as opened:
        yield opened


PYNVML = """
NVMLError = OSError
nvmlInit = lambda: None
nvmlDeviceGetCount = lambda: 1
nvmlDeviceGetHandleByIndex = lambda index: index
nvmlDeviceGetName = lambda handle: "Tesla"
class nvmlDeviceGetMemoryInfo:
    def __init__(self, handle):
        self.total = 2**34
class nvmlDeviceGetUtilizationRates:
    def __init__(self, handle):
        self.gpu = 0
"""
"""A fake driver with a GPU that TensorFlow cannot use."""

# --- start and end ---------------------------------------------------------------------------------------------------------


async def test_a_node_starts_quickly_and_small_idles_and_leaves_nothing_retained(
    lab: Lab, stack: AsyncExitStack
) -> None:
    arrivals: list[float] = []
    lab.bus.subscribe(TOPICS.node("n1", "status"), lambda envelope: arrivals.append(time.time()))
    seconds = []
    between = await stack.enter_async_context(relay(lab.broker.port))
    for _ in range(4):  # the machine may be busy with other tests: the best counts
        before = len(arrivals)
        node = await lab.node("--seed", f"127.0.0.1:{between.port}", "--no-discovery", fake=False, join=False)
        await eventually(lambda before=before: len(arrivals) > before)  # type: ignore[misc]
        seconds.append(arrivals[before] - node.started_at)
        if min(seconds) < BIRTH_SECONDS:
            break
        await node.stop()
    assert min(seconds) < BIRTH_SECONDS, seconds

    measured = await lab.heard(NodeCapacity, lambda one: one.capacity.gflops > 0, seconds=30)
    assert measured.capacity.cores == len(os.sched_getaffinity(0))
    assert set(measured.capacity.runtimes) >= {"tensorflow", "keras"}
    process = psutil.Process(node.pid)
    await eventually(lambda: not process.children(), 10)
    before_rest, sent = process.cpu_times(), between.sent_bytes
    written, files = process.io_counters().write_bytes, changes(lab.folder)
    for _ in range(round(REST_SECONDS / STATUS_SECONDS)):
        await asyncio.sleep(STATUS_SECONDS)
        await lab.online()  # as a coordinator does
    after_rest = process.cpu_times()
    assert process.io_counters().write_bytes == written
    assert changes(lab.folder) == files, "where a file system counts no bytes, its files tell"
    assert (between.sent_bytes - sent) / REST_SECONDS < SENT_LIMIT
    busy = after_rest.user + after_rest.system - before_rest.user - before_rest.system
    assert busy / REST_SECONDS < CORE_LIMIT
    assert process.memory_info().rss <= MEMORY_LIMIT_BYTES
    assert len(lab.all(NodeTelemetry)) >= REST_SECONDS // 5 - 1
    loaded = {name for name in ("numpy", "tensorflow", "rich", "typer", "PIL") if f"/{name}/" in _mapped(process)}
    assert not loaded

    (birth, *_) = [one for one in lab.all(NodeStatus) if one.session == lab.all(NodeStatus)[-1].session]
    port = int(birth.http[0].rsplit(":", 1)[1])
    assert set(birth.software) >= {"potluck", "python", "tensorflow", "keras"}
    assert measured.capacity.runtimes.items() <= birth.software.items()
    assert await node.stop() == 0
    goodbye = await lab.heard(NodeStatus, lambda one: one.state == "offline" and one.session == birth.session)
    assert goodbye.http == ()
    with socket.socket() as sock:
        assert sock.connect_ex(("127.0.0.1", port)) != 0


def changes(folder: Path) -> dict[str, int]:
    """When each file of a node and its log last changed."""
    found = [path for part in ("state", "log-*") for path in folder.glob(part)]
    found += [path for place in found for path in place.rglob("*")]
    return {str(path): path.stat().st_mtime_ns for path in found}


def _mapped(process: psutil.Process) -> str:
    return "\n".join(mapped.path for mapped in process.memory_maps())


async def test_births_and_capacity_are_retained(lab: Lab) -> None:
    await lab.node()
    await lab.heard(NodeCapacity)
    late = MqttBus(lab.broker.address, TOPICS, Credentials(), client_id="late")
    seen: dict[str, bool] = {}
    for leaf in ("status", "capacity"):
        late.subscribe(TOPICS.node("+", leaf), lambda envelope: seen.update({envelope.topic: envelope.retained}))
    running = asyncio.create_task(late.run(), name="late")
    await eventually(lambda: seen == {TOPICS.node("n1", "status"): True, TOPICS.node("n1", "capacity"): True})
    running.cancel()
    await asyncio.wait([running])


async def test_its_will_is_told_when_it_is_killed_and_a_late_one_does_not_hide_its_successor(lab: Lab) -> None:
    node = await lab.node()
    first = await lab.heard(NodeStatus)
    assert await node.stop(signal.SIGKILL) == -signal.SIGKILL
    will = await lab.heard(NodeStatus, lambda one: one.state == "offline")
    assert will.session == first.session
    told = len(lab.all(NodeStatus))
    await lab.node()
    second = await lab.heard(NodeStatus, lambda one: one.state == "online", after=told)
    assert second.session != first.session
    # The broker notices the death of the first only now.
    await lab.bus.publish(TOPICS.node("n1", "status"), will, retain=True)
    await lab.heard(NodeStatus, lambda one: one == second, after=told + 2)


async def test_of_two_nodes_with_one_id_the_second_ends_and_says_why(lab: Lab, tmp_path: Path) -> None:
    first = await lab.node()
    born = await lab.heard(NodeStatus)
    # It may end before it says that it is online.
    options = ("--seed", f"127.0.0.1:{lab.broker.port}", "--no-discovery", "--state-dir", str(tmp_path / "other"))
    other = await lab.node(*options, join=False)
    assert await other.ended() == 1
    assert f"the node at {born.http[0]} has the id 'n1' too, and was here first" in other.log()
    # It has nothing to say if the second ended before it was online.
    assert first.log().count("another node uses this id") <= 1
    await eventually(lambda: lab.all(NodeStatus)[-1] == born)  # the last status is that of the first


async def test_an_earlier_session_that_died_unnoticed_is_no_rival(lab: Lab) -> None:
    dead = NodeStatus(node_id="n1", session="gone", state="online", http=("http://127.0.0.1:9",))
    await lab.bus.publish(TOPICS.node("n1", "status"), dead, retain=True)
    node = await lab.node()
    await eventually(lambda: len(lab.all(NodeTelemetry)) >= 4)
    assert "here first" not in node.log()
    assert await node.stop() == 0


def put_right(lab: Lab, leaf: str, forged: Message) -> bool:
    """Whether this was published, and the node's own status came after it."""
    of_topic = [
        one for one in lab.said if isinstance(one, NodeStatus if leaf == "status" else NodeCapacity) or one == forged
    ]
    return forged in of_topic and of_topic[-1] != forged


async def test_a_node_corrects_what_others_say_of_it(lab: Lab) -> None:
    node = await lab.node()
    born = await lab.heard(NodeStatus)
    told = await lab.heard(NodeCapacity)
    for leaf, forged in (
        ("status", replace(born, state="offline")),
        ("status", replace(born, session="other")),
        ("status", ListNodes()),
        ("capacity", replace(told, capacity=replace(told.capacity, gflops=1e9))),
    ):
        await lab.bus.publish(TOPICS.node("n1", leaf), forged, retain=True)
        await eventually(partial(put_right, lab, leaf, forged))
    assert node.log().count("another node uses this id") == 1


async def test_a_coordinator_that_comes_later_is_told_again(lab: Lab) -> None:
    await lab.node()
    born = await lab.heard(NodeStatus)
    for leaf in ("status", "capacity"):
        await lab.bus.clear(TOPICS.node("n1", leaf))
    await lab.online(epoch=1)  # the same one as before
    await lab.lease("a1", "join")
    await lab.heard(ShardFinished)
    assert lab.all(NodeStatus) == [born]
    capacities = len(lab.all(NodeCapacity))
    await lab.online(epoch=2)
    await lab.heard(NodeStatus, lambda one: one == born, after=1)
    await lab.heard(NodeCapacity, after=capacities)


async def test_an_unknown_node_is_asked_for_its_birth(lab: Lab) -> None:
    await lab.node()
    born = await lab.heard(NodeStatus)
    await lab.heard(NodeCapacity)  # behind its birth
    capacities = len(lab.all(NodeCapacity))
    await lab.command(Rebirth())
    await lab.command(Rebirth())
    await lab.heard(NodeStatus, lambda one: one == born, after=1)
    await lab.heard(NodeCapacity, after=capacities)
    await lab.lease("a1", "join")
    await lab.heard(ShardFinished)
    assert lab.all(NodeStatus) == [born, born], "once in a second at most"


async def test_a_coordinator_of_another_protocol_is_not_obeyed(lab: Lab) -> None:
    node = await lab.node()
    status = CoordinatorStatus(session="other", epoch=9, state="online", version=2)
    await lab.bus.publish(TOPICS.coordinator_status, status)
    await eventually(lambda: "coordinator of another protocol ignored" in node.log())
    await lab.lease("a1", "join", epoch=1)
    await lab.heard(ShardFinished)


async def test_it_answers_systemd(lab: Lab, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.setblocking(False)
        node = await lab.node(NOTIFY_SOCKET=str(tmp_path / "notify"))
        told: list[str] = []

        async def said(word: str) -> None:
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(10):
                while not any(word in line for line in told):
                    told.append((await loop.sock_recv(sock, 1000)).decode())

        await said("READY=1")
        await said("STATUS=node n1 is in cluster lab")
        await node.stop()
        await said("STOPPING=1")


async def test_started_before_everything_it_waits_and_follows_the_broker(lab: Lab, tmp_path: Path) -> None:
    """It gets no address: it finds the coordinator when that appears, and again when that appears elsewhere."""
    node = await lab.node("--log-level", "INFO", join=False, POTLUCK_BUS__RECONNECT_MAX_SECONDS="0.5")
    await eventually(lambda: "node started" in node.log())
    await eventually(lambda: "no coordinator of cluster 'lab' is found by mDNS yet" in node.log(), 15)
    assert node.log().count("no coordinator") == 1
    coordinator = Service("c1", TOPICS.cluster, "coordinator", "127.0.0.1", 1, broker_port=lab.broker.port)
    async with Discovery(TOPICS.cluster) as discovery:
        await discovery.advertise(coordinator)
        birth = await lab.heard(NodeStatus, lambda one: one.state == "online", seconds=15)
        assert await discovery.wait_for(lambda one: one.role == "node" and one.id == "n1", 10)

        elsewhere = TestBroker(some_kind(), tmp_path / "elsewhere")
        (tmp_path / "elsewhere").mkdir()
        await elsewhere.start()
        again = MqttBus(elsewhere.address, TOPICS, Credentials(), client_id="elsewhere")
        births: list[object] = []
        again.subscribe(TOPICS.node("n1", "status"), lambda envelope: births.append(envelope.message))
        running = asyncio.create_task(again.run(), name="elsewhere")
        await again.connected(5)
        async with Discovery(TOPICS.cluster) as moved:
            await moved.advertise(
                Service("c2", TOPICS.cluster, "coordinator", "127.0.0.1", 1, broker_port=elsewhere.port)
            )
            assert await discovery.wait_for(lambda one: one.id == "c2", 5)
            await lab.broker.kill()  # its record stays: nobody withdrew it
            await eventually(lambda: birth in births, 15)
            await node.stop()
        running.cancel()
        await asyncio.wait([running])
        await elsewhere.stop()
    await lab.broker.start()


async def test_an_unconnected_node_stops_at_once(lab: Lab) -> None:
    node = await lab.node("--seed", "127.0.0.1:1", "--no-discovery", join=False)
    await eventually(lambda: "not connected" in node.log())
    started = time.monotonic()
    assert await node.stop(signal.SIGINT) == 0
    assert time.monotonic() - started < 1.5


async def test_it_speaks_through_the_embedded_broker_too(tmp_path: Path) -> None:
    async with node_lab(tmp_path, "embedded") as lab:
        node = await lab.node()
        await lab.lease("a1", "join")
        await lab.heard(ShardFinished)
        assert await node.stop() == 0
        await lab.heard(NodeStatus, lambda one: one.state == "offline")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--help"], 0, "usage: potluck-node"),
        (["--version"], 0, "potluck 0"),
        (["--node-id", "a/b"], 2, "node id 'a/b': use letters"),
        (["--listen", "0.0.0.0"], 2, "--insecure"),
        (["--port", "99999"], 2, "listen.port"),
        (["--config", "/no/such.toml"], 2, "/no/such.toml"),
        (["--cluster", "a b"], 2, "cluster name"),
        (["--seed", "host:port"], 2, "'host:port'"),
        (["--state-dir", "/proc/nowhere"], 2, "--state-dir"),
        (["--what"], 2, "--what"),
    ],
)
async def test_bad_arguments_are_named(tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    command = [sys.executable, "-m", "node", "--state-dir", str(tmp_path / "state"), *arguments]
    node = NodeProcess(tmp_path, command)
    await node.start()
    assert await node.ended(20) == code
    assert words in node.log()
    assert "Traceback" not in node.log()


async def test_a_state_folder_has_one_node_and_keeps_its_id(lab: Lab, tmp_path: Path) -> None:
    state = str(tmp_path / "shared")
    command = [sys.executable, "-m", "node", "--state-dir", state, "--seed", "127.0.0.1:1", "--no-discovery"]
    first = NodeProcess(tmp_path, command)
    await first.start()
    await eventually(lambda: "node started" in first.log())
    second = NodeProcess(tmp_path, command)
    await second.start()
    assert await second.ended() == 1
    assert f"is in use by another node (pid {first.pid}, " in second.log()
    await first.stop(signal.SIGKILL)
    third = NodeProcess(tmp_path, command)
    await third.start()
    await eventually(lambda: "node started" in third.log())
    await third.stop()
    kept = (tmp_path / "shared" / "node-id").read_text()
    assert f"node={kept} " in first.log()
    assert f"node={kept} " in third.log()


async def test_missing_data_are_reported_and_tried_again(lab: Lab, tmp_path: Path) -> None:
    late = tmp_path / "late.csv"
    node = await lab.node("--data", f"late={late}", "--data", f"long=/{'a' * 300}", POTLUCK_DATA_RETRY_SECONDS="0.1")
    missing = await lab.heard(NodeCapacity, lambda one: len(one.data_missing) == 2)
    assert "late.csv does not exist" in missing.data_missing["late"]
    assert "cannot be read: File name too long" in missing.data_missing["long"]
    assert missing.data == ()
    late.write_text("a,b,label\n1,2,cat\n3,4,dog\n")
    found = await lab.heard(NodeCapacity, lambda one: len(one.data) == 1)
    assert [(data.name, data.count) for data in found.data] == [("late", 2)]
    assert set(found.data_missing) == {"long"}
    await lab.lease("a1", "join")
    await lab.heard(ShardFinished)
    assert node.log().count("data not available") == 2, "once each, however often they are tried"
    assert "Traceback" not in node.log()


# --- shards ------------------------------------------------------------------------------------------------------------------


async def test_a_shard_is_done_once_and_its_result_told_until_it_is_acknowledged(lab: Lab) -> None:
    await lab.node()
    lab.acknowledging = False
    lease = await lab.lease("a1", "join")
    await lab.heard(LeaseTaken)
    assert isinstance(lease.task, ExportTask)
    stored = await lab.heard(BlobsStored)
    assert set(stored.blobs) == {lease.task.model.sha256, lease.task.weights.sha256}
    finished = await lab.heard(ShardFinished)
    await lab.command(lease)  # again, like a coordinator that did not hear the answer
    await lab.heard(ShardFinished, after=3)
    assert all(one == finished for one in lab.all(ShardFinished))
    lab.acknowledging = True
    await lab.heard(ShardFinished, after=len(lab.all(ShardFinished)))
    assert isinstance(finished.result, TrainResult)
    assert sorted(await lab.fetch(finished.result.update)) == sorted(b"modelweights")
    await lab.lease("a2", "join")
    await lab.heard(ShardFinished, lambda one: one.attempt_id == "a2")
    said = len(lab.all(ShardFinished))
    await lab.heard(NodeTelemetry)  # resends would have come by now
    assert len(lab.all(ShardFinished)) <= said + 1
    assert len(lab.all(BlobsStored)) == 2  # the fetched blob, and the one that was made: each once


async def test_the_blobs_of_a_lease_come_from_the_holders_in_its_hints(lab: Lab) -> None:
    """From nodes by the hash, and from the coordinator, which has all blobs. The body of the lease names no holder."""
    await lab.node()
    model, weights = (replace(lab.blob(data), holders=()) for data in (b"model", b"weights"))
    task = ExportTask(model=model, weights=weights)
    await lab.lease("a1", "join", task=task, hints=LeaseHints(http=lab.urls))
    finished = await lab.heard(ShardFinished)
    assert isinstance(finished.result, TrainResult)
    assert sorted(await lab.fetch(finished.result.update)) == sorted(b"modelweights")
    other = replace(lab.blob(b"others"), holders=())
    hints = LeaseHints(holders={other.sha256[-16:]: ("http://127.0.0.1:1", *lab.urls)})
    await lab.lease("a2", "join", task=replace(task, weights=other), hints=hints)
    await lab.heard(ShardFinished, lambda one: one.attempt_id == "a2")


async def test_it_holds_three_leases_works_in_turn_and_obeys_withdrawals(lab: Lab) -> None:
    await lab.node()
    for attempt_id, job_id in (("a1", "slow"), ("a2", "slow"), ("a3", "join"), ("a4", "join")):
        await lab.lease(attempt_id, job_id)
    refused = await lab.heard(LeaseRefused)
    assert (refused.attempt_id, refused.error.code, refused.error.retryable) == ("a4", "overloaded", True)
    renewed = await lab.heard(LeaseRenewed, lambda one: one.attempt_id == "a1" and one.done > 1)
    assert renewed.metrics == {"loss": 0.5}
    await lab.heard(LeaseRenewed, lambda one: one.attempt_id == "a1" and one.also == ("a2", "a3"))
    assert all(one.attempt_id == "a1" for one in lab.all(LeaseRenewed)), "one message for all of them"
    await lab.command(WithdrawLease(epoch=1, attempt_id="a1", reason="test"))
    await lab.heard(LeaseRenewed, lambda one: one.attempt_id == "a2" and one.done > 1)
    await lab.command(WithdrawLease(epoch=1, attempt_id="a2", reason="test"))
    await lab.heard(ShardFinished, lambda one: one.attempt_id == "a3")
    assert not lab.all(ShardFailed)


async def test_an_older_coordinator_is_not_obeyed(lab: Lab) -> None:
    node = await lab.node()
    await lab.online(epoch=5)
    await lab.lease("old", "join", epoch=4)
    await lab.lease("new", "join", epoch=5)
    await lab.heard(ShardFinished, lambda one: one.attempt_id == "new")
    await lab.lease("not announced", "slow", epoch=6)
    await lab.online(epoch=6)
    await lab.lease("newer", "slow", epoch=6)
    await lab.heard(LeaseTaken, lambda one: one.attempt_id == "newer")
    await lab.command(WithdrawLease(epoch=5, attempt_id="newer", reason="from the past"))
    await lab.load("m:1/1", epoch=5)
    await lab.heard(LeaseRenewed, lambda one: one.done > 20)
    assert not [one for one in lab.said if getattr(one, "attempt_id", "") in ("old", "not announced")]
    await lab.online(epoch=5)
    await eventually(lambda: "coordinator of an older epoch ignored" in node.log())


async def test_a_new_bus_may_have_a_coordinator_that_counts_from_one(lab: Lab) -> None:
    await lab.node()
    await lab.online(epoch=9)
    await lab.lease("a1", "join", epoch=9)
    await lab.heard(ShardFinished)
    await lab.broker.kill()
    told = len(lab.all(NodeStatus))
    await lab.broker.start()  # mosquitto without persistence: nothing is retained
    await lab.bus.connected(5)
    await lab.heard(NodeStatus, lambda one: one.state == "online", after=told)
    await lab.online(epoch=1, cluster_id="another")
    await lab.lease("a2", "join", epoch=1)
    await lab.heard(ShardFinished, lambda one: one.attempt_id == "a2")


async def test_a_replaced_coordinator_is_obeyed_on_no_bus(lab: Lab) -> None:
    await lab.node()
    await lab.online(epoch=9)
    await lab.lease("a1", "join", epoch=9)
    await lab.heard(ShardFinished)
    told = len(lab.all(NodeStatus))
    await lab.broker.kill()
    await lab.broker.start()
    await lab.bus.connected(5)
    await lab.heard(NodeStatus, lambda one: one.state == "online", after=told)
    await lab.lease("a2", "join", epoch=8)
    await lab.lease("a3", "join", epoch=9)
    await lab.heard(ShardFinished, lambda one: one.attempt_id == "a3")
    assert not [one for one in lab.all(LeaseTaken) if one.attempt_id == "a2"]


async def test_errors_are_passed_on_unchanged(lab: Lab) -> None:
    await lab.node()
    await lab.lease("a1", "bad")
    failed = await lab.heard(ShardFailed)
    assert (failed.error.code, failed.error.message) == ("invalid_model", "no optimizer: compile the model")
    nowhere = BlobRef(sha256="0" * 64, size=5, holders=())
    await lab.lease("a2", "join", task=ExportTask(model=nowhere, weights=nowhere))
    failed = await lab.heard(ShardFailed, lambda one: one.attempt_id == "a2", seconds=60)
    assert failed.error.code == "unavailable"
    assert failed.error.retryable


async def test_a_shard_that_kills_its_engine_harms_nothing_else(lab: Lab) -> None:
    node = await lab.node()
    await lab.lease("a1", "crash")
    await lab.lease("a2", "join")
    failed = await lab.heard(ShardFailed)
    assert (failed.attempt_id, failed.error.code) == ("a1", "engine_failed")
    assert "SIGSEGV" in failed.error.message
    await lab.heard(ShardFinished, lambda one: one.attempt_id == "a2")
    assert node.log().count("engine started engine=work") == 2


async def test_an_engine_that_does_not_stop_its_task_is_ended(lab: Lab) -> None:
    await lab.node()
    await lab.lease("a1", "deaf")
    await lab.lease("a2", "join")
    await lab.heard(LeaseRenewed)
    await lab.command(WithdrawLease(epoch=1, attempt_id="a1", reason="test"))
    await lab.heard(ShardFinished, lambda one: one.attempt_id == "a2")
    assert not lab.all(ShardFailed)


async def test_large_results_travel_as_blobs(lab: Lab) -> None:
    await lab.node()
    await lab.lease("a1", "predict")
    await lab.lease("a2", "predict-big")
    await lab.lease("a3", "evaluate")
    small = await lab.heard(ShardFinished, lambda one: one.attempt_id == "a1")
    assert isinstance(small.result, PredictResult)
    assert small.result.outputs[0].data == bytes(8)
    large = await lab.heard(ShardFinished, lambda one: one.attempt_id == "a2")
    assert isinstance(large.result, PredictResult)
    ref = large.result.outputs[0].data
    assert isinstance(ref, BlobRef)
    assert await lab.fetch(ref) == bytes(ref.size)
    counted = await lab.heard(ShardFinished, lambda one: one.attempt_id == "a3")
    assert isinstance(counted.result, EvaluateResult)
    assert (counted.result.sums, counted.result.confusion) == ({"loss": 1.0}, ())


async def test_a_stopping_node_gives_its_leases_back(lab: Lab) -> None:
    node = await lab.node()
    for attempt_id in ("a1", "a2"):
        await lab.lease(attempt_id, "slow")
    await lab.heard(LeaseRenewed, lambda one: one.attempt_id == "a1" and one.done > 1)
    started = time.monotonic()
    assert await node.stop() == 0
    assert time.monotonic() - started < 3
    kinds = [type(one).__name__ for one in lab.said]
    assert kinds[-1] == "NodeStatus"
    assert {one.attempt_id: one.error.code for one in lab.all(LeaseRefused)} == {
        "a1": "unavailable",
        "a2": "unavailable",
    }
    assert "Traceback" not in node.log()


async def test_work_goes_on_while_the_broker_is_away(lab: Lab) -> None:
    node = await lab.node()
    await lab.lease("a1", "slow")
    await lab.lease("a2", "join")
    await lab.heard(LeaseRenewed, lambda one: one.done > 1)
    (birth,) = lab.all(NodeStatus)
    await lab.broker.kill()
    await eventually(lambda: "not connected" in node.log())
    await lab.broker.start()
    await lab.bus.connected(5)
    await lab.heard(NodeStatus, lambda one: one == birth, after=1)  # the same session: nothing was lost
    before = max(one.done for one in lab.all(LeaseRenewed))
    await lab.heard(LeaseRenewed, lambda one: one.done > before)
    await lab.command(WithdrawLease(epoch=1, attempt_id="a1", reason="test"))
    await lab.heard(ShardFinished, lambda one: one.attempt_id == "a2")


async def test_an_idle_engine_is_stopped_and_comes_back(lab: Lab) -> None:
    node = await lab.node(POTLUCK_ENGINE_IDLE_SECONDS="0.4")
    await lab.lease("a1", "join")
    await lab.heard(ShardFinished)
    await eventually(lambda: "engine stopped engine=work" in node.log())
    await lab.lease("a2", "slow")
    await lab.heard(LeaseRenewed, lambda one: one.done > 100)  # longer than the idle time
    assert node.log().count("engine stopped engine=work") == 1


async def test_strange_messages_are_survived(lab: Lab) -> None:
    node = await lab.node()
    await lab.command(ListNodes())
    await lab.command(ForgetJob(job_id="never heard of"))
    await lab.command(WithdrawLease(epoch=1, attempt_id="never heard of", reason="test"))
    await lab.command(RequestFailed(error={"code": "x", "message": "y"}))  # type: ignore[arg-type]
    await lab.bus._send(TOPICS.node("n1", "inbox"), b"\x81\xa4type", 1, False)
    await lab.bus._send(TOPICS.node("n1", "inbox"), b'{"type": "LeaseShard", "epoch": "many"}', 1, False)
    await lab.bus._send(TOPICS.coordinator_status, b"rubbish", 1, False)
    await lab.bus.publish(TOPICS.node("n1", "status"), CoordinatorStatus(session="x", epoch=1, state="offline"))
    await lab.lease("a1", "join")
    await lab.heard(ShardFinished)
    assert node.log().count("Traceback") == 0


async def test_blobs_are_read_only(lab: Lab) -> None:
    await lab.node()
    base = (await lab.heard(NodeStatus)).http[0]
    ref = lab.blob(b"unwanted")
    async with aiohttp.ClientSession() as http:
        async with http.get(f"{base}/blobs/{ref.sha256}") as answer:
            assert answer.status == 404
        async with http.put(f"{base}/blobs/{ref.sha256}", data=b"unwanted") as answer:
            assert answer.status == 405


@pytest.mark.tensorflow
@pytest.mark.parametrize("hidden", [False, True])
async def test_a_gpu_that_tensorflow_does_not_use_is_logged_once(lab: Lab, tmp_path: Path, hidden: bool) -> None:
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu/pynvml.py").write_text(PYNVML)
    environment = {"PYTHONPATH": str(tmp_path / "gpu")} | ({"CUDA_VISIBLE_DEVICES": ""} if hidden else {})
    node = await lab.node(fake=False, **environment)
    for number in range(2):  # an engine that is busy or broken logs nothing new
        await lab.lease(f"a{number}", "job")
        await lab.heard(ShardFailed, lambda one, name=f"a{number}": one.attempt_id == name, seconds=60)
    assert node.log().count("GPUs are not used") == (0 if hidden else 1)


async def test_a_stopping_node_finishes_what_is_nearly_done_and_answers_first(lab: Lab) -> None:
    """One lease that ends within the time, one that waits, a batch under way, and one that comes too late."""
    node = await lab.node()
    await lab.load("m:1#1")
    await lab.heard(ModelLoaded)
    part = DataSlice(blob=lab.blob(b"data"), start=0, stop=200)
    task = EvaluateTask(
        model=lab.blob(b"model"), weights=None, slices=(part,), format=DataFormat(kind="arrays"), image=None, batch_size=1
    )  # fmt: skip
    await lab.lease("a1", "soon", task=task)
    await lab.lease("a2", "slow")
    await lab.heard(LeaseRenewed, lambda one: one.attempt_id == "a1" and one.done > 20)
    slow = Tensor(name="slow", datatype="UINT8", shape=(1, 1), data=b"\0")
    await lab.infer("b1", "m:1#1", slow)
    await lab.infer("b2", "m:1#1", replace(slow, name="quick"))
    await lab.heard(InferenceFinished, lambda one: one.id == "b2")
    assert await node.stop() == 0
    await lab.bus.publish(
        TOPICS.node("n1", "outbox"), ModelUnloaded(replica_id="the last")
    )  # the broker keeps the order
    await lab.heard(ModelUnloaded, lambda one: one.replica_id == "the last")
    (finished,) = lab.all(ShardFinished)
    assert (finished.attempt_id, finished.result) == ("a1", replace(finished.result, count=200))
    assert [one.attempt_id for one in lab.all(LeaseRefused)] == ["a2"]
    assert [one.id for one in lab.all(InferenceFinished)] == ["b2", "b1"]
    assert [one.left for one in lab.all(NodeStatus) if one.state == "offline"] == [True], "a goodbye, and no will"
    assert isinstance(lab.said[-2], NodeStatus), "after all else"


async def test_a_node_that_stops_with_its_coordinator_answers_what_it_was_asked(lab: Lab) -> None:
    """A coordinator that stops says so first, and then waits for its answers."""
    node = await lab.node()
    await lab.load("m:1#1")
    await lab.heard(ModelLoaded)
    for name in ("slow", "quick"):
        await lab.infer(name, "m:1#1", Tensor(name=name, datatype="UINT8", shape=(1, 1), data=b"\0"))
    await lab.heard(InferenceFinished, lambda one: one.id == "quick")
    await lab.bus.publish(
        TOPICS.coordinator_status, CoordinatorStatus(session="s1", epoch=1, state="offline", since=time.time()), retain=True
    )  # fmt: skip
    assert await node.stop() == 0
    await lab.heard(InferenceFinished, lambda one: one.id == "slow")
