"""How long a replica needs for a batch: learned from few batches, even if some were disturbed."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.serving.timing import FORGETTING, OUTLIER, TimeModel

FIXED = st.floats(0.0, 0.1)
EACH = st.floats(1e-5, 0.1)


def taught(fixed: float, each: float, rows: list[int]) -> TimeModel:
    model = TimeModel()
    for count in rows:
        model.learn(count, fixed + each * count, alone=False)
    return model


@given(FIXED, EACH, st.integers(0, 1000))
def test_batches_of_all_sizes_tell_both_parts(fixed: float, each: float, seed: int) -> None:
    rng = random.Random(seed)
    model = taught(fixed, each, [rng.randint(1, 64) for _ in range(60)])
    for rows in (1, 16, 64):
        assert model.seconds(rows) == pytest.approx(fixed + each * rows, rel=0.1, abs=1e-4)


@given(FIXED, EACH, st.integers(1, 64))
def test_batches_of_one_size_tell_what_that_size_takes(fixed: float, each: float, rows: int) -> None:
    model = taught(fixed, each, [rows] * 10)
    assert model.seconds(rows) == pytest.approx(fixed + each * rows)
    assert model.fixed_seconds >= 0.0
    assert model.row_seconds >= 0.0


@given(
    st.lists(st.tuples(st.integers(1, 1000), st.floats(0.0, 100.0), st.booleans()), max_size=60), st.floats(0.0, 10.0)
)
def test_whatever_comes_the_model_can_be_used(batches: list[tuple[int, float, bool]], within: float) -> None:
    model = TimeModel()
    for rows, seconds, alone in batches:
        model.learn(rows, seconds, alone=alone)
        assert model.fixed_seconds >= 0.0
        assert model.row_seconds >= 0.0
        assert 1 <= model.rows_within(within, 64) <= 64


def test_a_pause_counts_for_little() -> None:
    model = taught(0.001, 0.0001, [1, 8, 4, 16, 2, 10, 5, 3, 12, 7])
    before = model.seconds(8)
    model.learn(8, 3.0, alone=False)
    assert model.seconds(8) <= before * (1 + 2 * OUTLIER * FORGETTING)


def test_a_replica_that_has_become_slow_is_seen_to_be() -> None:
    model = taught(0.0, 0.001, [4] * 20)
    for _ in range(25):
        model.learn(4, 0.4, alone=False)
    assert model.seconds(4) == pytest.approx(0.4, rel=0.2)


def test_a_slow_first_call_is_forgotten_at_once() -> None:
    model = TimeModel()
    model.learn(1, 8.0, alone=True)
    model.learn(1, 0.001, alone=True)
    assert model.seconds(1) == pytest.approx(0.001)


def test_behind_another_batch_it_takes_two_that_are_quick() -> None:
    model = TimeModel()
    model.learn(1, 8.0, alone=True)
    model.learn(1, 0.001, alone=False)  # it may have arrived together with the one before
    assert model.seconds(1) > 1.0
    model.learn(1, 0.001, alone=False)
    assert model.seconds(1) == pytest.approx(0.001)


def test_a_batch_stays_within_its_time() -> None:
    model = taught(0.002, 0.001, [1, 30, 8, 50, 4, 16, 60, 2, 12, 40])
    assert 14 <= model.rows_within(0.02, 64) <= 20
    assert model.rows_within(1.0, 64) == 64


def test_a_batch_is_not_made_so_small_that_most_of_its_time_is_wasted() -> None:
    model = taught(0.040, 0.001, [1, 30, 8, 50, 4, 16, 60, 2, 12, 40] * 3)
    assert model.rows_within(0.010, 64) >= 30


def test_two_rows_are_tried_when_nothing_but_single_ones_was_seen() -> None:
    model = taught(0.040, 0.0001, [1] * 10)
    assert model.rows_within(0.010, 64) == 2
    model.learn(2, 0.0402, alone=False)
    assert model.rows_within(0.010, 64) > 2
