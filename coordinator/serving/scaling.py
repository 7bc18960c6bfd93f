"""Scaling: how many replicas a deployment should have, from how long requests wait. Pure; time is an argument.

Replicas are added when the queue takes longer than the target for some seconds on end. One is removed when one less would be
enough for much longer than that. The rest must be enough with ease, or the queue would grow and a replica would be added again.
So a constant load ends at a constant number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

UP_SECONDS = 2.0
DOWN_SECONDS = 60.0
EASE = 0.6
"""One less is enough if the remaining replicas would be busy for at most this share of the time."""
QUEUE_SMOOTHING_SECONDS = 1.0
BUSY_SMOOTHING_SECONDS = 10.0


@dataclass(frozen=True)
class Seen:
    """A deployment's load now. `queue_seconds`: how long a new request would queue; `busy`: share of its replicas at work."""

    replicas: int
    queue_seconds: float
    busy: float


@dataclass
class Scaler:
    """For one deployment. Its memory is lost when the coordinator ends; it then takes some seconds to learn again."""

    queue_seconds: float = 0.0
    busy: float = 1.0
    seen_at: float | None = None
    above_since: float | None = None
    below_since: float | None = None

    def wanted(self, seen: Seen, least: int, most: int, target_seconds: float, now: float) -> int:
        """How many replicas to have, while `seen.replicas` (at least one) are ready and none is being loaded."""
        self._smooth(seen, now)
        bounded = min(max(seen.replicas, least), most)
        if bounded != seen.replicas:
            return bounded
        fewer = seen.replicas - 1
        above = self.queue_seconds > target_seconds
        below = (
            not above
            and fewer >= least
            and self.queue_seconds <= target_seconds / 2
            and self.busy * seen.replicas <= EASE * fewer
        )
        self.above_since = (now if self.above_since is None else self.above_since) if above else None
        self.below_since = (now if self.below_since is None else self.below_since) if below else None
        if self.above_since is not None and now - self.above_since >= UP_SECONDS:
            self.above_since = None
            # If the queue is far too long, many are added, but at most as many as there are already.
            more = seen.replicas if self.queue_seconds > 2 * target_seconds else 1
            return min(most, seen.replicas + more)
        if self.below_since is not None and now - self.below_since >= DOWN_SECONDS:
            self.below_since = None
            return fewer
        return seen.replicas

    def _smooth(self, seen: Seen, now: float) -> None:
        passed = now - self.seen_at if self.seen_at is not None else 0.0
        self.seen_at = now
        self.queue_seconds += (seen.queue_seconds - self.queue_seconds) * (
            1 - math.exp(-passed / QUEUE_SMOOTHING_SECONDS)
        )
        self.busy += (seen.busy - self.busy) * (1 - math.exp(-passed / BUSY_SMOOTHING_SECONDS))
