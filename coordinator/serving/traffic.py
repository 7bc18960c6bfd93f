"""Traffic: which version answers for a model's plain name, and whether a new version does worse. Pure.

The **stable** version answers. A **canary** answers a share of the requests. A **shadow** gets a copy of each request, and nobody
sees its answers. The **previous** version, which the stable one replaced, is kept for a while so that one can go back to it. The
requests of the canary are picked by a sequence of low discrepancy (multiples of the golden ratio): it gets its share of any
hundred requests, whatever pattern the clients follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from coordinator.serving.windows import Summary, total

GOLDEN = 0.6180339887498949
ANSWERS_LEAST = 20
"""Fewer answers of a version say nothing about it."""
FAILURES_LEAST = 5
P99_ANSWERS_LEAST = 100
SLOW_SLOTS_LEAST = 2
"""Answers must be late in this many slots: a short pause of a machine delays all that wait, but only once."""
SIGMAS = 3.0
"""One answer in a hundred may be later than the p99 by chance. A version is slow beyond the mean and this many deviations."""
FAILURE_RATE_FLOOR = 0.005
P99_FLOOR_SECONDS = 0.02
"""Below these values no version is called worse: twice a very small value is still very small."""

Role = Literal["", "stable", "canary", "shadow", "previous"]


@dataclass
class Traffic:
    """Of one model. Versions are given as names of deployments; "": there is none."""

    model: str
    stable: str = ""
    canary: str = ""
    weight: int = 0
    """Percent of the requests that the canary gets."""
    shadow: str = ""
    previous: str = ""
    chosen: bool = False
    """Whether a user chose `stable`; if not, it is the newest version."""
    _point: float = field(default=0.0, repr=False)

    def pick(self, ready: Callable[[str], bool]) -> str:
        """The version for the next request. One that is not `ready` gets no share; the previous one may replace the stable."""
        if self.canary:
            self._point = (self._point + GOLDEN) % 1.0
            if self._point < self.weight / 100 and ready(self.canary):
                return self.canary
        if self.previous and not ready(self.stable) and ready(self.previous):
            return self.previous
        return self.stable

    def role(self, name: str) -> Role:
        """The role of a deployment, by its name."""
        roles: dict[str, Role] = {self.previous: "previous", self.shadow: "shadow", self.canary: "canary"}
        return "stable" if name == self.stable else roles.get(name, "")

    def share(self, name: str) -> int:
        """Percent of the requests that it answers."""
        if name == self.canary:
            return self.weight
        return 100 - (self.weight if self.canary else 0) if name == self.stable else 0

    def beside(self, name: str) -> str:
        """The version that this one is to replace, or has replaced."""
        return self.previous if name == self.stable else self.stable

    def without(self, name: str) -> None:
        """Forget a version that is gone. If it was the stable one and there is no previous one, all choices are forgotten."""
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
    """Why the candidate is worse than the baseline by more than `factor`. The candidate's answers are given by slot.

    "" when it is not worse, or when that is not known yet.
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
