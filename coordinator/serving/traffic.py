"""Traffic: which version answers to a model's plain name, and whether a new one does worse. Pure.

The **stable** version answers. A **canary** gets a share of the questions, a **shadow** a copy of each whose answer nobody sees, and
the **previous** version, which the stable one replaced, is kept for a while to go back to. The canary's questions are picked by a
sequence of low discrepancy (multiples of the golden ratio): of any hundred it gets its share, and no period of the clients' meets it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from coordinator.serving.windows import Summary

GOLDEN = 0.6180339887498949
ANSWERS_LEAST = 20
"""Fewer of a version say nothing about it."""
FAILURES_LEAST = 5
SLOW_LEAST = 3
"""So many answers later than is allowed, lest one hiccup ends a rollout."""
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


def worse(candidate: Summary, baseline: Summary, factor: float) -> str:
    """Why the candidate is worse than the baseline by more than `factor`; "" when it is not, or cannot be told yet."""
    if not factor or candidate.count < ANSWERS_LEAST:
        return ""
    allowed = factor * max(baseline.failure_rate, FAILURE_RATE_FLOOR)
    if candidate.failures >= FAILURES_LEAST and candidate.failure_rate > allowed:
        return f"{candidate.failure_rate:.1%} of its answers failed, and {baseline.failure_rate:.1%} of the stable version's"
    if baseline.count < ANSWERS_LEAST:
        return ""
    limit = factor * max(baseline.quantile(0.99), P99_FLOOR_SECONDS)
    slow = candidate.slower_than(limit)
    if slow >= SLOW_LEAST and slow > 0.01 * (candidate.count - candidate.failures):
        return (
            f"its p99 is {1000 * candidate.quantile(0.99):.0f} ms, "
            f"and the stable version's {1000 * baseline.quantile(0.99):.0f} ms"
        )
    return ""
