"""Traffic: which version answers to a model's plain name, and whether a new one does worse. Pure.

The **stable** version answers. A **canary** gets a share of the questions, a **shadow** a copy of each whose answer nobody sees, and
the **previous** version, which the stable one replaced, is kept for a while to go back to. The canary's questions are picked by a
sequence of low discrepancy (multiples of the golden ratio): of any hundred it gets its share, and no period of the clients' meets it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from coordinator.serving.windows import Summary, total

GOLDEN = 0.6180339887498949
ANSWERS_LEAST = 20
"""Fewer of a version say nothing about it."""
FAILURES_LEAST = 5
P99_ANSWERS_LEAST = 100
SLOW_SLOTS_LEAST = 2
"""In so many slots answers must be late: a machine's hiccup delays all who wait, but once."""
SIGMAS = 3.0
"""As the stable version is later than its p99 once in a hundred times, so often may another be by chance: the mean and so many deviations."""
FAILURE_RATE_FLOOR = 0.005
P99_FLOOR_SECONDS = 0.02
"""Below these nothing is called worse: twice next to nothing is still next to nothing."""

Role = Literal["", "stable", "canary", "shadow", "previous"]


@dataclass
class Traffic:
    """Of one model; versions as deployments' names, "" where there is none."""

    model: str
    stable: str = ""
    canary: str = ""
    weight: int = 0
    """Percent of the questions that the canary gets."""
    shadow: str = ""
    previous: str = ""
    chosen: bool = False
    """Whether `stable` was made so; else it is the newest version there is."""
    _point: float = field(default=0.0, repr=False)

    def pick(self, ready: Callable[[str], bool]) -> str:
        """Whose turn it is. Versions with nothing that is `ready` get no share, and the previous one stands in for the stable."""
        if self.canary:
            self._point = (self._point + GOLDEN) % 1.0
            if self._point < self.weight / 100 and ready(self.canary):
                return self.canary
        if self.previous and not ready(self.stable) and ready(self.previous):
            return self.previous
        return self.stable

    def role(self, name: str) -> Role:
        """Of a deployment, by its name."""
        roles: dict[str, Role] = {self.previous: "previous", self.shadow: "shadow", self.canary: "canary"}
        return "stable" if name == self.stable else roles.get(name, "")

    def share(self, name: str) -> int:
        """Percent of the questions that it answers."""
        if name == self.canary:
            return self.weight
        return 100 - (self.weight if self.canary else 0) if name == self.stable else 0

    def beside(self, name: str) -> str:
        """The version that this one is to replace, or has replaced."""
        return self.previous if name == self.stable else self.stable

    def without(self, name: str) -> None:
        """It is gone. Where that was the stable version and there is none before it, nothing of what was chosen holds."""
        if self.stable == name:
            self.stable, self.previous = self.previous, ""
            if not self.stable:
                self.chosen, self.canary, self.weight, self.shadow = False, "", 0, ""
        if self.canary == name:
            self.canary, self.weight = "", 0
        if self.shadow == name:
            self.shadow = ""
        if self.previous == name:
            self.previous = ""

    def check_invariants(self) -> None:
        """A version has one role, and only a canary has a weight."""
        names = [name for name in (self.stable, self.canary, self.shadow, self.previous) if name]
        assert len(names) == len(set(names))
        assert 0 <= self.weight <= 100
        assert self.canary or not self.weight


def worse(candidate: Sequence[Summary], baseline: Summary, factor: float) -> str:
    """Why the candidate, whose answers are given by slot, is worse than the baseline by more than `factor`.

    "" when it is not, or that cannot be told yet.
    """
    seen = total(candidate)
    if not factor or seen.count < ANSWERS_LEAST:
        return ""
    allowed = factor * max(baseline.failure_rate, FAILURE_RATE_FLOOR)
    if seen.failures >= FAILURES_LEAST and seen.failure_rate > allowed:
        return f"{seen.failure_rate:.1%} of its answers failed, and {baseline.failure_rate:.1%} of the stable version's"
    if min(seen.good, baseline.good) < P99_ANSWERS_LEAST:
        return ""
    limit = factor * max(baseline.quantile(0.99), P99_FLOOR_SECONDS)
    late = [slot for slot in candidate if slot.slower_than(limit) > 0.01 * slot.good]
    by_chance = 0.01 * seen.good + SIGMAS * math.sqrt(0.01 * seen.good)
    if len(late) >= SLOW_SLOTS_LEAST and seen.slower_than(limit) > by_chance:
        return (
            f"its p99 is {1000 * seen.quantile(0.99):.0f} ms, "
            f"and the stable version's {1000 * baseline.quantile(0.99):.0f} ms"
        )
    return ""
