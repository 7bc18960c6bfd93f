"""How often a model took its engine with it, of late. Pure; time is an argument."""

from __future__ import annotations

from dataclasses import dataclass, field

CRASHES_LIMIT = 3
CRASHES_SECONDS = 3600.0
"""What happened before that counts no more: a model that crashes once a day is served."""


@dataclass
class Crashes:
    """Of one model, on a node or on all of them."""

    at: list[float] = field(default_factory=list)
    reason: str = ""
    """Of the last one."""

    def add(self, now: float, reason: str) -> None:
        self.at = [*self._recent(now), now]
        self.reason = reason

    def count(self, now: float) -> int:
        return len(self._recent(now))

    def too_many(self, now: float) -> bool:
        """Whether it is not to be loaded now."""
        return self.count(now) >= CRASHES_LIMIT

    @property
    def summary(self) -> str:
        """For people, when there were too many."""
        return f"its engine died of it {CRASHES_LIMIT} times within an hour, so it is not loaded for as long; the last time: {self.reason}"

    def _recent(self, now: float) -> list[float]:
        return [at for at in self.at if now - at < CRASHES_SECONDS]
