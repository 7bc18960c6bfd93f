"""When a round is over, and from which weights it began."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coordinator.plans.training.contributions import Contributions
from potluck.wire.tasks import TrainResult
from potluck.wire.values import BlobRef


def blob(number: int) -> BlobRef:
    return BlobRef(sha256=f"{number:064x}", size=1)


def result(base: int = 0, update: int = 9) -> TrainResult:
    return TrainResult(base=blob(base), update=blob(update), samples=10, steps=1, norm=1.0, seconds=1.0)


@given(st.sets(st.sampled_from("abcd")), st.sets(st.sampled_from("abcd")), st.booleans())
def test_a_round_is_over_when_all_that_was_promised_is_here_or_late(here: set[str], gone: set[str], late: bool) -> None:
    found = Contributions()
    for node_id in here | gone:
        found.promise(node_id, 1.0, 10.0, parts=0)
        if node_id in here:
            found.results[node_id] = result()
    assert found.over(in_time=not late) == (bool(here) and (late or not gone - here))


def test_whoever_does_a_part_again_is_not_waited_for_once_the_first_is_done() -> None:
    found = Contributions()
    found.promise("a", 1.0, 10.0, parts=0)
    assert found.due == 11.0
    found.promise("b", 11.0, 20.0, parts=0)
    assert (found.promised, found.due) == ({"a"}, 31.0)
    assert not found.over(in_time=True)
    found.results["a"] = result()
    assert found.over(in_time=True)


def test_numbered_parts_are_all_waited_for() -> None:
    found = Contributions()
    found.promise("a", 1.0, 10.0, parts=2)
    found.results["part 0"] = result()
    assert not found.over(in_time=False)
    found.results["part 1"] = result()
    assert found.over(in_time=True)
    found.closed()
    assert (found.results, found.promised, found.due, found.parts) == ({}, frozenset(), 0.0, 2)


def test_a_round_begins_from_the_weights_of_most_and_of_as_many_from_those_of_the_faster() -> None:
    found = Contributions({"a": result(1), "b": result(2), "c": result(2)})
    assert found.first_base({"a": 100.0}) == blob(2)
    del found.results["c"]
    assert found.first_base({"a": 100.0, "b": 1.0}) == blob(1)
    assert found.began_elsewhere(blob(1)).keys() == {"b"}
    assert found.kept() == {blob(1).sha256, blob(2).sha256, blob(9).sha256}
