"""How well a deployment did lately: answers, failures and latencies of the last minutes, in slots of some seconds. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from potluck.errors import (
    CodeNotAllowed,
    EngineFailed,
    InvalidModel,
    ModelCrashed,
    ModelFailed,
    OutOfMemory,
    PotluckError,
    TimedOut,
    Unavailable,
)

WINDOW_SECONDS = 120.0
SLOT_SECONDS = 5.0
BOUNDS_SECONDS = tuple(1e-4 * 1.2**step for step in range(74))
"""Latencies from 0.1 ms to a minute are known with an error of at most a fifth."""
IMPATIENT_SECONDS = 1.0
"""A request with less time than this may get no answer. That says nothing about the version."""
FAILURES = frozenset(
    error.code
    for error in (
        CodeNotAllowed,
        EngineFailed,
        InvalidModel,
        ModelCrashed,
        ModelFailed,
        OutOfMemory,
        PotluckError,
        TimedOut,
        Unavailable,
    )
)
"""Error codes that count against the deployment. Other errors are the client's fault or nobody's, and are not counted."""


@dataclass
class Summary:
    """Answers of a span of time. `latencies` counts good answers by the first of BOUNDS_SECONDS that is not less."""

    count: int = 0
    failures: int = 0
    latencies: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_SECONDS) + 1))

    @property
    def failure_rate(self) -> float:
        return self.failures / self.count if self.count else 0.0

    @property
    def good(self) -> int:
        return sum(self.latencies)

    def quantile(self, share: float) -> float:
        """Within how many seconds this share of the good answers came; 0 when there were none."""
        good = self.good
        seen = 0
        for index, count in enumerate(self.latencies):
            seen += count
            if count and seen >= share * good:
                return BOUNDS_SECONDS[min(index, len(BOUNDS_SECONDS) - 1)]
        return 0.0

    def slower_than(self, seconds: float) -> int:
        """How many good answers certainly took longer than `seconds`."""
        return sum(self.latencies[bisect_left(BOUNDS_SECONDS, seconds) + 1 :])


@dataclass
class _Slot:
    number: int
    answers: Summary = field(default_factory=Summary)


@dataclass
class Window:
    """The answers of the last WINDOW_SECONDS; time does not go back."""

    _slots: deque[_Slot] = field(default_factory=deque)

    def answered(self, now: float, seconds: float, failure: str) -> None:
        """An answer `seconds` after its question came; `failure` is its error code, "" for a good one."""
        if failure and failure not in FAILURES:
            return
        if failure == TimedOut.code and seconds < IMPATIENT_SECONDS:
            return
        number = int(now // SLOT_SECONDS)
        if not self._slots or self._slots[-1].number < number:
            self._slots.append(_Slot(number))
            self._forget(now)
        answers = self._slots[-1].answers
        answers.count += 1
        if not failure:
            answers.latencies[bisect_left(BOUNDS_SECONDS, seconds)] += 1
        else:
            answers.failures += 1

    def summary(self, now: float) -> Summary:
        return total(self.slots(now))

    def slots(self, now: float) -> list[Summary]:
        """A summary for each slot of SLOT_SECONDS that had answers."""
        self._forget(now)
        return [slot.answers for slot in self._slots]

    def _forget(self, now: float) -> None:
        first = int((now - WINDOW_SECONDS) // SLOT_SECONDS)
        while self._slots and self._slots[0].number <= first:
            self._slots.popleft()


def total(parts: Iterable[Summary]) -> Summary:
    found = Summary()
    for part in parts:
        found.count += part.count
        found.failures += part.failures
        found.latencies = [one + other for one, other in zip(found.latencies, part.latencies, strict=True)]
    return found
