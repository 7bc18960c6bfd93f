"""Training gives way while an objective is at risk, but never for ever."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from node.giving_way import LONGEST_SECONDS, QUIET_SECONDS, GivingWay

OBJECTIVE = 0.1


def test_it_gives_way_to_what_is_at_risk_alone_and_goes_on_when_it_is_quiet() -> None:
    giving = GivingWay(0.9)
    giving.served(OBJECTIVE, 0.04, 10.0)
    assert not giving.paused
    giving.served(OBJECTIVE, 0.06, 10.1)
    assert giving.paused
    giving.served(OBJECTIVE, 0.01, 10.2)  # quick, because training stands still
    giving.passed(10.1 + QUIET_SECONDS)
    assert giving.paused
    giving.passed(10.2 + QUIET_SECONDS)
    assert not giving.paused


@given(st.floats(0.05, 0.99), st.lists(st.tuples(st.floats(0.01, 3.0), st.booleans()), min_size=1, max_size=400))
def test_training_keeps_its_share(share: float, batches: list[tuple[float, bool]]) -> None:
    giving, now, still = GivingWay(share), 0.0, 0.0
    for seconds, late in batches:
        paused, before = giving.paused, now
        now += seconds
        giving.passed(now)
        still += (now - before) * paused
        giving.served(OBJECTIVE, 1.0 if late else 0.01, now)
    assert still <= share * now + LONGEST_SECONDS + 3.0


def test_under_traffic_without_an_end_it_runs_for_what_it_is_owed() -> None:
    giving, still = GivingWay(0.8), 0
    for tick in range(10_000):
        giving.served(OBJECTIVE, 0.09, tick / 10)
        still += giving.paused
    assert 0.75 <= still / 10_000 <= 0.85


def test_with_a_share_of_one_it_stands_still_for_as_long_as_it_takes() -> None:
    giving = GivingWay(1.0)
    for tick in range(5000):
        giving.served(OBJECTIVE, 0.09, tick / 10)
    assert giving.paused
