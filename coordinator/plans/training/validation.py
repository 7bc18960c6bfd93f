"""Validation at the end of each epoch, and a look at its data before the first: pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from coordinator.plans.batch import BatchStrategy, merge
from coordinator.plans.decisions import Complete, Decision, Lease
from coordinator.plans.job import CHECK, VALIDATION, Attempt
from coordinator.plans.node_data import NodesEvaluation
from coordinator.plans.placement import ClusterView
from coordinator.plans.training.scores import evaluation_metrics
from potluck.wire.tasks import EvaluateResult
from potluck.wire.values import BlobRef, Step

Evaluation = BatchStrategy | NodesEvaluation
Evaluate = Callable[[BlobRef | None, Step | None, int], Evaluation]
"""Makes an evaluation from (weights, another way to get these, number of the epoch)."""


@dataclass
class Validation:
    """`make` is None where no data are held out."""

    make: Evaluate | None = field(repr=False, default=None)
    under_way: Evaluation | None = None
    """The evaluation that has begun. It is finished even if users ask for something new meanwhile."""
    checked: bool = False
    """Whether some node has or had a first batch of the data."""

    def check(self, node_id: str) -> list[Decision]:
        """A first batch for this node, before anything else: a mistake in the data should show now, and not only after an epoch."""
        evaluation = self.make(None, None, 0) if self.make is not None and not self.checked else None
        return [Lease(CHECK, node_id, evaluation.first())] if isinstance(evaluation, BatchStrategy) else []

    def of(self, attempt: Attempt, weights: BlobRef | None, step: Step | None, epoch: int) -> Evaluation | None:
        """The evaluation that an attempt is a part of. The first attempt begins it."""
        if self.under_way is None and self.make is not None and attempt.shard_id.startswith(VALIDATION):
            self.under_way = self.make(weights, step, epoch)
        mine = self.under_way is not None and attempt.shard_id.startswith(self.under_way.prefix + "-")
        return self.under_way if mine else None

    def plan(
        self,
        view: ClusterView,
        able: ClusterView,
        attempts: dict[str, Attempt],
        weights: BlobRef | None,
        step: Step | None,
        epoch: int,
    ) -> tuple[list[Decision], dict[str, float] | None]:
        """What to do, and the metrics once all is done. `able`: the nodes that would begin at once."""
        if self.make is None:
            return [], {}
        evaluation = self.under_way or self.make(weights, step, epoch)
        takers = able if isinstance(evaluation, BatchStrategy) and able.nodes else view
        decisions = evaluation.plan(takers, attempts)
        if Complete() not in decisions:
            return decisions, None
        decisions.remove(Complete())
        parts = [part for part in evaluation.in_order() if isinstance(part, EvaluateResult)]
        return decisions, {f"val_{name}": value for name, value in evaluation_metrics(merge(parts)).items()}

    def epoch_ended(self) -> None:
        self.under_way = None
