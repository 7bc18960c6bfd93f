"""When a batch is asked a second time elsewhere because its answer is slow, and how many requests may be. Pure.

After the 95th percentile of what the deployment's batches took lately, for a twentieth of the requests at most (Dean and Barroso, The
Tail at Scale, 2013): so a replica that stalls costs those who wait for it little, and all replicas that are slow get no more to do.
"""

from __future__ import annotations

from collections import deque
from math import inf

PERCENTILE = 0.95
RECENT = 200
"""Batches that the percentile is of; it is counted anew after each EVERY."""
EVERY = 32
BUDGET = 0.05
"""Requests that may be asked again, for each that is asked."""
BURST = 32.0
"""As many at once when none was for a while: what a replica that stalls has before it, more or less."""
LEAST_SECONDS = 0.005
"""Nothing is asked again sooner: it would gain nobody anything."""


class Hedging:
    """Of one deployment. `after_seconds`: how long a batch is away until it is asked again; never until enough is known."""

    __slots__ = ("_allowance", "_count", "_recent", "after_seconds")

    def __init__(self) -> None:
        self.after_seconds = inf
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._count = 0
        self._allowance = BURST

    def asked(self) -> None:
        """A request came."""
        self._allowance = min(BURST, self._allowance + BUDGET)

    def came_back(self, seconds: float) -> None:
        """A batch was away for so long."""
        self._recent.append(seconds)
        self._count += 1
        if self._count % EVERY == 0:
            ordered = sorted(self._recent)
            self.after_seconds = max(LEAST_SECONDS, ordered[int(PERCENTILE * len(ordered))])

    def spend(self, requests: int) -> int:
        """How many of so many requests may be asked again now."""
        allowed = min(requests, int(self._allowance))
        self._allowance -= allowed
        return allowed
