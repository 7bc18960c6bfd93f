"""How the nodes share the data: by speed, and as before where that is about right."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coordinator.plans.events import RoundPlanned
from coordinator.plans.training.sharing import Sharing


def planned(found: Sharing, counts: list[int], rates: dict[str, float]) -> None:
    assigned, shares = found.assignment(counts, rates)
    found.planned(RoundPlanned(at=1.0, round=0, assigned=assigned, shares=shares))


def test_data_stay_until_a_share_has_moved_by_a_third_or_a_node_has_gone() -> None:
    found, counts = Sharing(), [10] * 8
    planned(found, counts, {"a": 1.0, "b": 1.0})
    assert {name: len(held) for name, held in found.assigned.items()} == {"a": 4, "b": 4}
    before = found.assigned
    assert found.assignment(counts, {"a": 1.5, "b": 1.0})[0] == before
    moved, _ = found.assignment(counts, {"a": 3.0, "b": 1.0})
    assert {name: len(held) for name, held in moved.items()} == {"a": 6, "b": 2}
    alone, _ = found.assignment(counts, {"b": 1.0})
    assert alone == {"b": tuple(range(8))}


@given(st.dictionaries(st.sampled_from("abcd"), st.floats(0.1, 100.0), min_size=1), st.integers(1, 9))
def test_once_it_is_planned_it_is_planned_alike_again(rates: dict[str, float], shards: int) -> None:
    found = Sharing()
    planned(found, [10] * shards, rates)
    assert found.assignment([10] * shards, rates) == (found.assigned, found.shares)


def test_a_plan_about_slow_nodes_alone_leaves_the_data_where_they_are() -> None:
    found = Sharing(assigned={"a": (0,)}, shares={"a": 1.0})
    found.planned(RoundPlanned(at=5.0, round=3, slow={"b": "it is slow"}))
    assert (found.assigned, found.shares) == ({"a": (0,)}, {"a": 1.0})
    assert (found.slow, found.slow_at) == ({"b": "it is slow"}, 5.0)


def test_what_a_node_gets_ready_with_counts_until_it_has_a_part() -> None:
    found = Sharing()
    found.rehearses("a", (1, 2))
    found.has("a", (3,))
    found.rehearses("a", (4,))
    assert found.assigned == {"a": (3,)}
