"""The strategy `auto`: a first round as `local` has it, and then what the measured speeds and links say is faster. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from msgspec.structs import replace

from coordinator.plans.job import Attempt, Choose, Decision, OfTraining, StrategyChosen, Training
from coordinator.plans.placement import ClusterView, NodeView
from coordinator.plans.training.costs import Costs, Prediction, bandwidth_of, predict
from coordinator.plans.training.rounds import RoundsStrategy
from coordinator.plans.training.sync import SyncStrategy
from potluck.wire.messages import AnyTaskResult, JobProgress


@dataclass
class AutoStrategy(RoundsStrategy):
    """`chosen` is empty while too little is measured. When it is `sync`, a `SyncStrategy` takes over what is known until then."""

    chosen: str = ""
    why: str = ""
    bandwidths: dict[str, float] = field(default_factory=dict)
    """Bytes a second that nodes have fetched with."""

    def finished(self, attempt: Attempt, result: AnyTaskResult, at: float) -> None:
        if bandwidth := bandwidth_of(result):
            self.bandwidths[attempt.node_id] = bandwidth
        super().finished(attempt, result, at)

    def happened(self, event: OfTraining) -> Training:
        if not isinstance(event, StrategyChosen):
            return super().happened(event)
        self.chosen, self.why = event.chosen, event.why
        if event.chosen == "local":
            return self
        known = {one.name: getattr(self, one.name) for one in fields(RoundsStrategy)}
        return SyncStrategy(**known, why=event.why)

    def plan(self, view: ClusterView, attempts: dict[str, Attempt]) -> list[Decision]:
        if not self.chosen and self.round and (found := self.prediction(view)) is not None:
            return [Choose(StrategyChosen(at=view.now, chosen=found.choice, why=found.words(found.choice)))]
        return super().plan(view, attempts)

    def progress(
        self, running: dict[str, tuple[Attempt, int, dict[str, float]]], nodes: Sequence[NodeView] = ()
    ) -> JobProgress:
        return replace(super().progress(running, nodes), strategy=self.why)

    def prediction(self, view: ClusterView) -> Prediction | None:
        """Of the cost model, from what the first round has measured of the nodes that are here; None where that is nothing."""
        nodes = [node for node in view.nodes if node.node_id in self.measured and node.node_id not in self.slow]
        if self.weights is None or not nodes:
            return None
        return predict(
            Costs(
                rates=tuple(self.measured[node.node_id] for node in nodes),
                weights_bytes=self.trained_bytes or self.weights.size,
                data_bytes=sum(shard.blob.size for shard in self.dataset.shards),
                samples=max(1, self.total - self.samples),
                batch_size=min(self.spec.batch_size, self.dataset.count),
                bandwidth=statistics.median(self.bandwidths.values()) if self.bandwidths else None,
                together=all(node.collective for node in nodes),
            )
        )
