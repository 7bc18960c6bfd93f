"""Nodes whose results are not what was asked for: what happens to the result, and to the node."""

from __future__ import annotations

import asyncio
from math import nan
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from msgspec.structs import replace

from coordinator.copies.locations import Holders
from coordinator.dispatch.dispatcher import Dispatcher
from coordinator.dispatch.judging import Judge
from coordinator.dispatch.leases import Held, Leases
from coordinator.membership import Membership
from coordinator.plans.job import Attempt
from potluck.settings import CoordinatorSettings
from potluck.wire import codec
from potluck.wire.births import NodeCapacity, NodeStatus
from potluck.wire.commands import LeaseShard
from potluck.wire.refs import hinted
from potluck.wire.tasks import EvaluateResult, EvaluateTask, PredictResult, TrainTask, WarmUpTask
from potluck.wire.topics import Topics
from potluck.wire.values import (
    CLASS_NAMES_LIMIT_BYTES,
    INLINE_LIMIT_BYTES,
    SHARDS_LIMIT,
    BlobRef,
    Capacity,
    DataFormat,
    DataShard,
    DataSlice,
)
from support.eventually import eventually

BLOB = BlobRef(sha256="a" * 64, size=1)
TASK = EvaluateTask(
    model=BLOB, weights=None, slices=(DataSlice(blob=BLOB, start=0, stop=8),), format=DataFormat(kind="arrays"), image=None,
    batch_size=4,
)  # fmt: skip
GOOD = EvaluateResult(count=8, sums={"loss": 1.0})
NO_NUMBER = EvaluateResult(count=8, sums={"loss": nan})


class Bench:
    def __init__(self, *nodes: str) -> None:
        self.membership = Membership(timeout_seconds=10)
        for node_id in nodes:
            capacity = Capacity(hostname="h", system="s", cores=1, memory_bytes=1, runtimes={"tensorflow": "2"})
            self.membership.on_capacity(NodeCapacity(node_id=node_id, capacity=capacity), 0.0)
            self.born(node_id, "1")
        self.leases = Leases(
            topics=Topics("test"), outbox=Mock(), membership=self.membership, settings=CoordinatorSettings(), epoch=1,
            holders=Holders(self.membership, lambda: ()),
        )  # fmt: skip
        others: Any = {name: Mock() for name in ("announcer", "registry", "serving", "jobs", "collector", "packed")}
        self.collector = others["collector"]
        self.collector.too_large.return_value = 0
        self.judge = Judge(self.leases, self.collector, others["announcer"], lambda: 0.0)
        self.dispatcher = Dispatcher(leases=self.leases, settings=CoordinatorSettings(), clock=lambda: 0.0, **others)

    def born(self, node_id: str, session: str) -> None:
        self.membership.on_status(NodeStatus(node_id=node_id, session=session, state="online"), 0.0)

    def refusal(self, node_id: str, result: Any, shard_id: str = "items-0-8", task: Any = TASK) -> str:
        """The code of the error with which the attempt ends; "": the result is taken."""
        lease = LeaseShard(epoch=1, job_id="j", shard_id=shard_id, attempt_id="a", lease_seconds=1, task=task)
        error = self.judge.refusal(Held("j", node_id, lease, heard_at=0.0), result)
        return error.code if error is not None else ""

    def nodes(self) -> list[str]:
        return [node.node_id for node in self.leases.view(0.0).nodes]


@pytest.mark.parametrize(
    "result", [EvaluateResult(count=0), EvaluateResult(count=2**53, sums={"loss": 1.0}), PredictResult(count=8)]
)
def test_the_third_wrong_result_is_the_last(result: Any) -> None:
    bench = Bench("n1", "n2")
    assert bench.refusal("n1", GOOD) == ""
    assert [bench.refusal("n1", result) for _ in range(2)] == ["engine_failed"] * 2
    assert bench.nodes() == ["n1", "n2"]
    bench.refusal("n1", result)
    assert bench.nodes() == ["n2"]
    assert "3 of its results were not what was asked for" in bench.leases.quarantined()["n1"]
    bench.born("n1", "2")
    assert bench.nodes() == ["n1", "n2"]


def test_a_loss_that_is_no_number_is_believed_of_a_second_node() -> None:
    bench = Bench("n1", "n2")
    assert bench.refusal("n1", NO_NUMBER) == "diverged"
    assert bench.refusal("n2", NO_NUMBER) == ""
    assert bench.refusal("n1", NO_NUMBER, "items-8-16") == ""
    assert bench.leases.quarantined() == {}


def test_who_alone_says_so_each_time_gets_no_more_jobs() -> None:
    bench = Bench("n1", "n2")
    for shard_id in ("items-0-8", "items-8-16", "items-16-24"):
        assert bench.refusal("n1", NO_NUMBER, shard_id) == "diverged"
        assert bench.refusal("n2", GOOD, shard_id) == ""
    assert bench.nodes() == ["n2"]


def test_the_only_node_is_believed() -> None:
    assert Bench("n1").refusal("n1", NO_NUMBER) == ""


def test_a_result_for_which_there_could_never_be_room_is_not_waited_for() -> None:
    bench = Bench("n1", "n2")
    bench.collector.too_large.return_value = 2**50
    assert bench.refusal("n1", GOOD) == "disk_full"
    assert bench.leases.quarantined() == {}, "the coordinator may be small"


def test_who_refuses_what_it_is_offered_is_offered_less_and_less() -> None:
    bench = Bench("n1", "n2")

    def free(now: float) -> dict[str, int]:
        return {node.node_id: node.free_slots for node in bench.leases.view(now).nodes}

    now, gaps = 0.0, []
    for _ in range(10):
        bench.leases.refused("n1", now)
        before = now
        while not free(now)["n1"]:
            assert free(now)["n2"] == 2
            now += 0.25
        gaps.append(now - before)
    assert gaps == [0.5, 1, 2, 4, 8, 16, 32, 60, 60, 60]
    bench.leases.accepted("n1")
    bench.leases.refused("n1", now)
    assert free(now + 0.5)["n1"] == 2


def test_a_lease_on_a_large_data_set_goes_into_a_message() -> None:
    """As many shards as a data set may have, class names as long as they may be, and each shard on many nodes."""
    bench = Bench(*(f"node-{number}" for number in range(20)))
    for number in range(20):
        url = f"http://machine-{number}.laboratory.example:31{number:03}"
        bench.membership.on_status(NodeStatus(node_id=f"node-{number}", session="2", state="online", http=(url,)), 0.0)
    shards = tuple(
        DataShard(blob=BlobRef(sha256=f"{number:064x}", size=2**28), count=10**6) for number in range(SHARDS_LIMIT)
    )
    for number in range(20):
        bench.leases._holders.stored(f"node-{number}", [shard.blob.sha256 for shard in shards])
    classes = tuple(f"{number:05}" for number in range(CLASS_NAMES_LIMIT_BYTES // 5))
    bench.leases._holders._urls = lambda: tuple(f"http://192.168.100.{number}:7814" for number in range(100, 120))
    task = TrainTask(
        model=BLOB, weights=BLOB, data=shards, format=DataFormat(kind="images", classes=classes), image=None, round=0, samples=1,
        seconds=1.0, batch_size=32, seed=1, compression="int8",
    )  # fmt: skip
    sent: list[Any] = []
    job: Any = SimpleNamespace(job_id="j" * 16)
    bench.leases.command = lambda node_id, message: sent.append(message)  # type: ignore[method-assign]
    evaluate = replace(
        TASK, slices=tuple(DataSlice(blob=shard.blob, start=0, stop=10**6) for shard in shards), format=task.format
    )
    for one in (task, WarmUpTask(task=task), evaluate):
        attempt = Attempt("a" * 16, "round-0", "node-1", 0.0, one)
        bench.leases.send(bench.leases.hold(job, attempt, 0.0), 0.0)
        assert len(codec.encode(sent[-1])) < INLINE_LIMIT_BYTES
    peers = [sent[0].hints.holders[shard.blob.sha256[-16:]] for shard in sent[0].task.data]
    assert {len(one) for one in peers} == {1}
    assert len(set(peers)) > 5, "one of those that have it, and not always the same"
    found = [shard.blob.holders for shard in hinted(sent[0]).task.data]
    assert all(len(holders) == 21 and peer[0] in holders for holders, peer in zip(found, peers, strict=True))
    assert all(len(shard.blob.holders) == 1 for shard in sent[0].task.data), "for a node that reads no hints"


async def test_whoever_waits_the_longest_for_a_nodes_time_is_planned_first() -> None:
    """Otherwise, endless jobs would keep all later jobs from any slot."""
    bench = Bench("n1")
    jobs = {
        name: SimpleNamespace(job_id=name, leased_at=at)
        for name, at in (("endless", 50.0), ("new", 0.0), ("older", 20.0))
    }
    store: Any = SimpleNamespace(active={}, jobs=jobs, pin_rounds=lambda: None)
    planned: list[str] = []
    dispatcher: Any = bench.dispatcher
    dispatcher._store, dispatcher._plan = store, lambda job: planned.append(job.job_id)
    dispatcher._dirty = dict.fromkeys(jobs)
    dispatcher._wake.set()
    running = asyncio.create_task(dispatcher.run())
    await eventually(lambda: len(planned) == 3)
    running.cancel()
    await asyncio.wait([running])
    assert planned == ["new", "older", "endless"]
