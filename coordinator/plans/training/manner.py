"""What differs between the kinds of training in which nodes send updates: pure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from coordinator.plans.decisions import Decision
from coordinator.plans.job import Attempt
from coordinator.plans.placement import ClusterView, NodeView
from coordinator.plans.training import warming
from coordinator.plans.training.state import TrainingState
from potluck.wire.jobs import JobProgress
from potluck.wire.tasks import TrainResult


@dataclass
class Manner(warming.Takers, ABC):
    """Decides which node does what in a round, when a part is late, and why an update is rejected.

    Most manners have all that stands here. Each one overrides what it does otherwise.
    """

    state: TrainingState = field(repr=False)
    late_seconds: ClassVar[float] = 5.0
    """How many seconds, at least, a part may take longer than it should."""
    by_items: ClassVar[bool] = False
    """Whether a result stands for the data that live on its node, and not for the samples that it has seen."""

    @abstractmethod
    def parts(self, view: ClusterView, attempts: dict[str, Attempt], in_time: list[Attempt]) -> list[Decision]:
        """The leases of a round that is not over. `in_time`: parts that are under way and not late."""

    def holders(self, view: ClusterView) -> list[NodeView]:
        return list(view.nodes)

    @property
    def room(self) -> int:
        return self.state.given.room

    def finished(self, attempt: Attempt, result: TrainResult) -> None:
        """A part is done, of this round or of one that went on without it."""

    def too_far(self, results: Mapping[str, TrainResult]) -> dict[str, str]:
        """The updates that are of no use, and why."""
        return self.state.trust.too_far(results)

    def closed(self, results: Mapping[str, TrainResult], rejected: Mapping[str, str]) -> None:
        """The open round was closed with these results, but for those that were rejected."""

    def metrics(self) -> dict[str, float]:
        """The metrics of training in the present epoch."""
        return self.state.epochs.metrics()

    def told(self, progress: JobProgress, *, idle: bool) -> JobProgress:
        """The progress, with what only this manner knows. `idle`: nothing runs, and no part is here."""
        return progress
