"""Counts how often a model's engine died because of it in the last hour. Pure; time is an argument."""

from __future__ import annotations

from dataclasses import dataclass, field

CRASHES_LIMIT = 3
CRASHES_SECONDS = 3600.0
"""Older crashes do not count: a model that crashes once a day is still served."""


@dataclass
class Crashes:
    """The crashes of one model, on one node or on all nodes."""

    at: list[float] = field(default_factory=list)
    reason: str = ""
    """The reason of the last crash."""

    def add(self, now: float, reason: str) -> None:
        self.at = [*self._recent(now), now]
        self.reason = reason

    def count(self, now: float) -> int:
        return len(self._recent(now))

    def too_many(self, now: float) -> bool:
        """Whether the model must not be loaded now."""
        return self.count(now) >= CRASHES_LIMIT

    @property
    def summary(self) -> str:
        """The reason for people, when there were too many crashes."""
        return f"the model made its engine die {CRASHES_LIMIT} times within an hour, so it is not loaded for an hour; the last time: {self.reason}"

    def _recent(self, now: float) -> list[float]:
        return [at for at in self.at if now - at < CRASHES_SECONDS]
