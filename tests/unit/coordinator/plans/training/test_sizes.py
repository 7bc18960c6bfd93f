"""How many samples a round has."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from coordinator.plans.training import sizes
from coordinator.plans.training.given import Given
from coordinator.plans.training.state import TrainingState
from potluck.wire.jobs import Train
from potluck.wire.values import BlobRef, DataFormat, Dataset

BLOB = BlobRef(sha256="0" * 64, size=1)


def state(count: int, **options: Any) -> TrainingState:
    spec = Train(model="m", dataset="d", **{"batch_size": 10, "epochs": 3, **options})
    data = Dataset(name="d", format=DataFormat(kind="arrays"), count=count, shards=())
    return TrainingState.of(Given(spec, BLOB, None, data), None)


def test_a_round_is_half_an_epoch_and_as_long_as_its_overhead_where_there_is_time() -> None:
    found = state(1000)
    assert sizes.round_size(found, {"a": 1000.0}) == 500
    found.measured.closed(1, 1.0, 0.8)
    assert sizes.round_size(found, {"a": 1000.0}) == 1000, "one round, of 0.8 s of overhead and a second of computing"


def test_a_round_is_no_longer_than_its_budget_and_those_of_an_epoch_are_of_one_length() -> None:
    assert sizes.round_size(state(1000), {"a": 10.0}) == 50, "what is done in the time of a first round"
    assert sizes.round_size(state(1000, round_seconds=3.0), {"a": 100.0}) == 334


@given(st.integers(1, 5000), st.integers(0, 5000), st.floats(0.5, 1e4), st.floats(0.0, 100.0))
def test_rounds_of_one_size_end_with_the_epoch(count: int, seen: int, rate: float, overhead: float) -> None:
    found = state(count)
    found.epochs.samples = min(seen, count - 1)
    found.measured.closed(1, 1.0, overhead)
    left = found.epochs.left
    size = sizes.round_size(found, {"a": rate})
    assert 1 <= size <= left
    rounds = -(-left // size)
    assert rounds * size - left < rounds


def test_nobody_trains_on_a_few_items_only() -> None:
    assert sizes.at_least({"a": 95, "b": 0, "c": 5}, 100, 10) == {"a": 95, "b": 10, "c": 10}
    assert sizes.at_least({"a": 3, "b": 0}, 3, 10) == {"a": 3, "b": 1}
    assert [sizes.whole_batches(samples, 10) for samples in (4, 10, 14, 16, 31)] == [4, 10, 10, 20, 30]
