"""Measurements of a training job's nodes and rounds: pure."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from coordinator.plans.job import Attempt
from potluck.wire.tasks import TrainResult, TrainTask

OVERHEADS_KEPT = 5
DELAYS_KEPT = 5
PACES_KEPT = 5
BUDGET_FACTOR = 1.25
BUDGET_SECONDS = 0.5
"""A node that got slower stops so much after the others: this factor of the planned time, and so many seconds."""
LATE_FACTOR = 2.0
"""A part is late when its time besides computing is this many times what it should be."""


@dataclass
class Measurements:
    """`rates`: items/s of each node, as it was last measured."""

    rates: dict[str, float] = field(default_factory=dict)
    delays: dict[str, list[float]] = field(default_factory=dict)
    """Seconds that each node's last parts have taken beside computing: setting weights, quantising, sending."""
    overheads: list[float] = field(default_factory=list)
    """Seconds that the last rounds have cost beside computing: transfers, the outer step, setting weights."""
    paces: list[tuple[int, float]] = field(default_factory=list)
    """Samples of the last rounds, and the seconds that each has taken from the one before."""
    trained_bytes: int = 0
    """Size of the trained weights; 0: not known yet."""

    def rated(self, node_id: str, rate: float) -> None:
        """`rate`: items/s, 0 where it is not known."""
        if rate > 0:
            self.rates[node_id] = rate

    def warmed_up(self, node_id: str, rate: float, delay: float) -> None:
        self.delays[node_id] = [delay]
        self.rated(node_id, rate)

    def trained(self, attempt: Attempt, result: TrainResult, at: float) -> None:
        seconds = result.seconds + result.seconds_ahead
        self.trained_bytes = result.trained_bytes or self.trained_bytes
        kept = [*self.delays.get(attempt.node_id, ()), at - attempt.leased_at - seconds]
        self.delays[attempt.node_id] = kept[-DELAYS_KEPT:]
        self.rated(attempt.node_id, result.samples / seconds if seconds > 0 else 0.0)

    def closed(self, samples: int, seconds: float, overhead: float | None) -> None:
        """`seconds`: from the round before to this one; `overhead`: None where it says nothing of the rounds to come."""
        if overhead is not None:
            self.overheads = [*self.overheads, overhead][-OVERHEADS_KEPT:]
        self.paces = [*self.paces, (samples, seconds)][-PACES_KEPT:]

    @property
    def overhead(self) -> float:
        """Seconds that a round costs besides computing; 0 before there are rounds."""
        return statistics.median(self.overheads) if self.overheads else 0.0

    @property
    def pace(self) -> float:
        """Samples a second that the last rounds have brought, with all that was waited for; 0 before there are any."""
        seconds = sum(seconds for _, seconds in self.paces)
        return sum(samples for samples, _ in self.paces) / seconds if seconds else 0.0

    @property
    def usual_delays(self) -> dict[str, float]:
        """The lower median: what is done once, as reading data that are new to a node, is no reason to give it less."""
        return {node_id: max(0.0, statistics.median_low(kept)) for node_id, kept in self.delays.items()}

    def expected(self, node_id: str, task: TrainTask, late_seconds: float) -> float:
        """Seconds after which a part is late: `late_seconds` after it should be here, at least."""
        seconds = task.seconds or budget(task.samples, self.rates.get(node_id, 1.0))
        return seconds + max(late_seconds, LATE_FACTOR * max(self.delays.get(node_id, [0.0])))


def budget(samples: int, rate: float) -> float:
    """Seconds that a node with this rate may compute for so many samples."""
    return samples / rate * BUDGET_FACTOR + BUDGET_SECONDS
