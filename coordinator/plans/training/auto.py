"""The strategy `auto`: a first round as in `local`, then the strategy that is faster by the measured speeds and links. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from coordinator.plans.decisions import Choose, Decision
from coordinator.plans.events import OfTraining, StrategyChosen
from coordinator.plans.job import Attempt, Training
from coordinator.plans.placement import ClusterView, NodeView
from coordinator.plans.training.costs import Costs, Prediction, bandwidth_of, predict
from coordinator.plans.training.strategy import Running, TrainingStrategy
from coordinator.plans.training.sync import SyncRounds
from potluck.wire.jobs import JobProgress
from potluck.wire.tasks import AnyTask, AnyTaskResult, ExportResult
from potluck.wire.values import BlobRef, ErrorInfo


@dataclass
class AutoStrategy:
    """`local` until enough is measured to choose. The chosen strategy then goes on with the same state."""

    local: TrainingStrategy
    bandwidths: dict[str, float] = field(default_factory=dict)
    """Bytes a second that nodes have fetched with."""

    def plan(self, view: ClusterView, attempts: dict[str, Attempt]) -> list[Decision]:
        if self.local.state.open.number and (found := self.prediction(view)) is not None:
            return [Choose(StrategyChosen(at=view.now, chosen=found.choice, why=found.words(found.choice)))]
        return self.local.plan(view, attempts)

    def leased(self, attempt: Attempt, task: AnyTask) -> None:
        self.local.leased(attempt, task)

    def finished(self, attempt: Attempt, result: AnyTaskResult, at: float) -> None:
        if bandwidth := bandwidth_of(result):
            self.bandwidths[attempt.node_id] = bandwidth
        self.local.finished(attempt, result, at)

    def ended(self, attempt: Attempt, error: ErrorInfo | None) -> None:
        self.local.ended(attempt, error)

    def happened(self, event: OfTraining) -> Training:
        if not isinstance(event, StrategyChosen):
            self.local.happened(event)
            return self
        if event.chosen == "local":
            return replace(self.local, why=event.why)
        return TrainingStrategy(self.local.state, SyncRounds(self.local.state), event.why)

    def progress(self, running: Running, nodes: Sequence[NodeView] = ()) -> JobProgress:
        return self.local.progress(running, nodes)

    def wants(self, attempt: Attempt) -> bool:
        return self.local.wants(attempt)

    def kept(self) -> set[str]:
        return self.local.kept()

    def used_up(self) -> tuple[BlobRef, ...]:
        return self.local.used_up()

    def checkpoint(self) -> BlobRef | None:
        return self.local.checkpoint()

    def exported(self) -> ExportResult | None:
        return self.local.exported()

    def best_epoch(self) -> int:
        return self.local.best_epoch()

    def prediction(self, view: ClusterView) -> Prediction | None:
        """Of the cost model, from what the first round has measured of the nodes that are here; None where that is nothing."""
        state, measured = self.local.state, self.local.state.measured
        nodes = [node for node in view.nodes if node.node_id in measured.rates]
        nodes = [node for node in nodes if node.node_id not in state.sharing.slow]
        if state.exchange.weights is None or not nodes:
            return None
        return predict(
            Costs(
                rates=tuple(measured.rates[node.node_id] for node in nodes),
                weights_bytes=measured.trained_bytes or state.exchange.weights.size,
                data_bytes=sum(shard.blob.size for shard in state.given.dataset.shards),
                samples=max(1, state.epochs.total - state.epochs.samples),
                batch_size=state.given.batch,
                bandwidth=statistics.median(self.bandwidths.values()) if self.bandwidths else None,
                together=all(node.collective for node in nodes),
            )
        )
