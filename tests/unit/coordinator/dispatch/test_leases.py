"""The leases: the kept view of the nodes always equals a new look at all of them."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import msgspec
import pytest

from coordinator.copies.locations import PEERS_NAMED, Holders
from coordinator.dispatch.leases import BEHIND, OWN_NAMED, ROOM_LEASE_SECONDS, SLOTS, Leases
from coordinator.membership import Membership
from coordinator.plans.job import Attempt
from coordinator.plans.placement import NodeView
from potluck.settings import CoordinatorSettings
from potluck.wire import codec
from potluck.wire.births import NodeCapacity, NodeStatus, NodeTelemetry
from potluck.wire.commands import LeaseShard
from potluck.wire.refs import hinted
from potluck.wire.tasks import EvaluateTask
from potluck.wire.topics import Topics
from potluck.wire.values import BlobRef, Capacity, DataFormat, DataSlice

BLOB = BlobRef(sha256="a" * 64, size=1)
TASK = EvaluateTask(
    model=BLOB, weights=None, slices=(DataSlice(blob=BLOB, start=0, stop=8),), format=DataFormat(kind="arrays"), image=None,
    batch_size=4,
)  # fmt: skip
JOB = cast(Any, SimpleNamespace(job_id="j"))
NODES = [f"n{number}" for number in range(6)]


class Bench:
    def __init__(self) -> None:
        self.membership = Membership(timeout_seconds=10)
        self.leases = Leases(
            topics=Topics("test"), outbox=Mock(waiting=0), membership=self.membership, settings=CoordinatorSettings(), epoch=1,
            holders=Holders(self.membership, lambda: ()),
        )  # fmt: skip
        self.refusing: dict[str, tuple[int, float]] = self.leases._refusing
        self.now = 0.0

    def born(self, node_id: str, *, session: str = "1", runtimes: tuple[str, ...] = ("tensorflow",)) -> None:
        capacity = Capacity(
            hostname="h", system="s", cores=1, memory_bytes=1, runtimes=dict.fromkeys(runtimes, "2"), gflops=3.0
        )
        self.membership.on_capacity(NodeCapacity(node_id=node_id, capacity=capacity), 0.0)
        self.membership.on_status(
            NodeStatus(node_id=node_id, session=session, state="online", http=(f"http://{node_id}:1",)), self.now
        )

    def tells(self, node_id: str, *, gives_way: bool = False) -> None:
        member = self.membership.get(node_id)
        self.membership.on_telemetry(
            NodeTelemetry(
                node_id=node_id, session=member.session if member else "", cpu_percent=1, memory_used_bytes=1,
                memory_available_bytes=1, gives_way=gives_way,
            ),
            self.now,
        )  # fmt: skip

    def hold(self, attempt_id: str, node_id: str) -> None:
        self.leases.hold(JOB, Attempt(attempt_id, "items-0-8", node_id, self.now, TASK), self.now)

    def looked_at_anew(self) -> tuple[NodeView, ...]:
        """A new view of every node, from nothing that was kept."""
        found = []
        for member in self.membership.online():
            if "tensorflow" in member.capacity.runtimes and not member.quarantined:
                load = sum(held.node_id == member.node_id for held in self.leases._held.values())
                resting = self.refusing.get(member.node_id, (0, 0.0))[1] > self.now
                found.append(
                    NodeView(
                        member.node_id,
                        member.capacity.gflops,
                        free_slots=0 if resting else max(0, SLOTS - load),
                        idle=load == 0,
                        collective=member.collective,
                        data=member.data,
                        runtimes=frozenset(member.capacity.runtimes),
                        gives_way=member.telemetry is not None and member.telemetry.gives_way,
                    )
                )
        return tuple(found)


@pytest.mark.parametrize("seed", range(8))
def test_the_view_is_what_a_fresh_look_gives_whatever_happens(seed: int) -> None:
    bench, chance = Bench(), random.Random(seed)
    held: list[str] = []
    for number in range(400):
        node_id = chance.choice(NODES)
        match chance.randrange(10):
            case 0:
                bench.born(
                    node_id, session=str(chance.randrange(3)), runtimes=chance.choice((("tensorflow",), ("litert",)))
                )
            case 1:
                bench.membership.on_status(
                    NodeStatus(node_id=node_id, session=str(chance.randrange(3)), state="offline"), bench.now
                )
            case 2:
                bench.tells(node_id, gives_way=chance.random() < 0.5)
            case 3:
                bench.leases.refused(node_id, bench.now)
            case 4:
                bench.leases.accepted(node_id)
            case 5:
                bench.membership.quarantine(node_id, "it lies")
            case 6:
                bench.now += chance.choice((0.3, 1.0, 6.0, 700.0))
                bench.membership.tick(bench.now)
            case 7 if held:
                bench.leases.drop(held.pop(chance.randrange(len(held))))
            case 8:
                bench.membership.heard(node_id, bench.now)
            case _:
                bench.hold(f"a{number}", node_id)
                held.append(f"a{number}")
        expected = bench.looked_at_anew()
        assert bench.leases.view(bench.now).nodes == expected
        assert bench.leases.free(bench.now) == any(node.free_slots for node in expected)
        for name in NODES:
            assert sorted(bench.leases.of_node(name)) == sorted(
                key for key, one in bench.leases._held.items() if one.node_id == name
            )


def test_what_did_not_change_is_not_looked_at_again() -> None:
    bench = Bench()
    for node_id in NODES:
        bench.born(node_id)
    before = bench.leases.view(0.0).nodes
    for node_id in NODES:
        bench.tells(node_id)
        bench.membership.heard(node_id, 1.0)
    assert bench.leases.view(1.0).nodes is before
    bench.hold("a", "n2")
    after = bench.leases.view(1.0).nodes
    assert [one is other for one, other in zip(before, after, strict=True)] == [node != "n2" for node in NODES]


def test_of_very_many_holders_not_always_the_same_are_named() -> None:
    bench = Bench()
    holders = Holders(bench.membership, lambda: ("http://coordinator:1",))
    for number in range(1000):
        bench.born(f"n{number:03}")
        holders.stored(f"n{number:03}", ["a" * 64])
    named = [holders.nodes("a" * 64) for _ in range(50)]
    assert all(len(set(one)) == PEERS_NAMED for one in named)
    assert len(set().union(*named)) > 30 * PEERS_NAMED
    few = Holders(bench.membership, lambda: ())
    for number in (5, 3):
        few.stored(f"n{number:03}", ["b" * 64])
    assert few.nodes("b" * 64) == ("http://n003:1", "http://n005:1")


def test_the_body_of_a_lease_has_the_same_bytes_however_often_it_is_sent() -> None:
    """Holders come and go, and our own address changes: that stands beside it, and a signature over it would hold."""
    bench, payloads = Bench(), list[bytes]()
    ours = ["http://coordinator:1"]
    bench.leases._holders._urls = lambda: tuple(ours)
    outbox = cast(Mock, bench.leases._outbox)
    outbox.publish.side_effect = lambda topic, message: payloads.append(codec.encode(message))
    for node_id in NODES:
        bench.born(node_id)
    bench.hold("a1", "n1")
    bench.leases.send_due(1.0)
    bench.leases._holders.stored("n2", [BLOB.sha256])
    bench.leases.send_due(3.0)
    bench.leases._holders.stored("n3", [BLOB.sha256])
    ours[:] = ["http://elsewhere:2"]
    bench.leases.send_due(5.0)

    parts = [msgspec.msgpack.decode(payload, type=dict[str, msgspec.Raw]) for payload in payloads]
    hints = [bytes(part.pop("hints", b"")) for part in parts]
    assert len(set(hints)) == len(hints) == 3
    bodies = {b"".join(key.encode() + bytes(value) for key, value in part.items()) for part in parts}
    assert len(bodies) == 1

    sent = [hinted(cast(LeaseShard, codec.decode(payload)[0])) for payload in payloads]
    found = [(one.task.model.holders, one.task.slices[0].blob.holders) for one in sent]  # type: ignore[union-attr]
    first = ("http://coordinator:1",)
    assert [set(model) for model, _ in found] == [
        {*first}, {*first, "http://n2:1"}, {*first, "http://n2:1", "http://n3:1", "http://elsewhere:2"},
    ]  # fmt: skip
    assert all(model == data for model, data in found)


def test_a_node_that_reads_no_hints_finds_the_blobs_at_the_coordinator() -> None:
    bench = Bench()
    bench.leases._holders._urls = lambda: tuple(f"http://coordinator:{number}" for number in range(5))
    bench.hold("a1", "n1")
    held = bench.leases.get("a1")
    assert held is not None
    assert len(held.body.task.model.holders) == OWN_NAMED  # type: ignore[union-attr]


def test_a_lease_is_sent_again_after_growing_pauses_and_not_while_many_messages_wait() -> None:
    """A broker or node that is slow got each lease once a second more, and our own outbox was full of copies."""
    bench, sent_at = Bench(), list[float]()
    outbox = cast(Mock, bench.leases._outbox)
    outbox.publish.side_effect = lambda topic, message: sent_at.append(bench.now)
    bench.born("n1")
    outbox.waiting = BEHIND + 1
    bench.hold("a1", "n1")
    for tenth in range(10, 200):
        bench.now = tenth / 10
        outbox.waiting = BEHIND + 1 if bench.now < 4 else BEHIND
        bench.leases.send_due(bench.now)
    assert sent_at == [1.0, 4.0, 6.0, 10.0, 14.0, 18.0]


def test_a_lease_whose_result_finds_no_room_ends_later() -> None:
    """Its node has it, and reports it again; it does so with pauses that may be longer than a lease."""
    bench = Bench()
    bench.born("n1")
    for attempt_id in ("a", "b", "c"):
        bench.hold(attempt_id, "n1")
    held = {attempt_id: bench.leases.get(attempt_id) for attempt_id in "abc"}
    assert held["a"] is not None
    assert held["b"] is not None
    held["a"].no_room = True
    held["b"].collecting = True
    lease_seconds = CoordinatorSettings().lease_seconds
    assert bench.leases.expired(lease_seconds) == []
    assert bench.leases.expired(lease_seconds + 1) == [("c", held["c"])]
    assert bench.leases.expired(ROOM_LEASE_SECONDS + 1) == [("a", held["a"]), ("c", held["c"])]
