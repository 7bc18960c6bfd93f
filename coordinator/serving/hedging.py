"""When a slow batch is asked again at another replica, and how many requests may be asked twice. Pure.

A batch is asked again after the 95th percentile of the times that recent batches took. At most a twentieth of the requests are
asked twice (Dean and Barroso, The Tail at Scale, 2013). So a replica that stalls delays few requests, and when all replicas are
slow they get hardly more work.
"""

from __future__ import annotations

from collections import deque
from math import inf

PERCENTILE = 0.95
RECENT = 200
"""How many batches the percentile is taken over. It is computed again after every EVERY batches."""
EVERY = 32
BUDGET = 0.05
"""How many requests may be asked again, for each request that comes."""
BURST = 32.0
"""How many may be asked again at once after a quiet time: about as many as wait at a replica that stalls."""
LEAST_SECONDS = 0.005
"""No batch is asked again sooner: it would gain nothing."""


class Hedging:
    """For one deployment. `after_seconds`: how long a batch is away before it is asked again; infinity until enough is known."""

    __slots__ = ("_allowance", "_count", "_recent", "after_seconds")

    def __init__(self) -> None:
        self.after_seconds = inf
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._count = 0
        self._allowance = BURST

    def asked(self) -> None:
        """Note that a request came."""
        self._allowance = min(BURST, self._allowance + BUDGET)

    def came_back(self, seconds: float) -> None:
        """Note how long a batch was away."""
        self._recent.append(seconds)
        self._count += 1
        if self._count % EVERY == 0:
            ordered = sorted(self._recent)
            self.after_seconds = max(LEAST_SECONDS, ordered[int(PERCENTILE * len(ordered))])

    def spend(self, requests: int) -> int:
        """How many of these `requests` may be asked again now."""
        allowed = min(requests, int(self._allowance))
        self._allowance -= allowed
        return allowed
