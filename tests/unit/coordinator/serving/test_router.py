"""The router: no request is lost or answered twice, the queue is bounded, and lost batches are asked again."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from coordinator.serving.batches import Batch, Request
from coordinator.serving.router import ATTEMPTS_LIMIT, Router
from potluck.errors import Overloaded, PotluckError, TimedOut, Unavailable
from potluck.wire.reports import RequestOutcome
from potluck.wire.values import ErrorInfo

OK = RequestOutcome()
DIED = RequestOutcome(error=ErrorInfo(code="engine_failed", message="died", retryable=True))
CRASHED = RequestOutcome(error=ErrorInfo(code="model_crashed", message="ended by SIGABRT", retryable=True))
Answers = list[RequestOutcome | PotluckError]


def router(queue_limit: int = 100, batch_limit: int = 4) -> Router:
    return Router("m:1", queue_limit=queue_limit, batch_limit=batch_limit, rng=random.Random(0))


def ask(
    to: Router, deadline: float = 1000.0, size_bytes: int = 10, rows: int = 1, priority: int = 0, now: float = 0.0
) -> Answers:
    answers: Answers = []
    to.submit(Request((), answers.append, deadline, size_bytes, rows, priority), now)
    return answers


def test_a_request_goes_out_at_once_and_others_wait_and_leave_together() -> None:
    one = router()
    one.add_replica("r", "n")
    first = ask(one)
    (batch,) = one.dispatch(0.0)
    assert len(batch.requests) == 1
    ask(one)
    (second,) = one.dispatch(0.0)  # one to compute, one to begin with at once
    waiting = [ask(one) for _ in range(6)]
    assert one.dispatch(0.0) == []
    one.finished("r", batch.batch_id, (OK,), 0.1)
    assert first == [OK]
    (together,) = one.dispatch(0.1)
    assert len(together.requests) == 4  # the batch limit
    one.finished("r", together.batch_id, (OK,) * 4, 0.2)
    assert [len(answers) for answers in waiting] == [1, 1, 1, 1, 0, 0]
    assert second.batch_id != together.batch_id


@pytest.mark.parametrize("seconds", [(0.1, 0.3), (0.7, 0.3), (0.3, 0.07), (0.011, 0.3), (0.9, 0.0013)])
def test_when_the_last_replica_is_lost_requests_wait_for_the_next(seconds: tuple[float, float]) -> None:
    """Removed replicas leave a rounding error in the total rate. It must not count as a rate by which requests would be too late."""
    one = router()
    for replica_id, each in zip("ab", seconds, strict=True):
        one.add_replica(replica_id, replica_id)
        ask(one)
        (batch,) = one.dispatch(0.0)
        one.finished(batch.replica_id, batch.batch_id, (OK,), each)
    for replica_id in "ab":
        one.remove_replica(replica_id, 1.0)
    waiting = [ask(one, now=1.0) for _ in range(5)]
    one.add_replica("c", "c")
    assert sum(len(batch.requests) for batch in one.dispatch(2.0)) == 5
    assert waiting == [[]] * 5


def test_a_batch_fits_into_a_message() -> None:
    one = router(batch_limit=64)
    one.add_replica("r", "n")
    for _ in range(4):
        ask(one, size_bytes=100_000)
    assert [len(batch.requests) for batch in one.dispatch(0.0)] == [1, 1]


def test_a_full_queue_says_when_to_come_back() -> None:
    one = router(queue_limit=2)
    ask(one)
    ask(one)
    with pytest.raises(Overloaded) as refused:
        ask(one)
    assert refused.value.retry_after_seconds


def test_what_was_on_its_way_to_a_lost_replica_is_asked_elsewhere_in_order() -> None:
    one = router()
    one.add_replica("a", "n1")
    answers = [ask(one) for _ in range(3)]
    one.dispatch(0.0)
    one.remove_replica("a", 1.0)
    assert all(not answer for answer in answers)
    one.add_replica("b", "n2")
    batches = one.dispatch(1.0)
    for batch in batches:
        one.finished("b", batch.batch_id, (OK,) * len(batch.requests), 2.0)
    assert all(answer == [OK] for answer in answers)


@pytest.mark.parametrize("told", [True, False])
def test_of_a_batch_of_which_an_engine_died_each_request_is_tried_once_more_alone(told: bool) -> None:
    """Whether the answer comes first, or the loss of the replica."""
    one = router()
    one.add_replica("a", "a")
    poison, good = ask(one), ask(one)
    (together,) = one.dispatch(0.2)
    assert len(together.requests) == 2
    if told:
        one.finished("a", together.batch_id, (CRASHED,) * 2, 0.3)
        one.remove_replica("a", 0.3)
    else:
        one.remove_replica("a", 0.3, crashed=True)
    one.add_replica("b", "b")
    alone = one.dispatch(1.0)
    assert [len(batch.requests) for batch in alone] == [1, 1]
    one.finished("b", alone[1].batch_id, (OK,), 1.1)
    one.finished("b", alone[0].batch_id, (CRASHED,), 1.2)
    assert good == [OK]
    (answer,) = poison
    assert isinstance(answer, Unavailable)
    assert "SIGABRT" in answer.message
    assert not one.queue


def test_whichever_answer_of_a_batch_that_was_asked_again_comes_first_counts_once() -> None:
    one = router()
    one.add_replica("a", "n1")
    answers = ask(one)
    (batch,) = one.dispatch(0.0)
    one.expire(20.0, batch_seconds=10.0)
    (again,) = one.dispatch(20.0)
    one.finished("a", batch.batch_id, (OK,), 21.0)
    assert answers == [OK]
    one.finished("a", again.batch_id, (OK,), 22.0)
    one.finished("a", batch.batch_id, (OK,), 23.0)
    assert answers == [OK]
    assert one.served == 1


def test_what_was_on_its_way_to_a_replica_and_may_be_lost_is_asked_again_at_once() -> None:
    one = router()
    one.add_replica("r", "n")
    first, lost = ask(one), one.dispatch(0.0)
    second = ask(one)
    lost += one.dispatch(0.0)
    assert [len(batch.requests) for batch in lost] == [1, 1]
    one.ask_again("another", 0.1)
    assert one.dispatch(0.1) == []
    one.ask_again("r", 0.2)
    (again,) = one.dispatch(0.2)
    assert again.requests == [*lost[0].requests, *lost[1].requests]
    assert not one.lanes["r"].silent
    one.finished("r", lost[0].batch_id, (OK,), 0.3)  # it was not lost after all
    assert (first, second) == ([OK], [])
    one.finished("r", again.batch_id, (OK, OK), 0.4)
    assert (first, second) == ([OK], [OK])


def test_a_late_failure_leaves_the_request_to_the_replica_that_has_it_now() -> None:
    one = router()
    one.add_replica("a", "n1")
    answers = ask(one)
    (batch,) = one.dispatch(0.0)
    one.expire(20.0, batch_seconds=10.0)
    (again,) = one.dispatch(20.0)
    one.finished("a", batch.batch_id, (DIED,), 21.0)
    assert answers == []
    one.finished("a", again.batch_id, (OK,), 22.0)
    assert answers == [OK]


class Machine:
    """Replicas that compute one batch after the other at a fixed pace, in simulated time."""

    def __init__(self, seconds_each: float, replicas: int = 1) -> None:
        self.router = router(queue_limit=1000, batch_limit=64)
        self.seconds_each = seconds_each
        self.answered = self.computed = 0
        self.free_at = {f"r{number}": 0.0 for number in range(replicas)}
        self.busy: list[tuple[float, Batch]] = []
        for replica_id in self.free_at:
            self.router.add_replica(replica_id, f"node of {replica_id}")

    def run(self, requests_per_second: float, seconds: int, deadline_seconds: float = 30.0) -> None:
        for tick in range(seconds * 10):
            now = tick / 10
            for batch in [batch for done_at, batch in self.busy if done_at <= now]:
                self.router.finished(batch.replica_id, batch.batch_id, (OK,) * len(batch.requests), now)
            self.busy = [(done_at, batch) for done_at, batch in self.busy if done_at > now]
            for _ in range(int((tick + 1) / 10 * requests_per_second) - int(tick / 10 * requests_per_second)):
                with suppress(Overloaded):  # a refused client knows at once
                    self.router.submit(Request((), self._answer, now + deadline_seconds, 10), now)
            self.router.expire(now, batch_seconds=10.0)
            for batch in self.router.dispatch(now):
                self.computed += len(batch.requests)
                start = max(now, self.free_at[batch.replica_id])
                self.free_at[batch.replica_id] = start + self.seconds_each * len(batch.requests)
                self.busy.append((self.free_at[batch.replica_id], batch))

    def _answer(self, outcome: RequestOutcome | PotluckError) -> None:
        self.answered += isinstance(outcome, RequestOutcome)


@pytest.mark.parametrize("seconds_each", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("replicas", [1, 3])
def test_more_than_a_slow_model_can_do_does_not_keep_it_from_what_it_can(seconds_each: float, replicas: int) -> None:
    """Work under way does not count as lost and is not done again; work that would be too late is not computed."""
    machine = Machine(seconds_each, replicas)
    machine.run(2 * replicas / seconds_each, seconds=200)
    assert machine.answered >= 0.85 * 200 * replicas / seconds_each
    assert machine.computed <= 1.1 * machine.answered + 2 * replicas


def test_a_request_that_takes_longer_than_a_lost_one_is_answered() -> None:
    machine = Machine(seconds_each=12.0)
    machine.run(1 / 40, seconds=400)
    assert machine.answered >= 9
    assert machine.computed <= machine.answered + 2


def test_one_slow_answer_does_not_turn_away_requests_that_a_quick_replica_can_do() -> None:
    one = router(batch_limit=64)
    one.add_replica("a", "n1")
    first = ask(one)
    (batch,) = one.dispatch(0.0)
    one.finished("a", batch.batch_id, (OK,), 8.0)  # it had to trace, for example
    answers = [ask(one, deadline=10.0)]
    (batch,) = one.dispatch(8.0)
    one.finished("a", batch.batch_id, (OK,), 8.001)
    for _ in range(40):
        answers.append(ask(one, deadline=10.0))
    now = 8.001
    while batches := one.dispatch(now):
        for batch in batches:
            now += 0.001
            one.finished("a", batch.batch_id, (OK,) * len(batch.requests), now)
    assert first == [OK]
    assert all(found == [OK] for found in answers)


def test_a_request_that_no_replica_answers_is_given_up() -> None:
    one = router()
    one.add_replica("a", "n1")
    answers = ask(one)
    for number in range(ATTEMPTS_LIMIT):
        assert not answers
        (batch,) = one.dispatch(float(number))
        one.finished("a", batch.batch_id, (DIED,), float(number))
    assert isinstance(answers[0], Unavailable)
    assert "died" in answers[0].message


def test_a_replica_that_fails_quickly_does_not_draw_the_traffic() -> None:
    one = router()
    one.add_replica("good", "n1")
    one.add_replica("dead", "n2")
    now, asked, tried = 0.0, [], 0
    for _ in range(200):
        asked.append(ask(one))
        for _ in range(8):
            batches = one.dispatch(now)
            for batch in batches:
                dead = batch.replica_id == "dead"
                tried += dead
                now += 0.0001 if dead else 0.01
                one.finished(batch.replica_id, batch.batch_id, ((DIED if dead else OK),) * len(batch.requests), now)
    assert all(answers == [OK] for answers in asked)
    assert tried <= 10  # about every REST_SECONDS


def test_an_idle_slow_replica_is_not_better_than_a_quick_one_at_work() -> None:
    one = router()
    for name, seconds in (("quick", 0.001), ("slow", 1.0)):
        one.add_replica(name, name)
        one.lanes[name].time.learn(1, seconds, alone=True)
        one.lanes.measure(one.lanes[name])
    went = []
    for _ in range(3):
        ask(one)
        went += [batch.replica_id for batch in one.dispatch(0.0)]
    assert went == ["quick", "quick"]  # the third waits for it: that is sooner than the slow one would be
    assert len(one.queue) == 1


def test_a_slow_replica_gets_what_it_answers_sooner_than_the_quick_one_would() -> None:
    one = router(batch_limit=64)
    for name, seconds in (("quick", 0.01), ("slow", 0.1)):
        one.add_replica(name, name)
        one.lanes[name].time.learn(8, 8 * seconds, alone=True)
        one.lanes.measure(one.lanes[name])
    one.lanes.tick(0.0)
    went = []
    for _ in range(3):
        for _ in range(20):
            ask(one)
        went += [(batch.replica_id, batch.rows) for batch in one.dispatch(0.0)]
    # The quick one would answer the last of the second 20 after 0.4 s: the slow one must finish with a margin before that.
    assert went == [("quick", 20), ("slow", 3), ("quick", 17), ("slow", 1)]


def test_what_a_slow_replica_is_late_with_goes_to_the_quick_one_too() -> None:
    one = router()
    for name, seconds in (("quick", 0.01), ("slow", 0.1)):
        one.add_replica(name, name)
        one.lanes[name].time.learn(1, seconds, alone=True)
        one.lanes.measure(one.lanes[name])
    one.lanes.tick(0.0)
    one.lanes["quick"].rests_until = 0.01
    answers = ask(one)
    (slow,) = one.dispatch(0.0)
    assert slow.replica_id == "slow"
    busy = [ask(one, now=0.1), *one.dispatch(0.1), ask(one, now=0.1), *one.dispatch(0.1), ask(one, now=0.1)]
    assert one.dispatch(0.1) == []
    assert one.hedge(0.15) == []
    (copy,) = one.hedge(0.21)  # before the waiting requests, and beyond its two batches
    assert (copy.replica_id, copy.requests) == ("quick", slow.requests)
    one.finished("quick", copy.batch_id, (OK,), 0.22)
    assert answers == [OK]
    assert len(busy) == 5


def test_a_frozen_replica_is_asked_last_from_then_on() -> None:
    one = router()
    for name in ("frozen", "well"):
        one.add_replica(name, name)
    while "frozen" not in [batch.replica_id for batch in (ask(one), one.dispatch(0.0))[1]]:
        for batch in list(one.lanes["well"].batches.values()):
            one.finished("well", batch.batch_id, (OK,) * len(batch.requests), 0.0)
    one.expire(11.0, batch_seconds=10.0)
    assert {batch.replica_id for batch in one.dispatch(11.0)} <= {"well"}


def test_a_request_on_its_way_is_answered_by_its_deadline() -> None:
    one = router()
    one.add_replica("a", "n1")
    answers = ask(one, deadline=2.0)
    (batch,) = one.dispatch(0.0)
    one.expire(2.0, batch_seconds=10.0)
    assert isinstance(answers[0], TimedOut)
    one.finished("a", batch.batch_id, (OK,), 3.0)
    assert len(answers) == 1
    assert one.served == 0


def test_an_error_of_the_request_itself_is_its_answer() -> None:
    one = router()
    one.add_replica("a", "n1")
    good, bad = ask(one), ask(one)
    wrong = RequestOutcome(error=ErrorInfo(code="invalid_request", message="shape"))
    batches = one.dispatch(0.0)
    outcomes = {1: (OK, wrong), 0: ()}
    if len(batches) == 1:
        one.finished("a", batches[0].batch_id, outcomes[1], 1.0)
    else:
        one.finished("a", batches[0].batch_id, (OK,), 1.0)
        one.finished("a", batches[1].batch_id, (wrong,), 1.0)
    assert (good, bad) == ([OK], [wrong])


def with_a_slow_batch(rows: int = 1) -> tuple[Router, Batch, list[Answers]]:
    """Two replicas that were quick a hundred times, and one batch that does not come back."""
    one = router()
    one.add_replica("a", "n1")
    one.add_replica("b", "n2")
    for number in range(100):
        ask(one, now=number / 100)
        for batch in one.dispatch(number / 100):
            one.finished(batch.replica_id, batch.batch_id, (OK,), number / 100 + 0.008)
    answers = [ask(one, now=10.0) for _ in range(rows)]
    (batch,) = one.dispatch(10.0)
    return one, batch, answers


def test_a_batch_that_is_slow_to_come_back_is_asked_elsewhere_too() -> None:
    one, slow, (answers,) = with_a_slow_batch()
    assert one.hedge_at() == pytest.approx(10.008, abs=0.002)
    assert one.hedge(10.005) == []
    (copy,) = one.hedge(10.02)
    assert copy.replica_id != slow.replica_id
    assert one.hedge(10.1) == []  # once
    one.finished(copy.replica_id, copy.batch_id, (OK,), 10.03)
    assert answers == [OK]
    assert one.withdrawn == [slow]
    one.finished(slow.replica_id, slow.batch_id, (OK,), 11.0)
    assert answers == [OK]
    assert one.served == 101


def test_the_first_answer_may_be_the_slow_one() -> None:
    one, slow, (answers,) = with_a_slow_batch()
    (copy,) = one.hedge(10.02)
    one.finished(slow.replica_id, slow.batch_id, (OK,), 10.03)
    assert answers == [OK]
    assert one.withdrawn == [copy]


def test_what_two_replicas_have_is_asked_again_when_both_are_lost() -> None:
    one, slow, (answers,) = with_a_slow_batch()
    (copy,) = one.hedge(10.02)
    one.remove_replica(copy.replica_id, 10.03)
    assert len(one.queue) == 0  # the other replica still has it
    one.finished(slow.replica_id, slow.batch_id, (DIED,), 10.04)
    assert len(one.queue) == 1
    (again,) = one.dispatch(11.0)
    one.finished(again.replica_id, again.batch_id, (OK,), 11.1)
    assert answers == [OK]


def test_a_request_that_is_cancelled_is_computed_no_more() -> None:
    one = router()
    requests, answers = [], []
    for _ in range(4):
        answers.append([])
        requests.append(Request((), answers[-1].append, 1000.0, 10))
    one.add_replica("a", "n1")
    for request in requests[:2]:
        one.submit(request, 0.0)
    (batch,) = one.dispatch(0.0)
    for request in requests[2:]:
        one.submit(request, 0.0)
    (second,) = one.dispatch(0.0)
    one.submit(last := Request((), (gone := []).append, 1000.0, 10), 0.0)
    one.cancel(last)
    assert len(one.queue) == 0
    one.cancel(requests[0])
    assert one.withdrawn == []  # the other request of its batch still waits
    one.cancel(requests[1])
    assert one.withdrawn == [batch]
    one.finished("a", batch.batch_id, (OK, OK), 0.1)
    one.finished("a", second.batch_id, (OK, OK), 0.2)
    one.cancel(requests[2])
    assert [[type(answer).__name__ for answer in given] for given in (*answers, gone)] == [
        ["Cancelled"], ["Cancelled"], ["RequestOutcome"], ["RequestOutcome"], ["Cancelled"],
    ]  # fmt: skip
    assert one.served == 2


class Traffic(RuleBasedStateMachine):
    """Requests, replicas that come and go, answers early, late and wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.router = router(queue_limit=20, batch_limit=3)
        self.now = 0.0
        self.asked: list[Answers] = []
        self.deadlines: list[float] = []
        self.out: list[Batch] = []
        self.requests: list[Request] = []

    @rule(seconds=st.floats(0.1, 40), rows=st.integers(1, 4), priority=st.sampled_from([0, 0, 0, 3, -3]))
    def submit(self, seconds: float, rows: int, priority: int) -> None:
        try:
            answers: Answers = []
            request = Request((), answers.append, self.now + seconds, 10, rows, priority)
            self.router.submit(request, self.now)
            self.asked.append(answers)
            self.requests.append(request)
            self.deadlines.append(self.now + seconds)
        except Overloaded:
            assert len(self.router.queue)
        self.out += self.router.dispatch(self.now)

    @rule(replica=st.sampled_from("abcdefghijklmno"))
    def come(self, replica: str) -> None:
        self.router.add_replica(replica, f"node-{replica}")
        self.out += self.router.dispatch(self.now)

    @rule(replica=st.sampled_from("abcdefghijklmno"))
    def go(self, replica: str) -> None:
        self.router.remove_replica(replica, self.now)
        self.out += self.router.dispatch(self.now)

    @rule(replica=st.sampled_from("abcdefghijklmno"))
    def connect_anew(self, replica: str) -> None:
        self.router.ask_again(replica, self.now)
        self.out += self.router.dispatch(self.now)

    @precondition(lambda self: self.out)
    @rule(data=st.data(), kind=st.sampled_from(["right", "short", "died", "mixed"]))
    def answer(self, data: st.DataObject, kind: str) -> None:
        batch = data.draw(st.sampled_from(self.out))  # again and again: messages may come twice
        outcomes = (OK,) * (len(batch.requests) - (kind == "short"))
        if kind in ("died", "mixed"):
            outcomes = (DIED, *outcomes[1:]) if kind == "mixed" else (DIED,) * len(outcomes)
        self.router.finished(batch.replica_id, batch.batch_id, outcomes, self.now)
        self.out += self.router.dispatch(self.now)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.requests) - 1))
        self.router.cancel(self.requests[place])
        assert self.asked[place]

    @rule(seconds=st.floats(0.0, 2.0))
    def hedge(self, seconds: float) -> None:
        self.router._hedging.after_seconds = 0.01
        self.now += seconds
        hedged = self.router.hedge(self.now)
        assert all(batch.twin is not None and batch.twin.replica_id != batch.replica_id for batch in hedged)
        self.out += hedged

    @rule(seconds=st.sampled_from([0.0, 0.01, 1.0]))
    def choose(self, seconds: float) -> None:
        self.router.set_objective(seconds)

    @rule(seconds=st.floats(0, 15))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.router.expire(self.now, batch_seconds=10.0)
        # Nobody waits past the deadline, wherever the request is.
        assert all(
            answers for answers, deadline in zip(self.asked, self.deadlines, strict=True) if deadline <= self.now
        )
        self.out += self.router.dispatch(self.now)

    @invariant()
    def every_request_is_somewhere_or_answered_once(self) -> None:
        assert all(len(answers) <= 1 for answers in self.asked)
        open_requests = [request for request, answers in zip(self.requests, self.asked, strict=True) if not answers]
        batches = [batch for lane in self.router.lanes.values() for batch in lane.batches.values()]
        out = {id(request): request for batch in batches for request in batch.requests}
        waiting = list(self.router.queue)
        assert {id(request) for request in open_requests} == {
            *(id(request) for request in waiting),
            *(place for place, request in out.items() if not request.answered),
        }
        assert not any(id(request) in out for request in waiting)
        assert not any(request.answered for request in waiting)
        assert set(self.router._away) <= {batch.batch_id for batch in batches}
        assert all(not batch.wanted for batch in self.router.withdrawn)
        self.router.queue.check_invariants()
        self.router.lanes.check_invariants()

    def teardown(self) -> None:
        self.router.close(Unavailable("gone"))
        assert all(len(answers) == 1 for answers in self.asked)


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_time_is_up() -> None:
    one = router()
    answers = ask(one, deadline=5.0)
    one.expire(4.0, 10.0)
    assert answers == []
    one.expire(5.0, 10.0)
    assert isinstance(answers[0], TimedOut)
