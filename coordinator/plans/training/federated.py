"""Training on data that live on the nodes (`node:name`), in rounds as `local` has them: pure.

Each node trains on its own data, for as long as the others do; so a fast one takes more steps, and the outer step heeds that as
FedNova does (`outer.nova_scales`): what counts is how much data a node holds. With noise, nothing that depends on single items
leaves a node but the noisy updates: metrics of training are left out, and the epsilon that was spent takes their place.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from msgspec.structs import replace as changed

from coordinator.plans.job import Attempt, CloseRound, Decision, Lease, RoundClosed
from coordinator.plans.node_data import fits
from coordinator.plans.placement import ClusterView, NodeView, speeds, split_in_time
from coordinator.plans.training import privacy
from coordinator.plans.training.rounds import EXPLODED, PROBE_SECONDS, RoundsStrategy
from potluck.wire.messages import AnyTaskResult, JobProgress, TrainResult, TrainTask
from potluck.wording import counted

SIZES_KEPT = 5
LATE_SECONDS = 20.0
"""A holder is waited for longer than where others could do its part: a round without it forgets what only that one has."""
GRACE = 1.0
GRACE_LEAST = 20.0
GRACE_SECONDS = 60.0
"""Nobody else has what a node holds, so the first round waits longer for others than where data can go anywhere: as long again as
the first node that is ready took, between so many seconds at least (its engine may have been warm, another's is cold) and at most."""


@dataclass
class FederatedStrategy(RoundsStrategy):
    """`spent`: by node, how often its data were looked at for updates that came here."""

    spent: dict[str, privacy.Spent] = field(default_factory=dict)
    sizes: dict[str, list[float]] = field(default_factory=dict)
    """By node, of its last updates that were of use: the norm for each step."""

    def finished(self, attempt: Attempt, result: AnyTaskResult, at: float) -> None:
        super().finished(attempt, result, at)
        if isinstance(result, TrainResult):
            before = self.spent.get(attempt.node_id, privacy.Spent(result.items))
            self.spent[attempt.node_id] = replace(before, steps=before.steps + result.steps, rounds=before.rounds + 1)

    def _closed_round(self, event: RoundClosed) -> None:
        for node_id in self.contributions.keys() - event.rejected.keys():
            kept = [*self.sizes.get(node_id, ()), _size(self.contributions[node_id])]
            self.sizes[node_id] = kept[-SIZES_KEPT:]
        super()._closed_round(event)

    def progress(
        self, running: dict[str, tuple[Attempt, int, dict[str, float]]], nodes: Sequence[NodeView] = ()
    ) -> JobProgress:
        found = super().progress(running, nodes)
        idle = not running and not self.all_trained and not self.contributions
        message = f"waiting for a node that holds {self.spec.dataset}" if idle else found.message
        strategy = "; ".join(["local, since the data stay on the nodes", *self._worth_of_noise()])
        return changed(found, strategy=strategy, message=message)

    def _worth_of_noise(self) -> list[str]:
        """What whoever asked for it should know of it, as soon as that is known."""
        rules = self.spec.privacy
        if rules is None:
            return []
        if not rules.noise_multiplier:
            return ["without noise nothing is hidden"]
        if self.weights is None or not self.spent:
            return []
        times = privacy.loudness(
            rules, self.spent.values(), (self.trained_bytes or self.weights.size) // 4, self.spec.batch_size
        )
        nodes = counted(len(self.spent), "node")
        what = "gradient" if rules.unit == "example" else "update"
        return [f"the noise in the mean of {nodes} is {times:,.1f} times as long as the longest {what}"]

    def _open_round(self, view: ClusterView) -> list[Decision]:
        free = [node for node in self._holders(view) if node.free_slots]
        free = [node for node in free if node.node_id not in self.quarantined] or free
        if not free:
            return []
        rates = speeds(free, self.measured)
        held = {node.node_id: node.holds(self.dataset.name) for node in free}
        decisions: list[Decision] = []
        for node_id, samples in self._parts(rates)[0].items():
            data = held[node_id]
            assert data is not None
            batch = min(self.spec.batch_size, data.count)
            # One pass over its own data at most: a node with few items would only learn them by heart.
            batches = max(1, round(min(samples, data.count) / batch))
            task = self._on_own(self._task(batches * batch, self._budget(batches * batch, rates[node_id])))
            decisions.append(Lease(self._shard_id, node_id, task))
        return decisions

    def _holders(self, view: ClusterView) -> list[NodeView]:
        return [node for node in view.nodes if fits(node.holds(self.dataset.name), self.dataset.format)]

    @property
    def _room(self) -> int:
        return sys.maxsize  # each has data of its own

    @property
    def _late_seconds(self) -> float:
        return LATE_SECONDS

    def _hopes(self, view: ClusterView, attempts: dict[str, Attempt]) -> bool:
        return self.readiness.hopes(view.now, attempts, GRACE, GRACE_SECONDS, least=GRACE_LEAST)

    def _rehearsals(self, nodes: list[NodeView], rates: dict[str, float]) -> dict[str, TrainTask]:
        task = self._on_own(changed(self._task(self.spec.batch_size, PROBE_SECONDS), weights=None, step=None))
        return {node.node_id: task for node in nodes}

    def _on_own(self, task: TrainTask) -> TrainTask:
        """The task on the data that live on the node which it is given to."""
        return changed(
            task,
            node_data=self.dataset.name,
            privacy=self.spec.privacy,
            overlap=self.spec.overlap and self.spec.privacy is None,
        )

    def _shared(
        self, wanted: int, rates: dict[str, float], delays: dict[str, float]
    ) -> tuple[dict[str, int], dict[str, str]]:
        """Nobody else has a slow node's data, so that it does what it can, and the others wait for as long as that should take."""
        found = split_in_time(wanted, rates, delays)
        return {node_id: found.get(node_id, 0) for node_id in rates}, {}

    def _exploded(self, results: dict[str, TrainResult]) -> dict[str, str]:
        """Each node's data are their own, and so is the size of its updates: one much larger than its last ones has exploded."""
        wrong: dict[str, str] = {}
        for node_id, result in results.items():
            usual = statistics.median(self.sizes.get(node_id, [math.inf]))
            if _size(result) > EXPLODED * usual > 0:
                wrong[node_id] = f"its update was {_size(result) / usual:.0f} times as large as its last ones"
        return wrong if len(wrong) < len(results) else {}

    def _close_round(self) -> CloseRound:
        return replace(super()._close_round(), by_items=True)

    def _epoch_metrics(self) -> dict[str, float]:
        found = super()._epoch_metrics()
        rules = self.spec.privacy
        if rules is not None and rules.noise_multiplier:
            found["epsilon"] = privacy.epsilon(rules, self.spent.values(), self.spec.batch_size)
        return found


def _size(result: TrainResult) -> float:
    """Of an update, for each step that led to it."""
    return result.norm / max(1, result.steps)
