"""Which attempts are parts of the open round."""

from __future__ import annotations

import pytest

from coordinator.plans.job import Attempt
from coordinator.plans.training.open_round import OpenRound, part_name


def attempt(shard_id: str) -> Attempt:
    return Attempt("a", shard_id, "n1", 0.0)


@pytest.mark.parametrize(
    ("shard_id", "mine"),
    [
        ("round-1", True), ("round-1.0", True), ("round-1.12", True),
        ("round-0", False), ("round-10", False), ("round-10.1", False), ("warm-up", False), ("validation-1-0-5", False),
    ],
)  # fmt: skip
def test_an_attempt_is_told_by_its_shard(shard_id: str, mine: bool) -> None:
    assert OpenRound(number=1).has(attempt(shard_id)) == mine


def test_parts_are_told_apart_by_their_nodes_or_by_their_numbers() -> None:
    found = OpenRound(number=3)
    assert found.contributor(attempt(found.shard_id)) == "n1"
    assert found.contributor(attempt(found.numbered(12))) == part_name(12)
    assert sorted(map(part_name, range(12))) == list(map(part_name, range(12)))


def test_the_first_round_of_an_epoch_counts_from_its_opening_and_others_from_the_round_before() -> None:
    found = OpenRound(opened_at=5.0)
    assert found.seconds(7.0) == 2.0
    found.closed(7.0, ["a", "b"])
    assert (found.number, found.crew) == (1, {"a", "b"})
    found.opened_at = 8.0
    assert found.seconds(10.0) == 3.0
    found.epoch_ended()
    assert found.seconds(10.0) == 2.0
    assert found.seconds(1.0) == 0.0, "clocks may be set back"
