"""Which nodes get something of a job, and what ends it, after errors."""

from __future__ import annotations

import pytest

from coordinator.plans.failings import OPINION_SECONDS, REST_SECONDS, Failings
from coordinator.plans.placement import ClusterView, NodeView
from potluck.errors import CodeNotAllowed
from potluck.wire.values import ErrorInfo

DIED = ErrorInfo(code="engine_failed", message="died", retryable=True)
WRONG = ErrorInfo(code="invalid_model", message="no")
SHORT = ErrorInfo(code="out_of_memory", message="the GPU is full", retryable=True)
ALL = frozenset("ab")


def view(nodes: str = "ab", now: float = 0.0, free_slots: int = 1) -> ClusterView:
    return ClusterView(tuple(NodeView(name, 1.0, free_slots) for name in nodes), now)


def takers(found: Failings, seen: ClusterView, *, at_work: bool = False) -> set[str]:
    return {node.node_id for node in found.takers(seen, ALL, at_work=at_work).nodes}


def test_where_nothing_failed_the_view_stays_as_it_is() -> None:
    seen = view()
    assert Failings().takers(seen, ALL, at_work=False) is seen
    assert Failings().fatal(3, seen, ALL, []) is None


def test_a_node_that_failed_rests_twice_as_long_each_time_until_one_succeeds() -> None:
    found = Failings()
    found.failed("a", DIED, at=10.0)
    assert found.takers(view(now=10.0), ALL, at_work=True) == ClusterView(view("b").nodes, 10.0, frozenset({"a"}))
    assert takers(found, view(now=10.0 + 2 * REST_SECONDS)) == {"a", "b"}
    found.failed("a", DIED, at=20.0)
    assert found.resting["a"] == 20.0 + 4 * REST_SECONDS
    found.done("b", 21.0, succeeded=False)
    assert found.in_a_row == {"a": 2}, "to be ready is not yet to succeed"
    found.done("b", 22.0, succeeded=True)
    assert found.in_a_row == {}


def test_a_node_that_fails_too_often_ends_the_job_unless_another_is_at_work() -> None:
    found = Failings()
    for _ in range(3):
        assert found.fatal(3, view(), ALL, []) is None
        found.failed("a", DIED, at=1.0)
    assert found.fatal(3, view(), ALL, ["b"]) is None
    assert found.fatal(3, view(), ALL, ["a"]) == ErrorInfo(code="engine_failed", message="node a: died", retryable=True)


def test_that_another_was_lost_is_no_failing() -> None:
    found = Failings()
    found.failed("a", ErrorInfo(code="peer_lost", message="gone", retryable=True), at=5.0)
    assert (found.in_a_row, found.resting, found.touched_at) == ({}, {}, 5.0)


def test_what_cannot_be_mended_is_for_another_to_say_as_well() -> None:
    found = Failings()
    found.failed("a", WRONG, at=1.0)
    assert found.fatal(3, view(now=2.0), ALL, []) is None
    assert takers(found, view(now=2.0)) == {"b"}
    assert found.fatal(3, view("a", now=2.0), frozenset("a"), []) == WRONG, "there is no other"
    assert found.fatal(3, view(now=1.0 + OPINION_SECONDS), ALL, []) == WRONG, "nobody has shown that it can be done"
    found.done("b", 3.0, succeeded=True)
    assert found.fatal(3, view("a", now=1e6), ALL, []) is None, "it can be, by one that is away"
    found.failed("b", WRONG, at=4.0)
    assert found.fatal(3, view(now=4.0), ALL, []) == WRONG


def test_where_the_others_do_nothing_whoever_called_it_hopeless_is_asked_again() -> None:
    found = Failings()
    found.failed("a", WRONG, at=1.0)
    later = 1.0 + OPINION_SECONDS
    assert takers(found, view(now=later)) == {"a", "b"}
    assert takers(found, view(now=later), at_work=True) == {"b"}
    assert takers(found, view(now=later, free_slots=0)) == {"b"}, "it is busy with other jobs"
    assert takers(found, view(now=1.0 + 10 * OPINION_SECONDS, free_slots=0)) == {"a", "b"}


def test_a_node_without_the_memory_is_left_out_the_second_time_in_a_row() -> None:
    found = Failings()
    found.failed("a", SHORT, at=1.0)
    found.done("a", 2.0, succeeded=True)
    found.failed("a", SHORT, at=3.0)
    assert found.refused == {}
    found.failed("a", SHORT, at=4.0)
    assert found.refused == {"a": SHORT}
    assert takers(found, view(now=1e6)) == {"b"}


def test_when_all_are_left_out_the_first_says_why() -> None:
    found = Failings()
    for name in "ab":
        found.failed(name, ErrorInfo(code=CodeNotAllowed.code, message=f"{name} does not allow it"), at=1.0)
    with pytest.raises(CodeNotAllowed, match="no node runs this model: a does not allow it"):
        found.takers(view(), ALL, at_work=False)
    assert takers(found, view("")) == set()
    assert found.takers(view("a"), frozenset("abc"), at_work=False).nodes == (), "c was there, and may come back"
