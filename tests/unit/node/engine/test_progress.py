"""What counts as a process's progress: a slow process is not stuck, one that stands still is."""

from __future__ import annotations

import os

import pytest

from node.engine.progress import Progress, Reading, read


def watched(progress: Progress, seconds: float, cpu_share: float = 0.0, bytes_per_second: float = 0.0) -> float:
    """Seconds until it counts as stuck, checked every second; `seconds` if it never does."""
    for second in range(int(seconds) + 1):
        progress.look(second, Reading(cpu_share * second, int(bytes_per_second * second)))
        if progress.stuck:
            return second
    return seconds


@pytest.mark.parametrize("limit", [2.0, 20.0, 120.0])
def test_a_twentieth_of_a_core_is_enough(limit: float) -> None:
    assert watched(Progress(limit), 1000, cpu_share=0.05) == 1000
    assert watched(Progress(limit), 1000, cpu_share=0.01) == 1000


def test_so_is_a_slow_disk() -> None:
    assert watched(Progress(20.0), 1000, bytes_per_second=100e3) == 1000


def test_what_only_says_that_it_is_there_is_stuck() -> None:
    assert watched(Progress(20.0), 1000, cpu_share=0.0005, bytes_per_second=50) == 21


def test_what_gets_further_now_and_then_is_not() -> None:
    progress = Progress(20.0)
    for second in range(200):
        progress.look(second, further=second % 15 == 0)
        assert not progress.stuck


def test_time_in_which_nobody_looked_counts_for_little() -> None:
    """The whole machine slept: the process got no time either."""
    progress = Progress(20.0)
    progress.look(0.0, Reading())
    progress.look(3600.0, Reading())
    assert not progress.stuck
    for second in range(3601, 3620):
        progress.look(second, Reading())
    assert progress.stuck


def test_a_child_that_ends_takes_its_time_with_it() -> None:
    progress = Progress(20.0)
    progress.look(0.0, Reading(cpu_seconds=50.0))
    progress.look(1.0, Reading(cpu_seconds=5.0))
    assert progress.still_seconds == 1.0
    progress.look(2.0, Reading(cpu_seconds=5.2))
    assert progress.still_seconds == 0.0


def test_a_process_is_read() -> None:
    before = read(os.getpid())
    assert before.cpu_seconds > 0
    sum(range(3_000_000))
    assert read(os.getpid()).cpu_seconds > before.cpu_seconds
    assert read(2**22 + 1) == Reading()
