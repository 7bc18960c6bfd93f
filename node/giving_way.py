"""When jobs on this node give way to inference, and when they go on. Pure.

A deployment's objective is at risk here when a batch took more than half of it on this node, from its arrival to its outputs: the
other half is for the network and the queue. Then the running job (training, or a model over a data set) stops at its next step or
batch. It goes on when no request came for a moment. A job always gets a share of the time: each pause is owed to it, and when much is
owed, it runs until that is paid back.
"""

from __future__ import annotations

AT_RISK = 0.5
"""The share of its objective that a batch may take on a node."""
QUIET_SECONDS = 1.0
"""A job goes on when no batch with an objective came for this long."""
LONGEST_SECONDS = 60.0
"""The longest pause; after it, a job runs until what it is owed is paid back."""


class GivingWay:
    """`share`: how much of the time of deployments at risk jobs may stand still; in (0, 1]."""

    def __init__(self, share: float) -> None:
        self.paused = False
        self._cost = (1.0 - share) / share
        """Seconds owed to a job for each second that it stood still."""
        self._owed = 0.0
        self._repaying = False
        self._counted_at = 0.0
        self._asked_at = 0.0

    def served(self, objective_seconds: float, seconds: float, now: float) -> None:
        """A batch of a deployment with this objective took `seconds` here, while this node worked on a job."""
        self.passed(now)
        self._asked_at = now
        if seconds > AT_RISK * objective_seconds and not self._repaying:
            self.paused = True

    def passed(self, now: float) -> None:
        """Account for the time that has passed until `now`."""
        elapsed, self._counted_at = max(0.0, now - self._counted_at), now
        if self.paused:
            self._owed += elapsed * self._cost
            if self._owed >= LONGEST_SECONDS * self._cost > 0.0:
                self.paused, self._repaying = False, True
            elif now - self._asked_at >= QUIET_SECONDS:
                self.paused = False
        else:
            self._owed = max(0.0, self._owed - elapsed)
            self._repaying = self._repaying and self._owed > 0.0
