"""Questions to the coordinator that are answered in another way than asked for: tested here without a cluster."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from coordinator.control import MANIFEST_LIMIT_BYTES, Control, _is_same
from coordinator.dispatch.dispatcher import Dispatcher
from coordinator.events.stream import Events
from coordinator.journal import Journal
from coordinator.membership import Membership
from coordinator.registry import Registry
from coordinator.requests import LATER_LIMIT, Requests
from potluck.blobs.store import BlobStore
from potluck.bus.exchange import Envelope
from potluck.client import listings
from potluck.errors import Unavailable
from potluck.wire import codec
from potluck.wire.births import NodeCapacity, NodeStatus
from potluck.wire.jobs import AnyJobSpec, Deploy, Evaluate, Train
from potluck.wire.questions import (
    AddDataset,
    DeploymentInfo,
    EventsListed,
    FollowEvents,
    ListModels,
    ModelChanged,
    ModelInfo,
    ModelsListed,
    RemoveAlias,
    ReplicaInfo,
    SubmitJob,
    Undeploy,
)
from potluck.wire.values import (
    INLINE_LIMIT_BYTES,
    SHARDS_LIMIT,
    BlobRef,
    Capacity,
    DataFormat,
    Dataset,
    DataShard,
    Message,
    NodeData,
)
from support.eventually import eventually


async def synced() -> None:
    """Records that what was written is on the disk."""


def asking(outbox: Any, clock: Callable[[], float] = time.time, **parts: Any) -> Requests:
    async def send(question: Envelope, answer: Message) -> None:
        outbox.reply(question, answer)

    return Requests(outbox, Control(clock=clock, **{"events": None, **parts}), send)


class Replies:
    def __init__(self) -> None:
        self.refused: list[str] = []

    def reply(self, question: Envelope, answer: Message) -> None:
        raise AssertionError(answer)

    def refuse(self, question: Envelope, error: Any) -> None:
        self.refused.append(error.code)


def test_too_many_questions_at_a_time_are_refused(tmp_path: Path) -> None:
    replies: Any = Replies()
    nothing: Any = None
    requests = asking(
        outbox=replies, dispatcher=nothing, registry=nothing, serving=nothing, membership=nothing, deletion=nothing, packed=nothing, holders=nothing,
        store=BlobStore(tmp_path, 1), urls=lambda: (), sync=synced,
    )  # fmt: skip
    for number in range(102):
        requests.on_request(Envelope("t", Undeploy(id=str(number), model="m"), reply_to="a"))
    assert replies.refused == ["overloaded", "overloaded"]


async def test_a_job_is_acknowledged_when_it_is_on_the_disk(tmp_path: Path) -> None:
    syncs: list[asyncio.Future[None]] = []

    async def sync() -> None:
        syncs.append(asyncio.get_running_loop().create_future())
        await syncs[-1]

    said: list[tuple[str, str]] = []
    replies: Any = SimpleNamespace(
        reply=lambda question, answer: said.append((question.message.id, answer.job_id)),
        refuse=lambda question, error: said.append((question.message.id, error.code)),
    )
    spec = Evaluate(model="m", dataset="d")
    job: Any = SimpleNamespace(job_id="j", submitted=SimpleNamespace(spec=spec))
    nothing: Any = None
    requests = asking(
        outbox=replies, dispatcher=cast(Any, SimpleNamespace(submit=lambda spec, request_id, owner: job)), registry=nothing, serving=nothing,
        membership=nothing, deletion=nothing, packed=nothing, holders=nothing, store=BlobStore(tmp_path, 1), urls=lambda: (), sync=sync,
    )  # fmt: skip
    running = asyncio.create_task(requests.run())
    for number in range(5):
        requests.on_request(Envelope("t", SubmitJob(id=f"q{number}", job=spec), reply_to="a"))
        await asyncio.sleep(0.01)
    await eventually(lambda: len(syncs) == 5)
    assert said == []
    syncs[0].set_result(None)
    await eventually(lambda: said == [("q0", "j")])
    for sync_under_way in syncs[1:]:
        sync_under_way.set_exception(Unavailable("the journal may not be on the disk"))
    await eventually(lambda: len(said) == 5)
    assert said[1:] == [(f"q{number}", "unavailable") for number in range(1, 5)]
    running.cancel()
    await asyncio.wait([running])


async def test_a_job_that_is_refused_for_too_many_was_not_submitted(tmp_path: Path) -> None:
    submitted: list[str] = []
    spec = Evaluate(model="m", dataset="d")
    job: Any = SimpleNamespace(job_id="j", submitted=SimpleNamespace(spec=spec))

    def submit(asked: AnyJobSpec, request_id: str, owner: str) -> Any:
        submitted.append(request_id)
        return job

    replies: Any = Replies()
    nothing: Any = None
    requests = asking(
        outbox=replies, dispatcher=cast(Any, SimpleNamespace(submit=submit)), registry=nothing, serving=nothing, membership=nothing,
        deletion=nothing, packed=nothing, holders=nothing, store=BlobStore(tmp_path, 1), urls=lambda: (), sync=synced,
    )  # fmt: skip
    for number in range(LATER_LIMIT + 20):
        requests.on_request(Envelope("t", SubmitJob(id=f"q{number}", job=spec), reply_to="a"))
    assert (len(submitted), replies.refused) == (LATER_LIMIT, ["overloaded"] * 20)


def test_a_question_whose_time_is_up_is_told_by_whose_clock(tmp_path: Path) -> None:
    replies: Any = Replies()
    nothing: Any = None
    said: list[str] = []
    replies.refuse = lambda question, error: said.append(f"{error.code}: {error.message}")
    requests = asking(
        outbox=replies, dispatcher=nothing, registry=nothing, serving=nothing, membership=nothing, deletion=nothing, packed=nothing, holders=nothing,
        store=BlobStore(tmp_path, 1), urls=lambda: (), sync=synced, clock=lambda: 5000.0,
    )  # fmt: skip
    requests.on_request(Envelope("t", Undeploy(id="1", model="m", expires=1400.0), reply_to="a"))
    assert len(said) == 1
    assert said[0].startswith("timed_out: it came 3600 s after its time was up (`expires`) by the coordinator's clock")


def test_what_was_taken_away_is_answered_alike_when_it_is_asked_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    registry = Registry(journal)
    registry.add_model("m", BlobRef(sha256="0" * 64, size=1), now=1.0)
    registry.set_alias("m:1", "prod")
    nothing: Any = None
    answered: list[Message] = []
    replies: Any = Replies()
    replies.reply = lambda question, answer: answered.append(answer)
    requests = asking(
        outbox=replies, dispatcher=nothing, registry=registry, serving=nothing, membership=nothing, deletion=nothing, packed=nothing,
        holders=nothing, store=BlobStore(tmp_path / "blobs", 1), urls=lambda: (), sync=synced,
    )  # fmt: skip
    for question_id in ("q-1", "q-1", "q-2", "q-1"):
        requests.on_request(Envelope("t", RemoveAlias(id=question_id, model="m:prod"), reply_to="a"))
    assert answered == [ModelChanged(model=registry.model("m"))] * 3
    assert replies.refused == ["not_found"]
    journal.close()


def test_a_list_of_models_comes_in_messages_that_are_small_enough(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    registry = Registry(journal)
    for number in range(600):
        registry.add_model("m", BlobRef(sha256=f"{number:064x}", size=1), now=1.0, tags={"note": "ä" * 250})
    nothing: Any = None
    answered: list[Message] = []
    replies: Any = Replies()
    replies.reply = lambda question, answer: answered.append(answer)
    requests = asking(
        outbox=replies, dispatcher=nothing, registry=registry, serving=nothing, membership=nothing, deletion=nothing, packed=nothing,
        holders=nothing, store=BlobStore(tmp_path / "blobs", 1), urls=lambda: (), sync=synced,
    )  # fmt: skip
    found: list[ModelInfo] = []
    more = True
    while more:
        after = f"m:{found[-1].version}" if found else ""
        requests.on_request(Envelope("t", ListModels(after=after), reply_to="a"))
        answer = answered[-1]
        assert isinstance(answer, ModelsListed)
        assert len(codec.encode(answer, "json")) < INLINE_LIMIT_BYTES
        found += answer.models
        more = answer.more
    assert tuple(found) == registry.models()
    assert len(answered) > 2
    journal.close()


class Listing:
    """As many nodes, deployments and data sets as a test wants."""

    def __init__(self, tmp_path: Path, count: int) -> None:
        self.membership = Membership(timeout_seconds=10)
        for number in range(count):
            node_id = f"node-{number:04}"
            self.membership.on_status(
                NodeStatus(node_id=node_id, session="1", state="online", http=("http://10.0.0.1:1",)), 0.0
            )
            capacity = Capacity(
                hostname="ä" * 200, system="Linux", cores=4, memory_bytes=2**33, runtimes={"tensorflow": "2"}
            )
            data = NodeData(name=f"own-{number:04}", format=DataFormat(kind="images", classes=("a", "b")), count=5)
            self.membership.on_capacity(NodeCapacity(node_id=node_id, capacity=capacity, data=(data,)), 0.0)
        self.journal = Journal(tmp_path / "journal")
        self.registry = Registry(self.journal)
        for number in range(count):
            parts = DataFormat(kind="images", classes=tuple("class " + "ä" * 100 + str(n) for n in range(20)))
            shard = DataShard(blob=BlobRef(sha256="1" * 64, size=1), count=1)
            made = Dataset(name=f"d-{number:04}", format=parts, count=1, shards=(shard,))
            self.registry.add_dataset(made.name, BlobRef(sha256=f"{number:064x}", size=1), made)
        replica = ReplicaInfo(replica_id="m:1/node/1", node_id="node", state="ready")
        deployed = [
            DeploymentInfo(name=f"m{number:04}:1", wanted=20, replicas=(replica,) * 20) for number in range(count)
        ]
        serving: Any = SimpleNamespace(deployments=lambda: deployed)
        nothing: Any = None
        self.answered: list[Message] = []
        replies: Any = SimpleNamespace(reply=lambda question, answer: self.answered.append(answer))
        self.requests = asking(
            outbox=replies, dispatcher=nothing, registry=self.registry, serving=serving, membership=self.membership, deletion=nothing,
            packed=nothing, holders=nothing, store=BlobStore(tmp_path / "blobs", 1), urls=lambda: (), sync=synced,
        )  # fmt: skip

    async def ask(self, question: Message, kind: Any) -> Any:
        """Asks like a client's connection."""
        self.requests.on_request(Envelope("t", question, reply_to="a"))
        answer = self.answered[-1]
        assert isinstance(answer, kind)
        assert len(codec.encode(answer, "json")) < INLINE_LIMIT_BYTES
        return answer


async def test_whatever_is_listed_comes_in_messages_that_are_small_enough(tmp_path: Path) -> None:
    listing: Any = Listing(tmp_path, 1200)
    nodes, _ = await listings.nodes(listing)
    assert [node.node_id for node in nodes] == [f"node-{number:04}" for number in range(1200)]
    assert len(listing.answered) > 2
    deployments = await listings.deployments(listing)
    assert [one.name for one in deployments] == [f"m{number:04}:1" for number in range(1200)]
    datasets = await listings.datasets(listing)
    names = [*(f"d-{number:04}" for number in range(1200)), *(f"node:own-{number:04}" for number in range(1200))]
    assert [one.name for one in datasets] == names
    listing.journal.close()


@pytest.mark.parametrize(
    ("shards", "classes", "said"),
    [
        (SHARDS_LIMIT + 1, 2, "501 shards, 500 are allowed"),
        (1, 20_000, "the names of the 20000 classes have"),
        (SHARDS_LIMIT, 2, "not in the coordinator's store"),
    ],
)
def test_a_manifest_that_no_lease_could_carry_is_refused(tmp_path: Path, shards: int, classes: int, said: str) -> None:
    store = BlobStore(tmp_path / "blobs", 2**30)
    parts = tuple(DataShard(blob=BlobRef(sha256=f"{number:064x}", size=1), count=1) for number in range(shards))
    names = tuple(f"class {number}" for number in range(classes))
    made = Dataset(name="d", format=DataFormat(kind="images", classes=names), count=shards, shards=parts)
    ref = store.put_bytes(codec.pack(made))
    errors: list[str] = []
    replies: Any = SimpleNamespace(reply=None, refuse=lambda question, error: errors.append(error.message))
    nothing: Any = None
    requests = asking(
        outbox=replies, dispatcher=nothing, registry=nothing, serving=nothing, membership=nothing, deletion=nothing, packed=nothing,
        holders=nothing, store=store, urls=lambda: (), sync=synced,
    )  # fmt: skip
    requests.on_request(Envelope("t", AddDataset(name="d", manifest=ref), reply_to="a"))
    assert said in errors[0]
    huge = BlobRef(sha256=ref.sha256, size=MANIFEST_LIMIT_BYTES + 1)
    store.size = lambda sha256: huge.size  # type: ignore[method-assign]
    requests.on_request(Envelope("t", AddDataset(name="d", manifest=huge), reply_to="a"))
    assert f"{MANIFEST_LIMIT_BYTES} are allowed" in errors[1]


def test_jobs_are_listed_from_where_a_client_stands() -> None:
    here: Any = SimpleNamespace(_store=SimpleNamespace(jobs={name: name for name in "abcd"}), described=str.upper)
    assert list(Dispatcher.all_described(here, "")) == ["A", "B", "C", "D"]
    assert list(Dispatcher.all_described(here, "b")) == ["C", "D"]
    assert list(Dispatcher.all_described(here, "d")) == []
    assert list(Dispatcher.all_described(here, "forgotten")) == ["A", "B", "C", "D"]


EVALUATE = Evaluate(model="m", dataset="d")
DEPLOY = Deploy(model="m:3", replicas=2)
QUANTIZE = Deploy(model="m:3", quantize="int8", calibration="c", evaluation="c")


@pytest.mark.parametrize(
    ("kept", "asked", "same"),
    [
        (EVALUATE, Evaluate(model="m", dataset="d", batch_size=32), True),
        (EVALUATE, Evaluate(model="m:1", dataset="d"), False),
        (EVALUATE, Train(model="m", dataset="d"), False),
        (DEPLOY, Deploy(model="m", replicas=2), True),
        (DEPLOY, Deploy(model="m:3", replicas=2), True),
        (DEPLOY, Deploy(model="m:4", replicas=2), False),
        (DEPLOY, Deploy(model="m:prod", replicas=2), True),
        (DEPLOY, Deploy(model="n:prod", replicas=2), False),
        (DEPLOY, Deploy(model="m:prod"), False),
        (DEPLOY, Deploy(model="n", replicas=2), False),
        (DEPLOY, Deploy(model="m"), False),
        (DEPLOY, EVALUATE, False),
        (QUANTIZE, Deploy(model="m", quantize="int8"), True),
        (QUANTIZE, Deploy(model="m", quantize="int8", calibration="c"), True),
        (QUANTIZE, Deploy(model="m", quantize="int8", calibration="d"), False),
        (QUANTIZE, Deploy(model="m", quantize="int8", calibration="c", evaluation="e"), False),
        (QUANTIZE, Deploy(model="m"), False),
    ],
)
def test_a_job_is_the_same_when_it_was_asked_for_alike(kept: AnyJobSpec, asked: AnyJobSpec, same: bool) -> None:
    assert _is_same(kept, asked) is same


async def test_many_answers_come_in_order_and_an_error_ends_them(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    events = Events(journal, lambda job_id: None)
    said: list[Message] = []
    errors: list[str] = []
    replies: Any = SimpleNamespace(
        reply=lambda question, answer: said.append(answer), refuse=lambda question, error: errors.append(error.code)
    )
    nothing: Any = None
    requests = asking(
        outbox=replies, dispatcher=nothing, registry=nothing, serving=nothing, membership=nothing, deletion=nothing, packed=nothing,
        holders=nothing, store=BlobStore(tmp_path / "blobs", 1), urls=lambda: (), sync=synced, events=events,
    )  # fmt: skip
    running = asyncio.create_task(requests.run())
    for number in range(150):
        events.tell("node", f"n{number}", "joined")
    requests.on_request(Envelope("t", FollowEvents(id="q-1", after=0), reply_to="a"))
    await eventually(lambda: [(page.after, page.last) for page in said if isinstance(page, EventsListed)] == [(0, 100), (100, 150)])  # fmt: skip
    for question in (FollowEvents(after=0), FollowEvents(id="q-2")):
        requests.on_request(Envelope("t", question, reply_to="a" if not question.id else ""))
    assert errors == ["invalid_request"] * 2
    journal._unsafe = Unavailable("the journal may not be on the disk")
    events.tell("node", "one more", "joined")
    await eventually(lambda: errors[2:] == ["unavailable"])
    journal._unsafe = None
    running.cancel()
    await asyncio.wait([running])
    journal.close()
