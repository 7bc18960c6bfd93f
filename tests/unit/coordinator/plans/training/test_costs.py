"""The cost model by which `auto` chooses."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coordinator.plans.training import costs
from coordinator.plans.training.costs import Costs, predict

CNN = Costs((100.0, 100.0), 51_600_000, 100_000_000, 60_000, 64, 12.5e6)


def test_slow_links_make_rounds_and_fast_ones_synchronous_steps() -> None:
    assert predict(CNN).choice == "local"
    small = Costs((100.0, 100.0), 400_000, 1_000_000, 60_000, 64, 125e6)
    assert predict(small).choice == "sync"
    assert predict(Costs((100.0,), 400_000, 1_000_000, 60_000, 64, 125e6)).choice == "local"
    closed = Costs((100.0, 100.0), 400_000, 1_000_000, 60_000, 64, 125e6, together=False)
    assert predict(closed).choice == "local"
    large = Costs((100.0, 100.0), 400_000, 2 * costs.DATA_LIMIT_BYTES, 10**9, 64, 1e12)
    assert predict(large).choice == "local"


def test_the_choice_is_told_with_its_figures() -> None:
    words = predict(CNN).words("local")
    assert words.startswith("local: 100 + 100 samples/s, 51.6 MB of weights, 12 MB/s: local ")
    assert ", sync " in words


@given(
    rates=st.lists(st.floats(1, 1000), min_size=2, max_size=6),
    weights=st.integers(1000, 10**9),
    fast=st.floats(1e6, 1e9),
)
def test_more_bandwidth_never_makes_anything_slower(rates: list[float], weights: int, fast: float) -> None:
    slow = predict(Costs(tuple(rates), weights, 0, 10_000, 32, fast))
    fast_one = predict(Costs(tuple(rates), weights, 0, 10_000, 32, 2 * fast))
    assert fast_one.sync_seconds <= slow.sync_seconds
    assert fast_one.local_seconds <= slow.local_seconds * 1.0001
