"""The queue of requests: order, priorities, and the share that low priorities keep."""

from __future__ import annotations

from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from coordinator.serving.batches import Request
from coordinator.serving.queueing import SHARE, RequestQueue


def request(priority: int = 0, rows: int = 1, asked_at: float = 0.0, held_by: str = "") -> Request:
    return Request((), lambda outcome: None, 1000.0, 10, rows, priority, asked_at, held_by=held_by)


def queue_of(*priorities: int) -> RequestQueue:
    queue = RequestQueue()
    for number, priority in enumerate(priorities):
        queue.push(request(priority, asked_at=float(number)))
    return queue


def test_higher_priorities_come_first_and_equal_ones_in_their_order() -> None:
    queue = queue_of(0, 5, 0, -3, 5)
    assert [(one.priority, one.asked_at) for one in (queue.pop() for _ in range(5))] == [
        (5, 1.0), (5, 4.0), (0, 0.0), (0, 2.0), (-3, 3.0),
    ]  # fmt: skip


def test_a_low_priority_does_not_starve() -> None:
    queue = queue_of(-10)
    taken = []
    for number in range(1, 4 * SHARE):
        queue.push(request(10, asked_at=float(number)))
        taken.append(queue.pop().priority)
    assert taken.index(-10) < SHARE
    assert taken.count(-10) == 1


def test_rows_that_come_before() -> None:
    queue = queue_of(0, 5, 0, -3)
    assert [queue.rows_before(priority) for priority in (10, 5, 0, -10)] == [0, 1, 3, 4]


def test_the_newest_of_the_lowest_makes_room_and_a_share_stays() -> None:
    queue = queue_of(0, -5, 0, -5, *[0] * 20)
    assert queue.crowd_out(-5) is None
    first = queue.crowd_out(3)
    assert first is not None
    assert (first.priority, first.asked_at) == (0, 23.0)  # the two lower ones only get their share
    assert queue_of(0, -5, 0, -5).crowd_out(0).asked_at == 3.0  # type: ignore[union-attr]


def test_the_next_for_a_replica_is_one_whose_inputs_are_near_it_or_in_the_request() -> None:
    queue = RequestQueue()
    assert queue.next_for("a") is None
    first, second, third = (request(held_by=node, asked_at=at) for at, node in enumerate(("b", "a", "")))
    for one in (first, second, third):
        queue.push(one)
    assert list(queue.first()) == [first, second, third]
    assert queue.next_for("a") is second
    queue.take(second)
    assert queue.next_for("a") is third
    assert queue.next_for("b") is first
    urgent = request(priority=1, held_by="c")
    queue.push(urgent)
    assert queue.head() is urgent
    assert queue.next_for("b") is first
    queue.check_invariants()


class Queueing(RuleBasedStateMachine):
    """Compared with plain lists by priority."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = RequestQueue()
        self.model: dict[int, deque[Request]] = {}

    @rule(
        priority=st.integers(-10, 10), rows=st.integers(1, 9), front=st.booleans(), held_by=st.sampled_from(["", "a"])
    )
    def push(self, priority: int, rows: int, front: bool, held_by: str) -> None:
        one = request(priority, rows, held_by=held_by)
        waiting = self.model.setdefault(priority, deque())
        if front:
            self.queue.push_front(one)
            waiting.appendleft(one)
        else:
            self.queue.push(one)
            waiting.append(one)

    @precondition(lambda self: len(self.queue))
    @rule()
    def pop(self) -> None:
        head = self.queue.head()
        assert self.queue.pop() is head
        assert self.model[head.priority].popleft() is head

    @precondition(lambda self: len(self.queue))
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(list(self.queue)))
        assert self.queue.remove(one)
        assert not self.queue.remove(one)
        self.model[one.priority].remove(one)

    @precondition(lambda self: len(self.queue))
    @rule(node=st.sampled_from(["a", "b"]))
    def take(self, node: str) -> None:
        one = self.queue.next_for(node)
        if one is not None:
            assert one.held_by in ("", node)
            self.queue.take(one)
            self.model[one.priority].remove(one)

    @rule(priority=st.integers(-10, 10))
    def crowd_out(self, priority: int) -> None:
        one = self.queue.crowd_out(priority)
        if one is not None:
            assert one.priority < priority
            assert self.model[one.priority].pop() is one

    @invariant()
    def alike(self) -> None:
        self.queue.check_invariants()
        expected = [one for _, waiting in sorted(self.model.items(), reverse=True) for one in waiting]
        assert list(self.queue) == expected


TestQueueing = Queueing.TestCase
TestQueueing.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
