"""The dispatcher on a real journal and a bus in memory: each shard is done once, in turn, and journaled before anybody hears of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coordinator.copies.locations import Holders
from coordinator.dispatch.announcer import Announcer
from coordinator.dispatch.collecting import Collector
from coordinator.dispatch.dispatcher import Dispatcher
from coordinator.dispatch.jobstore import JobStore
from coordinator.dispatch.leases import BEHIND, Leases
from coordinator.journal import Journal
from coordinator.membership import Membership
from coordinator.plans.events import AnyEvent, AttemptEnded, AttemptFinished, AttemptLeased
from coordinator.plans.job import EndlessChoices, Job, settled
from coordinator.registry import Registry
from potluck.blobs.store import BlobStore
from potluck.bus.exchange import Envelope
from potluck.bus.outbox import Outbox
from potluck.settings import CoordinatorSettings
from potluck.wire import codec
from potluck.wire.births import NodeCapacity, NodeStatus
from potluck.wire.commands import AcknowledgeResult, LeaseShard
from potluck.wire.jobs import Evaluate
from potluck.wire.reports import LeaseRenewed, LeaseTaken, ShardFailed, ShardFinished
from potluck.wire.tasks import EvaluateResult, EvaluateTask
from potluck.wire.topics import Topics
from potluck.wire.values import BlobRef, Capacity, DataFormat, Dataset, DataShard, ErrorInfo
from support.eventually import eventually
from support.fake_bus import FakeBroker, FakeBus

TOPICS = Topics("test")
ITEMS = 4096


class Lab:
    """`mute` nodes take leases and never answer again. Messages to a node are checked against the journal at that moment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broker = FakeBroker()
        self.store = BlobStore(folder / "blobs", 2**30)
        self.membership = Membership(timeout_seconds=60)
        self.mute: set[str] = set()
        self.done: dict[str, list[str]] = {}
        """Acknowledged attempts of each node."""
        self.unwritten: list[str] = []
        """Messages that nodes got before their event was written."""

    def open(self) -> None:
        """A coordinator on the journal, as after a start."""
        self.journal = Journal(self.folder / "journal")
        self.bus = FakeBus(self.broker, TOPICS, client_id=f"coordinator-{self.journal.epoch}")
        self.outbox = Outbox(self.bus, before=self.journal.flush)
        settings = CoordinatorSettings(resend_seconds=0.2)
        registry = Registry(self.journal)
        self.jobs = JobStore(self.journal, registry, self.store, tuple, lambda name: Dataset)  # type: ignore[arg-type, return-value]
        leases = Leases(
            topics=TOPICS, outbox=self.outbox, membership=self.membership, settings=settings, epoch=self.journal.epoch,
            holders=Holders(self.membership, tuple),
        )  # fmt: skip
        packed: Any = SimpleNamespace(
            asked=lambda spec: None, refused=lambda spec: None, ended=lambda spec: None, tick=lambda: None
        )
        nothing: Any = None
        self.registry = registry
        self.dispatcher = Dispatcher(
            announcer=Announcer(TOPICS, self.outbox, self.jobs, leases, tuple), registry=registry, serving=nothing, jobs=self.jobs,
            leases=leases, collector=Collector(self.store, nothing), packed=packed, settings=settings,
        )  # fmt: skip
        self.bus.subscribe(TOPICS.node("+", "outbox"), self._on_outbox)
        self.tasks = [asyncio.create_task(part) for part in (self.bus.run(), self.outbox.run(), self.dispatcher.run())]

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.wait(self.tasks)
        self.journal.close()

    def _on_outbox(self, envelope: Envelope) -> None:
        self.dispatcher.on_node_message(TOPICS.segment(envelope.topic, 1), envelope.message)

    async def node(self, node_id: str, seconds: float = 0.0) -> FakeBus:
        """A node that has the result of a shard after this long."""
        capacity = Capacity(hostname="h", system="s", cores=1, memory_bytes=1, runtimes={"tensorflow": "2"}, gflops=1.0)
        self.membership.on_capacity(NodeCapacity(node_id=node_id, capacity=capacity), 0.0)
        self.membership.on_status(NodeStatus(node_id=node_id, session="1", state="online"), 0.0)
        bus = FakeBus(self.broker, TOPICS, client_id=node_id)
        outbox = TOPICS.node(node_id, "outbox")
        said: set[str] = set()

        def on_command(envelope: Envelope) -> None:
            match envelope.message:
                case LeaseShard(task=EvaluateTask() as task, attempt_id=attempt_id):
                    self._written(AttemptLeased, attempt_id)
                    bus.publish_now(outbox, LeaseTaken(attempt_id=attempt_id))
                    if node_id not in self.mute and attempt_id not in said:
                        said.add(attempt_id)
                        count = sum(one.stop - one.start for one in task.slices)
                        result = EvaluateResult(count=count, sums={"loss": 2.0 * count}, seconds=0.05)
                        asyncio.get_running_loop().call_later(
                            seconds, bus.publish_now, outbox, ShardFinished(attempt_id=attempt_id, result=result)
                        )
                case AcknowledgeResult(attempt_id=attempt_id):
                    self._written(AttemptFinished, attempt_id)
                    self.done.setdefault(node_id, []).append(attempt_id)
                case _:
                    pass

        bus.subscribe(TOPICS.node(node_id, "inbox"), on_command)
        self.tasks.append(asyncio.create_task(bus.run()))
        await bus.connected(1)
        self.dispatcher.node_joined()
        return bus

    def _written(self, kind: type[AttemptLeased | AttemptFinished], attempt_id: str) -> None:
        rows = self.journal._db.execute("SELECT body FROM events").fetchall()
        events = [codec.unpack(body, AnyEvent) for (body,) in rows if attempt_id.encode() in body]  # type: ignore[arg-type]
        if not any(isinstance(event, kind | AttemptFinished | AttemptEnded) for event in events) and all(
            job.active for job in self.jobs.jobs.values()
        ):
            self.unwritten.append(f"{kind.__name__} {attempt_id}")

    def submit(self, request_id: str = "", owner: str = "") -> Job:
        blob = self.store.put_bytes(b"no model")
        self.registry.add_model("m", blob, now=1.0)
        shards = tuple(
            DataShard(blob=self.store.put_bytes(b"shard %d" % number), count=ITEMS // 4) for number in range(4)
        )
        data = Dataset(name="d", format=DataFormat(kind="arrays", inputs=("x",)), count=ITEMS, shards=shards)
        self.registry.add_dataset("d", self.store.put_bytes(codec.pack(data)), data)
        return self.dispatcher.submit(Evaluate(model="m:1", dataset="d", batch_size=16), request_id, owner)


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    made = Lab(tmp_path)
    made.open()
    yield made
    await made.close()


def loss(job: Job) -> float:
    assert job.ended is not None
    assert job.ended.state == "succeeded", job.ended.error
    assert job.ended.evaluation is not None
    return job.ended.evaluation.metrics["loss"]


async def test_a_job_is_done_by_all_and_nobody_hears_of_what_is_not_written(lab: Lab) -> None:
    for number in range(5):
        await lab.node(f"n{number}")
    job = lab.submit()
    await eventually(lambda: job.ended is not None)
    assert loss(job) == 2.0
    assert job.ended is not None
    assert job.ended.evaluation is not None
    assert job.ended.evaluation.count == ITEMS
    assert set(lab.done) == {f"n{number}" for number in range(5)}
    assert lab.unwritten == []


async def test_jobs_get_free_slots_in_turn(lab: Lab) -> None:
    await lab.node("n1", seconds=0.02)
    jobs = [lab.submit(f"q{number}") for number in range(6)]
    await eventually(lambda: all(job.leased_at for job in jobs), timeout_seconds=5)
    assert not any(job.ended for job in jobs), "the last has begun before the first has ended"


async def test_a_job_whose_plan_goes_on_choosing_ends_and_no_node_is_blamed(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    await lab.node("n1")
    other = lab.submit()

    def goes_on(job: Job, view: Any, record: Any) -> list[Any]:
        if job is other:
            return settled(job, view, record)
        raise EndlessChoices("for ever")

    monkeypatch.setattr("coordinator.dispatch.dispatcher.settled", goes_on)
    job = lab.submit("endless")
    await eventually(lambda: job.ended is not None, timeout_seconds=10)
    assert job.ended is not None
    assert job.ended.error is not None
    assert (job.ended.error.code, "for ever" in job.ended.error.message) == ("internal", True)
    assert lab.membership.quarantined() == {}
    await eventually(lambda: other.ended is not None)
    assert loss(other) == 2.0


async def test_a_coordinator_that_starts_again_goes_on_where_it_was(lab: Lab) -> None:
    lab.mute = {"n1"}
    await lab.node("n1")
    job = lab.submit("asked once", "client:ann")
    await eventually(lambda: bool(job.attempts))
    open_attempts = set(job.attempts)
    await lab.close()
    lab.mute = set()
    lab.tasks = []
    lab.open()
    again = lab.dispatcher.submit(job.submitted.spec, "asked once")
    assert again.job_id == job.job_id
    assert again.submitted.owner == "client:ann"
    assert set(again.attempts) == open_attempts
    await lab.node("n1")  # its earlier attempts are leased to it again, and done
    await eventually(lambda: again.ended is not None)
    assert loss(again) == 2.0
    assert open_attempts <= set(lab.done["n1"])
    assert isinstance(again.submitted.model, BlobRef)


@pytest.mark.parametrize(
    "said",
    [
        ShardFinished(attempt_id="unknown", result=EvaluateResult(count=1)),
        ShardFailed(attempt_id="unknown", error=ErrorInfo(code="internal", message="x")),
        LeaseRenewed(attempt_id="unknown"),
    ],
    ids=lambda said: type(said).__name__,
)
async def test_what_nodes_repeat_is_not_answered_while_many_answers_wait(lab: Lab, said: Any) -> None:
    """A thousand nodes that repeated their results, because we were slow, made us slower: each copy got an answer of its own."""
    await lab.node("n1")
    for _ in range(3 * BEHIND):
        lab.dispatcher.on_node_message("n1", said)
    assert lab.outbox.waiting == BEHIND + 1
    await lab.outbox.drained()
    lab.dispatcher.on_node_message("n1", said)
    assert lab.outbox.waiting == 1, "the answers before may be lost"
