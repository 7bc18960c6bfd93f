"""What is measured of nodes and rounds, and what follows from it."""

from __future__ import annotations

import pytest

from coordinator.plans.job import Attempt
from coordinator.plans.training.measurements import DELAYS_KEPT, Measurements, budget
from potluck.wire.tasks import TrainResult, TrainTask
from potluck.wire.values import BlobRef, DataFormat

BLOB = BlobRef(sha256="0" * 64, size=1)


def trained(found: Measurements, at: float, samples: int = 100, **parts: float) -> None:
    """A part that was leased at 0."""
    result = TrainResult(base=BLOB, update=BLOB, samples=samples, steps=1, norm=1.0, **{"seconds": 1.0, **parts})  # type: ignore[arg-type]
    found.trained(Attempt("1", "round-0", "a", 0.0), result, at)


def task(samples: int, seconds: float) -> TrainTask:
    return TrainTask(
        model=BLOB, weights=None, data=(), format=DataFormat(kind="arrays"), image=None, round=0, samples=samples,
        seconds=seconds, batch_size=10,
    )  # fmt: skip


def test_a_part_tells_a_nodes_speed_and_what_it_takes_beside() -> None:
    found = Measurements()
    trained(found, 3.0, seconds=1.5, seconds_ahead=0.5)
    assert (found.rates, found.delays) == ({"a": 50.0}, {"a": [1.0]})
    trained(found, 3.0, seconds=0.0)
    assert found.rates == {"a": 50.0}, "in no time nothing can be measured"
    found.rated("a", 0.0)
    assert found.rates == {"a": 50.0}
    found.warmed_up("a", 20.0, 0.3)
    assert (found.rates, found.delays) == ({"a": 20.0}, {"a": [0.3]})


def test_only_what_was_measured_last_counts_and_what_is_done_once_does_not() -> None:
    found = Measurements()
    for at in (60.0, 2.0, 2.0, 60.0):
        trained(found, at)
    assert found.usual_delays == {"a": 1.0}, "the lower one in the middle"
    for _ in range(2 * DELAYS_KEPT):
        trained(found, 0.5)
    assert found.delays == {"a": [-0.5] * DELAYS_KEPT}
    assert found.usual_delays == {"a": 0.0}


def test_a_round_tells_its_pace_and_its_overhead_unless_it_formed_a_group() -> None:
    found = Measurements()
    assert (found.pace, found.overhead) == (0.0, 0.0)
    found.closed(100, 2.0, None)
    assert (found.pace, found.overhead) == (50.0, 0.0)
    for overhead in (1.0, 9.0, 2.0):
        found.closed(100, 4.0, overhead)
    assert (found.pace, found.overhead) == (pytest.approx(400 / 14), 2.0)


def test_a_part_is_late_after_its_time_and_what_its_node_needs_beside() -> None:
    found = Measurements()
    assert found.expected("a", task(100, 4.0), 5.0) == 9.0
    trained(found, 11.0)
    assert found.expected("a", task(100, 4.0), 5.0) == 24.0, "twice as long beside computing as it took"
    assert found.expected("a", task(100, 0.0), 5.0) == budget(100, 100.0) + 20.0
