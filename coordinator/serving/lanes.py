"""A ready replica as its router sees it: what is on its way there, and how long that takes. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from coordinator.serving.queueing import Request
from coordinator.serving.timing import TimeModel

BATCHES_IN_FLIGHT = 2
"""A replica has one batch to compute and one to begin with at once."""
PATIENCE = 4
"""A batch is lost when it takes so many times what its replica needs for all it has; at most so many times the usual limit."""


@dataclass(eq=False, slots=True)
class Batch:
    batch_id: str
    replica_id: str
    node_id: str
    requests: list[Request]
    rows: int
    sent_at: float
    out: bool = True
    """Whether it is on its way, and waited for."""
    twin: Batch | None = None
    """The same requests, or some of them, at another replica."""

    @property
    def wanted(self) -> bool:
        """Whether anybody waits for its answer."""
        return not all(request.answered for request in self.requests)


@dataclass(eq=False, slots=True)
class Lane:
    replica_id: str
    node_id: str
    time: TimeModel = field(default_factory=TimeModel)
    limit: int = 1
    """Rows of a batch here."""
    rows_per_second: float = 0.0
    """What it does when it has always such a batch; 0 while nothing is known, or nothing comes back."""
    batches: dict[str, Batch] = field(default_factory=dict)
    overdue: dict[str, Batch] = field(default_factory=dict)
    """Batches that are asked again elsewhere, but may still come back."""
    rows: int = 0
    """On their way, overdue ones apart."""
    finished_at: float = 0.0
    open_at: int = -1
    """Where it is in the router's list of lanes with room; -1: it has none."""
    silent: bool = False
    """A batch was lost here, and nothing was heard since."""
    rests_until: float = 0.0

    @property
    def full(self) -> bool:
        return len(self.batches) >= BATCHES_IN_FLIGHT

    def busy_seconds(self, now: float) -> float:
        """Expected until all that is on its way is done. Where that is late, as much more as it is late already."""
        if not self.batches:
            return 0.0
        first = next(iter(self.batches.values()))
        begun_at = max(first.sent_at, self.finished_at)
        left = abs(self.time.seconds(first.rows) - (now - begun_at))
        rest = len(self.batches) - 1
        return left + rest * self.time.fixed_seconds + (self.rows - first.rows) * self.time.row_seconds

    def wait(self, now: float) -> tuple[bool, float]:
        """Expected until one more row is answered; those from which nothing is heard come last."""
        return self.silent, self.busy_seconds(now) + self.time.seconds(1)

    def patience_seconds(self, usual: float) -> float:
        """How long a batch may be away."""
        needed = len(self.batches) * self.time.fixed_seconds + self.rows * self.time.row_seconds
        return min(max(usual, PATIENCE * needed), PATIENCE * usual) if self.time.known else usual

    def sent(self, batch: Batch) -> None:
        self.batches[batch.batch_id] = batch
        self.rows += batch.rows

    def came_back(self, batch_id: str) -> Batch | None:
        """The batch, which is on its way no more; None when it was not."""
        batch = self.batches.pop(batch_id, None)
        if batch is not None:
            self.rows -= batch.rows
            batch.out = False
        return batch

    def learn(self, batch: Batch, now: float, engine_seconds: float) -> None:
        """What a batch that came back took. It began when the one before it was done, and took the engine's time at least."""
        alone = batch.sent_at >= self.finished_at
        seconds = max(engine_seconds, now - max(batch.sent_at, self.finished_at))
        self.time.learn(batch.rows, seconds, alone=alone)
