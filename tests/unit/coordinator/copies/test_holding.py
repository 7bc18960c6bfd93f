"""Copies of models on nodes: one copy for each, on another machine if possible, and kept until the next holder has it."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from coordinator.copies.plan import (
    ASKED_LIMIT,
    GONE_SECONDS,
    RESEND_SECONDS,
    REST_SECONDS,
    CopyPlace,
    Hold,
    Holding,
    Release,
)
from potluck.wire.values import BlobRef


def blob(number: int, size: int = 10) -> BlobRef:
    return BlobRef(sha256=f"{number:064x}", size=size)


def blobs(*numbers: int) -> dict[str, BlobRef]:
    return {blob(number).sha256: blob(number) for number in numbers}


A, B, C = CopyPlace("a"), CopyPlace("b"), CopyPlace("c")
HERE = CopyPlace("here", elsewhere=False)
ONE, TWO = blob(1).sha256, blob(2).sha256


def test_copies_are_spread_and_stay_where_they_are() -> None:
    holding = Holding()
    commands = holding.plan(blobs(1, 2, 3, 4), [HERE, A, B], 0.0)
    assert [command.node_id for command in commands] == ["a", "b", "a", "b"]
    assert holding.plan(blobs(1, 2, 3, 4), [HERE, A, B, C], 1.0) == []
    assert holding.stored("a", ONE)
    assert not holding.stored("a", ONE)
    assert not holding.stored("b", blob(3).sha256), "that is for a to hold"
    again = holding.plan(blobs(1, 2, 3, 4, 5), [HERE, A, B, C], RESEND_SECONDS)
    assert again == [Hold("b", blob(2)), Hold("a", blob(3)), Hold("b", blob(4)), Hold("c", blob(5))]


def test_the_coordinators_own_machine_serves_until_there_is_another() -> None:
    holding = Holding()
    assert holding.plan(blobs(1), [HERE], 0.0) == [Hold("here", blob(1))]
    holding.stored("here", ONE)
    assert holding.plan(blobs(1), [HERE, A], 1.0) == [Hold("a", blob(1))]
    assert holding.plan(blobs(1), [HERE, A], 2.0) == [], "kept until the other has it"
    holding.stored("a", ONE)
    assert holding.plan(blobs(1), [HERE, A], 3.0) == [Release("here", ONE)]
    assert holding.plan(blobs(1), [HERE, A], 4.0) == []


def test_a_holder_that_is_gone_for_long_is_replaced_and_released_when_it_returns() -> None:
    holding = Holding()
    holding.plan(blobs(1), [A, B], 0.0)
    holding.stored("a", ONE)
    assert holding.plan(blobs(1), [B], 1.0) == []
    assert holding.plan(blobs(1), [A, B], 50.0) == []
    assert holding.plan(blobs(1), [B], 60.0) == []
    assert holding.plan(blobs(1), [B], 60.0 + GONE_SECONDS) == []
    assert holding.plan(blobs(1), [B], 61.0 + GONE_SECONDS) == [Hold("b", blob(1))]
    holding.joined("a")
    assert holding.plan(blobs(1), [A, B], 62.0 + GONE_SECONDS) == []
    holding.stored("b", ONE)
    assert holding.plan(blobs(1), [A, B], 63.0 + GONE_SECONDS) == [Release("a", ONE)]


def test_a_node_that_joins_again_is_asked_again() -> None:
    holding = Holding()
    holding.plan(blobs(1), [A], 0.0)
    holding.stored("a", ONE)
    holding.joined("a")
    assert not holding.stored("a", ONE), "it has not been asked since: it may hold it for something else"
    assert holding.plan(blobs(1), [A], 1.0) == [Hold("a", blob(1))]
    assert holding.stored("a", ONE)


def test_a_node_without_room_is_passed_over_for_a_while() -> None:
    holding = Holding()
    holding.plan(blobs(1, 2), [A], 0.0)
    holding.stored("a", TWO)
    holding.failed("a", ONE, 1.0)
    assert holding.plan(blobs(1, 2), [A], 2.0) == []
    assert holding.plan(blobs(1, 2), [A, B], 3.0) == [Hold("b", blob(1))]
    holding.failed("b", ONE, 4.0)
    assert holding.plan(blobs(1, 2), [A, B], 5.0) == []
    assert holding.plan(blobs(1, 2), [A, B], 2.0 + REST_SECONDS) == [Hold("a", blob(1))]
    holding.stored("a", ONE)
    assert holding.plan(blobs(1, 2), [A, B], 3.0 + REST_SECONDS) == [Release("b", ONE)], "asked twice, it may hold it"


def test_a_node_is_asked_for_some_at_a_time() -> None:
    holding, many = Holding(), blobs(*range(1, 2 * ASKED_LIMIT))
    first = holding.plan(many, [A], 0.0)
    assert len(first) == ASKED_LIMIT
    assert holding.plan(many, [A], RESEND_SECONDS) == first
    holding.stored("a", ONE)
    assert holding.plan(many, [A], RESEND_SECONDS + 1.0) == [Hold("a", blob(ASKED_LIMIT + 1))]


def test_what_is_deleted_is_released() -> None:
    holding = Holding()
    holding.plan(blobs(1, 2), [A], 0.0)
    holding.stored("a", ONE)
    assert holding.plan(blobs(2), [], 1.0) == []
    assert holding.plan(blobs(2), [A], 2.0) == [Release("a", ONE)]
    assert holding.plan({}, [A], 3.0) == [Release("a", TWO)]
    assert holding.plan({}, [A], 4.0) == []


class Nodes(RuleBasedStateMachine):
    """Nodes obey, come and go, and fail; `disks` has the blobs that they really hold."""

    def __init__(self) -> None:
        super().__init__()
        self.holding = Holding()
        self.now = 0.0
        self.models = blobs(1, 2, 3)
        self.online: dict[str, CopyPlace] = {"a": A, "b": B}
        self.disks: dict[str, set[str]] = {name: set() for name in ("a", "b", "c", "here")}
        self.asked: list[Hold] = []

    @rule(seconds=st.sampled_from([1.0, 20.0, 100.0, 700.0]))
    def plan(self, seconds: float) -> None:
        self.now += seconds
        for command in self.holding.plan(self.models, list(self.online.values()), self.now):
            assert command.node_id in self.online
            if isinstance(command, Hold):
                self.asked.append(command)
                continue
            others = [name for name in self.disks if name != command.node_id and command.sha256 in self.disks[name]]
            assert others or command.sha256 not in self.models, "the last copy is never released"
            self.disks[command.node_id].discard(command.sha256)
            # Commands come in order: an earlier request that is not done yet is not done now.
            self.asked = [
                hold for hold in self.asked if (hold.node_id, hold.blob.sha256) != (command.node_id, command.sha256)
            ]

    @rule(data=st.data(), fails=st.booleans())
    def answer(self, data: Any, fails: bool) -> None:
        asked = [hold for hold in self.asked if hold.node_id in self.online]
        if not asked:
            return
        hold = data.draw(st.sampled_from(asked))
        self.asked.remove(hold)
        sha256 = hold.blob.sha256
        if fails and sha256 not in self.disks[hold.node_id]:
            self.holding.failed(hold.node_id, sha256, self.now)
        else:
            self.disks[hold.node_id].add(sha256)
            self.holding.stored(hold.node_id, sha256)

    @rule(place=st.sampled_from([A, B, C, HERE]))
    def come_or_go(self, place: CopyPlace) -> None:
        if self.online.pop(place.node_id, None) is None:
            self.online[place.node_id] = place
            self.holding.joined(place.node_id)

    @rule(number=st.integers(1, 5))
    def register_or_delete(self, number: int) -> None:
        if self.models.pop(blob(number).sha256, None) is None:
            self.models |= blobs(number)

    @invariant()
    def holds(self) -> None:
        self.holding.check_invariants()

    def teardown(self) -> None:
        """When all is quiet, one node on another machine holds each model, and no other node does."""
        self.online = {place.node_id: place for place in (A, B, HERE)}
        for name in self.online:
            self.holding.joined(name)
        self.asked.clear()
        for _ in range(8):
            self.plan(REST_SECONDS)
            for hold in self.asked:
                if hold.node_id in self.online:
                    self.disks[hold.node_id].add(hold.blob.sha256)
                    self.holding.stored(hold.node_id, hold.blob.sha256)
            self.asked.clear()
        for sha256 in self.models:
            assert [name for name in self.online if sha256 in self.disks[name]] in (["a"], ["b"])
        for name in self.online:
            assert self.disks[name] <= set(self.models)


Nodes.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestNodes = Nodes.TestCase
