"""The router under load, in simulated time: objective, overload, different replicas, priorities."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from coordinator.serving.hedging import BURST
from support.traffic import Answers, Replica, Traffic

MODELS = {"network": (0.002, 0.0005), "image": (0.0001, 0.01), "accelerator": (0.02, 0.0002)}
"""(time per batch, time per row) of a small network, of an image model on a core, and of a model on an accelerator."""


def at_load(
    kind: str, load: float, *, objective: float = 0.0, deadline: float = 30.0
) -> tuple[Traffic, Answers, float]:
    """Two seconds of traffic after a warm-up of one, at this multiple of the replica's capacity; and that capacity."""
    capacity = Replica(*MODELS[kind]).rows_per_second(64)
    traffic = Traffic({"a": Replica(*MODELS[kind])}, objective_seconds=objective)
    traffic.run(capacity * load, 1.0, deadline_seconds=deadline)
    return traffic, traffic.run(capacity * load, 2.0, deadline_seconds=deadline)[0], capacity


@pytest.mark.parametrize("kind", MODELS)
def test_at_seven_tenths_of_capacity_the_tail_is_short(kind: str) -> None:
    _, answers, _ = at_load(kind, 0.7)
    assert len(answers.seconds) == answers.asked
    assert answers.percentile(99) <= 5 * answers.percentile(50)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("objective", [0.0, 0.1])
def test_at_three_times_capacity_as_much_is_answered_in_time_as_at_the_peak(kind: str, objective: float) -> None:
    def goodput(load: float) -> int:
        _, answers, _ = at_load(kind, load, objective=objective, deadline=0.25)
        return sum(seconds <= 0.25 for seconds in answers.seconds)

    assert goodput(3.0) >= 0.9 * max(goodput(0.9), goodput(1.2))


@pytest.mark.parametrize("kind", MODELS)
def test_who_is_refused_is_told_at_once_and_when_to_come_back(kind: str) -> None:
    traffic, answers, _ = at_load(kind, 3.0, deadline=0.25)
    assert answers.answered == answers.asked
    assert answers.failures["overloaded"] > 0.5 * answers.asked
    assert answers.failures["timed_out"] <= 0.01 * answers.asked
    assert all(answers.retry_after)
    assert traffic.longest_queue < 1000


@pytest.mark.parametrize(("kind", "objective"), [("network", 0.05), ("image", 0.06), ("accelerator", 0.12)])
def test_what_is_answered_stays_within_the_objective_however_much_is_asked(kind: str, objective: float) -> None:
    _, answers, capacity = at_load(kind, 3.0, objective=objective)
    assert answers.percentile(90) <= objective
    assert answers.percentile(99) <= 1.3 * objective
    assert len(answers.seconds) >= 0.8 * 2 * capacity


def test_an_objective_that_cannot_be_held_costs_no_throughput() -> None:
    _, answers, capacity = at_load("accelerator", 1.5, objective=0.01)
    assert len(answers.seconds) >= 0.85 * 2 * capacity


def test_requests_of_many_rows_count_for_so_many() -> None:
    traffic = Traffic({"a": Replica(0.002, 0.001)}, objective_seconds=0.1)
    asked = traffic.run(100, 3.0, rows=(1, 1, 1, 16), deadline_seconds=1.0)[0]
    assert asked.failures.total() <= 0.05 * asked.asked
    assert traffic.router.lanes["a"].time.row_seconds == pytest.approx(0.001, rel=0.3)
    assert traffic.router.lanes["a"].limit <= 40


@pytest.mark.parametrize(("times", "share"), [(2, 2.0), (4, 4.0), (20, 27.0)])
def test_unequal_replicas_share_by_their_speed(times: int, share: float) -> None:
    """One that is 20 times slower gets only three or four rows at a time, so that it delays no request. This costs speed."""
    quick, slow = Replica(0.001, 0.001), Replica(0.001 * times, 0.001 * times)
    traffic = Traffic({"quick": quick, "slow": slow})
    both = quick.rows_per_second(64) + slow.rows_per_second(64)
    traffic.run(1.2 * both, 3.0, deadline_seconds=0.5)
    assert quick.rows / slow.rows == pytest.approx(share, rel=0.25)


def throttled(kind: str) -> Replica:
    """A replica with a quota of a tenth of a processor: as quick as the other one for 10 ms, and then it waits for 90 ms."""
    return Replica(*MODELS[kind], [(at / 10 + 0.01, at / 10 + 0.1) for at in range(100)])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("clients", [8, 32, 100])
def test_a_replica_ten_times_slower_costs_nothing(kind: str, clients: int) -> None:
    fixed_seconds, row_seconds = MODELS[kind]

    def asked(**others: Replica) -> Answers:
        traffic = Traffic({"quick": Replica(fixed_seconds, row_seconds), **others}, seed=3)
        traffic.clients(clients, 1.0)
        return traffic.clients(clients, 4.0)

    alone, both = asked(), asked(slow=Replica(10 * fixed_seconds, 10 * row_seconds))
    assert len(both.seconds) >= 0.98 * len(alone.seconds)  # the times of batches are random
    assert both.percentile(99) <= 1.1 * alone.percentile(99)


@pytest.mark.parametrize("load", [0.5, 0.9, 1.3])
@pytest.mark.parametrize("slow", [Replica(0.02, 0.005), throttled("network")], ids=["steady", "throttled"])
def test_whatever_the_load_a_slow_replica_makes_no_tail(load: float, slow: Replica) -> None:
    def answers(**others: Replica) -> Answers:
        quick = Replica(*MODELS["network"])
        traffic = Traffic({"quick": quick, **others}, seed=3)
        rate = load * quick.rows_per_second(64)
        traffic.run(rate, 1.0, deadline_seconds=1.0)
        return traffic.run(rate, 4.0, deadline_seconds=1.0)[0]

    alone, both = answers(), answers(slow=replace(slow))
    assert len(both.seconds) >= 0.98 * len(alone.seconds) * both.asked / alone.asked
    assert both.percentile(99) <= 1.1 * alone.percentile(99)


def test_equal_replicas_are_not_taken_for_slow_ones_whatever_the_size_of_batches() -> None:
    """All batches have 32 or 64 rows: how long a single row would take cannot be told from them."""
    for seed in range(5):
        traffic = Traffic({"a": Replica(0.001, 0.01), "b": Replica(0.001, 0.01)}, seed=seed)
        lanes = traffic.router.lanes
        for _ in range(10):
            traffic.clients(6, 2.0, rows=(32,))
            assert not any(lanes.slow(lane) for lane in lanes.values())


def test_a_slow_replica_that_became_quick_is_found_out() -> None:
    slow = Replica(0.02, 0.02)
    traffic = Traffic({"quick": Replica(0.001, 0.001), "slow": slow})
    traffic.run(200, 2.0)
    slow.fixed_seconds = slow.row_seconds = 0.001
    before = slow.rows
    answers = traffic.run(200, 20.0)[0]
    assert answers.percentile(99) <= 0.02
    assert slow.rows > before + 500


def test_a_replica_that_is_far_too_slow_is_left_alone_while_the_quick_one_suffices() -> None:
    quick, slow = Replica(0.001, 0.001), Replica(0.3, 0.3)
    traffic = Traffic({"quick": quick, "slow": slow})
    traffic.run(200, 2.0)
    before = slow.rows
    answers = traffic.run(200, 3.0)[0]
    assert slow.rows <= before + 2
    assert answers.percentile(99) <= 0.05


def test_under_overload_low_priorities_are_refused_first_and_keep_a_share() -> None:
    traffic = Traffic({"a": Replica(0.002, 0.0005)}, objective_seconds=0.05)
    found = traffic.run(2 * 1700, 3.0, priorities=(5, 0))
    high, low = found[5], found[0]
    assert high.answered == high.asked
    assert low.answered == low.asked
    assert len(high.seconds) >= 0.8 * high.asked  # seven of eight, and some come in bursts
    assert 0 < len(low.seconds) < 0.5 * low.asked
    assert low.failures["overloaded"] >= 0.5 * low.asked


def test_a_replica_that_stalls_is_hedged_around() -> None:
    def tail(hedged: bool) -> tuple[float, Traffic, Answers]:
        pauses = [(at, at + 0.8) for at in (4.0, 8.0)]
        traffic = Traffic({"steady": Replica(0.002, 0.001), "stalls": Replica(0.002, 0.001, pauses)})
        if not hedged:
            traffic.router.hedge_at = lambda: math.inf  # type: ignore[method-assign]
        answers = traffic.run(300, 12.0)[0]
        return max(answers.seconds), traffic, answers

    longest, traffic, answers = tail(hedged=True)
    assert longest < 0.1
    assert 0 < traffic.hedged <= 0.05 * answers.asked + BURST
    assert tail(hedged=False)[0] > 0.7


def test_hedging_keeps_to_its_budget_when_every_replica_is_slow_at_times() -> None:
    rng = random.Random(3)
    pauses = [(at / 10, at / 10 + 0.05) for at in range(200) if rng.random() < 0.5]
    traffic = Traffic({name: Replica(0.002, 0.001, pauses) for name in "ab"})
    answers = traffic.run(400, 10.0)[0]
    assert traffic.hedged <= 0.05 * answers.asked + BURST
    assert len(answers.seconds) == answers.asked
