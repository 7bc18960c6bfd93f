"""Requests whose inputs a node has: they go there; others fetch the inputs only if they would be idle; lost inputs are reported."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from coordinator.serving.batches import Batch, Request
from coordinator.serving.router import Router
from potluck.errors import InputsLost, PotluckError
from potluck.wire.reports import RequestOutcome
from potluck.wire.values import ErrorInfo

OK = RequestOutcome()
LOST = RequestOutcome(error=ErrorInfo(code="inputs_lost", message="nobody has it", retryable=True))
START = 1.0
Answers = list[RequestOutcome | PotluckError]


def router(*nodes: str) -> Router:
    """One replica on each node, with the node's name, and a known speed of 8 rows per second."""
    one = Router("m:1", queue_limit=100, batch_limit=8, rng=random.Random(0))
    for node in nodes:
        one.add_replica(node, node)
    for node in nodes:
        ask(one, node, moving_seconds=100.0, now=START - 1.0)
        (batch,) = one.dispatch(START - 1.0)
        assert batch.replica_id == node
        one.finished(node, batch.batch_id, (OK,), START)
    return one


def ask(to: Router, held_by: str = "", rows: int = 8, moving_seconds: float = 0.1, now: float = START) -> Answers:
    answers: Answers = []
    request = Request((), answers.append, 1000.0, 10, rows, held_by=held_by, moving_seconds=moving_seconds)
    to.submit(request, now)
    return answers


def went(batches: list[Batch]) -> list[str]:
    return [batch.replica_id for batch in batches]


@pytest.mark.parametrize("node", ["a", "b", "c"])
def test_a_request_goes_where_its_inputs_are(node: str) -> None:
    one = router("a", "b", "c")
    for moving_seconds in (0.1, 10.0):
        ask(one, node, moving_seconds=moving_seconds)
        assert went(one.dispatch(START)) == [node]


def test_an_idle_replica_fetches_them_where_that_is_quicker() -> None:
    one = router("a", "b")
    for _ in range(3):
        ask(one, "a", moving_seconds=5.0)
    assert went(one.dispatch(START)) == ["a", "a"]  # to move the third one would take longer than to wait
    ask(one, "a", moving_seconds=0.1)
    assert went(one.dispatch(START)) == ["b"]
    ask(one, "a", moving_seconds=0.1)
    assert one.dispatch(START) == []  # b has work now


def test_a_replica_with_work_waits_for_requests_of_its_own() -> None:
    one = router("a", "b")
    for node in ("a", "a", "b"):
        ask(one, node)
    sent = one.dispatch(START)
    assert went(sent) == ["a", "a", "b"]
    ask(one, "a")
    assert one.dispatch(START + 0.5) == []
    ask(one, "b")
    ask(one)
    assert went(one.dispatch(START + 0.5)) == ["b"]  # it does not wait behind one that waits for another node
    one.finished("a", sent[0].batch_id, (OK,), START + 1.0)
    assert went(one.dispatch(START + 1.0)) == ["a"]
    assert [request.held_by for request in one.queue] == [""]


def test_of_two_replicas_near_them_the_one_with_room_gets_them() -> None:
    """Two on one machine, say."""
    one = router("a", "b")
    one.add_replica("a2", "a")
    for _ in range(4):
        ask(one, "a", moving_seconds=100.0)
    assert sorted(went(one.dispatch(START))) == ["a", "a", "a2", "a2"]
    one.remove_replica("a2", START)
    one.lanes.check_invariants()
    assert one.dispatch(START) == []  # what it had waits for the other one
    one.remove_replica("a", START)
    assert set(went(one.dispatch(START))) == {"b"}


def test_what_no_node_has_does_not_wait_behind_what_one_has() -> None:
    one = router("a", "b")
    for node in ("a", "a", "b"):
        ask(one, node)
    one.dispatch(START)
    ask(one, "a")
    ask(one, rows=2)
    ask(one, rows=2)
    (batch,) = one.dispatch(START + 0.1)
    assert (batch.replica_id, batch.rows) == ("b", 4)


def test_a_node_without_a_replica_or_that_is_silent_is_no_reason_to_wait() -> None:
    one = router("a", "b")
    answers = ask(one, "elsewhere")
    (batch,) = one.dispatch(START)
    one.finished(batch.replica_id, batch.batch_id, (OK,), START + 1.0)
    assert answers == [OK]
    ask(one, "a", now=START + 1.0)
    assert went(one.dispatch(START + 1.0)) == ["a"]
    one.expire(100.0, batch_seconds=10.0)  # there is no news of it
    assert went(one.dispatch(100.0)) == ["b"]


def test_what_is_held_elsewhere_waits_for_nobody_when_a_slow_replica_is_drawn() -> None:
    """It should take no time, but is late again and again. So it is drawn first, and should get nothing."""
    one = Router("m:1", queue_limit=100, batch_limit=8, rng=random.Random(0))
    for node in "ab":
        one.add_replica(node, node)
    now = START
    for node, seconds in (
        ("a", 0.5),
        ("b", 0.0),
        ("b", 0.0),
        ("b", 1.0),
        ("b", 0.0),
        ("b", 1.0),
        ("b", 0.0),
        ("b", 1.0),
    ):
        ask(one, node, rows=1, moving_seconds=100.0, now=now)
        (batch,) = one.dispatch(now)
        assert batch.replica_id == node
        now += seconds
        one.finished(node, batch.batch_id, (OK,), now)
    assert one.lanes.slow(one.lanes["b"])
    ask(one, "elsewhere", rows=1, moving_seconds=0.0, now=now)
    assert went(one.dispatch(now)) == ["a"]


def test_inputs_that_are_lost_are_told_at_once() -> None:
    one = router("a", "b")
    answers = ask(one, "a")
    (batch,) = one.dispatch(START)
    one.finished("a", batch.batch_id, (LOST,), START + 0.1)
    assert answers == [LOST]
    unheld = ask(one)  # in a store that other nodes can reach too
    (batch,) = one.dispatch(START + 0.2)
    one.finished(batch.replica_id, batch.batch_id, (LOST,), START + 0.3)
    assert unheld == []
    assert len(one.dispatch(10.0)) == 1


def test_a_copy_whose_inputs_are_gone_leaves_the_answer_to_the_other_batch() -> None:
    """A node deletes the inputs of a batch that is done, and the copy at another node then finds none."""
    one = router("a", "b")
    for _ in range(100):
        ask(one, "a", now=START)
        (batch,) = one.dispatch(START)
        one.finished("a", batch.batch_id, (OK,), START + 0.1)
    answers = ask(one, "a", now=START + 1.0)
    (first,) = one.dispatch(START + 1.0)
    (copy,) = one.hedge(START + 100.0)
    assert (first.replica_id, copy.replica_id) == ("a", "b")
    one.finished("b", copy.batch_id, (LOST,), START + 100.1)
    assert answers == []
    one.finished("a", first.batch_id, (OK,), START + 100.2)
    assert answers == [OK]


def test_a_node_that_is_gone_takes_the_inputs_with_it() -> None:
    one = router("a", "b")
    other = ask(one, "b")
    answers = [ask(one, "a") for _ in range(3)]
    one.dispatch(START)
    assert len(one.queue) == 1
    one.inputs_lost("a")
    one.remove_replica("a", START + 0.1)
    assert [type(found[0]) for found in answers] == [InputsLost] * 3
    assert other == []
    assert one.in_flight == 1


class Held(RuleBasedStateMachine):
    """Every request is answered once, whoever has its inputs; nothing waits while all replicas are idle."""

    def __init__(self) -> None:
        super().__init__()
        self.router = Router("m:1", queue_limit=1000, batch_limit=8, rng=random.Random(1))
        self.now = START
        self.away: list[Batch] = []
        self.answers: list[Answers] = []
        for node in "ab":
            self.router.add_replica(node, node)

    @rule(held_by=st.sampled_from(["", "a", "b", "c"]), rows=st.integers(1, 9), moving=st.floats(0.0, 2.0))
    def ask(self, held_by: str, rows: int, moving: float) -> None:
        self.answers.append(ask(self.router, held_by, rows, moving, self.now))
        self.away += self.router.dispatch(self.now)

    @precondition(lambda self: self.away)
    @rule(data=st.data(), seconds=st.just(0.0) | st.floats(1e-6, 2.0))
    def finish(self, data: st.DataObject, seconds: float) -> None:
        batch = self.away.pop(data.draw(st.integers(0, len(self.away) - 1)))
        self.now += seconds
        self.router.finished(batch.replica_id, batch.batch_id, (OK,) * len(batch.requests), self.now)
        self.away += self.router.dispatch(self.now)

    @rule(node=st.sampled_from("ab"))
    def leave_and_come_back(self, node: str) -> None:
        self.router.inputs_lost(node)
        self.router.remove_replica(node, self.now)
        self.away = [batch for batch in self.away if batch.replica_id != node]
        self.router.add_replica(node, node)
        self.away += self.router.dispatch(self.now)

    @invariant()
    def sound(self) -> None:
        self.router.lanes.check_invariants()
        self.router.queue.check_invariants()
        assert all(len(found) <= 1 for found in self.answers)
        waiting = sum(not found for found in self.answers)
        assert waiting == len(self.router.queue) + self.router.in_flight
        assert self.away or not waiting


TestHeld = Held.TestCase
TestHeld.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
