"""Order and cuts: a permutation, stratified, the same for a seed; shards that cover everything once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.data.order import cuts, shuffled
from potluck.wire.values import SHARDS_LIMIT


@given(st.lists(st.integers(-1, 5), min_size=1, max_size=300), st.integers(0, 2**31))
def test_a_permutation_that_a_seed_decides(labels: list[int], seed: int) -> None:
    array = np.asarray(labels)
    order = shuffled(array, len(labels), seed)
    assert sorted(order.tolist()) == list(range(len(labels)))
    assert (order == shuffled(array, len(labels), seed)).all()


@given(st.integers(2, 6), st.integers(0, 1000))
def test_every_stretch_has_the_mixture_of_the_whole(classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(5, 400, classes)
    labels = np.repeat(np.arange(classes), counts)  # sorted by class, as folders are
    mixed = labels[shuffled(labels, len(labels), seed)]
    size = 40
    for start in range(0, len(labels) - size + 1, size):
        stretch = mixed[start : start + size]
        for index, count in enumerate(counts):
            expected = size * count / len(labels)
            assert abs((stretch == index).sum() - expected) <= classes + 1


def test_other_seeds_give_other_orders() -> None:
    labels = np.repeat([0, 1], 50)
    assert shuffled(labels, 100, 1).tolist() != shuffled(labels, 100, 2).tolist()
    assert shuffled(None, 100, 1).tolist() != shuffled(None, 100, 2).tolist()


@given(st.lists(st.integers(1, 10_000), max_size=300), st.integers(1, 50_000))
def test_cuts_cover_everything_once(sizes: list[int], shard_bytes: int) -> None:
    found = cuts(sizes, shard_bytes)
    assert [place for start, stop in found for place in range(start, stop)] == list(range(len(sizes)))
    assert all(start < stop for start, stop in found)
    largest = max(sizes, default=0)
    assert all(sum(sizes[start:stop]) <= shard_bytes + 2 * largest for start, stop in found)


@pytest.mark.parametrize(("count", "shards"), [(1, 1), (15, 1), (64, 4), (10_000, 32)])
def test_small_sets_are_cut_so_that_nodes_can_share_them(count: int, shards: int) -> None:
    assert len(cuts([100] * count, 8 << 20)) == shards


def test_a_set_has_no_more_shards_than_a_lease_can_name() -> None:
    found = cuts([1 << 20] * 100_000, 8 << 20)
    assert len(found) == SHARDS_LIMIT
    assert max(stop - start for start, stop in found) == 200


def test_shards_are_of_the_size_asked_for() -> None:
    found = cuts([100_000] * 10_000, 8 << 20)
    assert len(found) == 120
    assert max(stop - start for start, stop in found) <= 84
