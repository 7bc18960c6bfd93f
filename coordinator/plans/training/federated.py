"""Training on data that live on the nodes (`node:name`), in rounds: pure.

All nodes train for the same time, each on its own data. A fast node takes more steps, but its update must not count more for that.
So the outer step weighs updates by how much data a node holds, and evens out the steps (`outer.nova_scales`, as in FedNova).
With noise, nothing that depends on single items leaves a node, except the noisy updates. So there are no metrics of training; in
their place stands the epsilon that was spent.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from msgspec.structs import replace as changed

from coordinator.plans.decisions import Decision, Lease
from coordinator.plans.job import Attempt
from coordinator.plans.node_data import fits
from coordinator.plans.placement import ClusterView, NodeView, speeds, split_in_time
from coordinator.plans.training import privacy, sizes, warming
from coordinator.plans.training.manner import Manner
from coordinator.plans.training.measurements import budget
from coordinator.plans.training.trust import EXPLODED
from potluck.wire.jobs import JobProgress
from potluck.wire.tasks import TrainResult, TrainTask
from potluck.wording import counted

SIZES_KEPT = 5
LATE_SECONDS = 20.0
"""A late node is waited for longer than in `local`: nobody else has its data, so a round without it learns nothing from them."""
GRACE = 1.0
GRACE_LEAST = 20.0
GRACE_SECONDS = 60.0
"""The first round waits longer for nodes than in `local`, because nobody else has their data. Once a first node is ready, it waits for
GRACE times what that node took to get ready; but for GRACE_LEAST at least (that node's engine may have run already, while another's
must start), and for GRACE_SECONDS at most."""


@dataclass
class Federated(Manner):
    """`spent`: how much each node has trained on its data for the updates that came here."""

    spent: dict[str, privacy.Spent] = field(default_factory=dict)
    sizes: dict[str, list[float]] = field(default_factory=dict)
    """Of each node's last updates that were used: the norm divided by the steps."""
    late_seconds: ClassVar[float] = LATE_SECONDS
    by_items: ClassVar[bool] = True

    def holders(self, view: ClusterView) -> list[NodeView]:
        data = self.state.given.dataset
        return [node for node in view.nodes if fits(node.holds(data.name), data.format)]

    @property
    def room(self) -> int:
        # Each has data of its own.
        return sys.maxsize

    def rehearsals(self, nodes: list[NodeView], rates: dict[str, float]) -> dict[str, TrainTask]:
        task = self._on_own(warming.rehearsal(self.state))
        return {node.node_id: task for node in nodes}

    def parts(self, view: ClusterView, attempts: dict[str, Attempt], in_time: list[Attempt]) -> list[Decision]:
        if in_time:
            return []
        state = self.state
        state.epochs.check_monitor()
        if not state.open.number and state.readiness.hopes(view.now, attempts, GRACE, GRACE_SECONDS, least=GRACE_LEAST):
            return []
        return self._open(state.readiness.able(view, attempts))

    def finished(self, attempt: Attempt, result: TrainResult) -> None:
        before = self.spent.get(attempt.node_id, privacy.Spent(result.items))
        self.spent[attempt.node_id] = replace(before, steps=before.steps + result.steps, rounds=before.rounds + 1)

    def too_far(self, results: Mapping[str, TrainResult]) -> dict[str, str]:
        """Compares each update with the last ones of the same node: nodes hold different data, so the sizes of their updates differ."""
        wrong: dict[str, str] = {}
        for node_id, result in results.items():
            usual = statistics.median(self.sizes.get(node_id, [math.inf]))
            if _size(result) > EXPLODED * usual > 0:
                wrong[node_id] = f"its update was {_size(result) / usual:.0f} times as large as its last ones"
        return wrong if len(wrong) < len(results) else {}

    def closed(self, results: Mapping[str, TrainResult], rejected: Mapping[str, str]) -> None:
        for node_id in results.keys() - rejected.keys():
            self.sizes[node_id] = [*self.sizes.get(node_id, ()), _size(results[node_id])][-SIZES_KEPT:]

    def metrics(self) -> dict[str, float]:
        found, spec = super().metrics(), self.state.given.spec
        if spec.privacy is not None and spec.privacy.noise_multiplier:
            found["epsilon"] = privacy.epsilon(spec.privacy, self.spent.values(), spec.batch_size)
        return found

    def told(self, progress: JobProgress, *, idle: bool) -> JobProgress:
        waits = idle and not self.state.epochs.all_trained
        return changed(
            progress,
            strategy="; ".join([progress.strategy, *self._worth_of_noise()]),
            message=f"waiting for a node that holds {self.state.given.spec.dataset}" if waits else progress.message,
        )

    def _worth_of_noise(self) -> list[str]:
        """What the noise does to the updates, for the user who asked for it; empty while that is not known."""
        spec, weights = self.state.given.spec, self.state.exchange.weights
        rules = spec.privacy
        if rules is None:
            return []
        if not rules.noise_multiplier:
            return ["without noise nothing is hidden"]
        if weights is None or not self.spent:
            return []
        count = (self.state.measured.trained_bytes or weights.size) // 4
        times = privacy.loudness(rules, self.spent.values(), count, spec.batch_size)
        nodes = counted(len(self.spent), "node")
        what = "gradient" if rules.unit == "example" else "update"
        return [f"the noise in the mean of {nodes} is {times:,.1f} times as long as the longest {what}"]

    def _open(self, view: ClusterView) -> list[Decision]:
        """Parts for nodes that hold data and are ready."""
        state, spec = self.state, self.state.given.spec
        free = state.trust.trusted([node for node in self.holders(view) if node.free_slots])
        if not free:
            return []
        rates = speeds(free, state.measured.rates)
        wanted = sizes.round_size(state, rates)
        # Nobody else has a slow node's data. So it does what it can, and the others wait for as long as that should take.
        found = split_in_time(wanted, rates, state.measured.usual_delays)
        parts = sizes.at_least({node_id: found.get(node_id, 0) for node_id in rates}, wanted, spec.batch_size)
        decisions: list[Decision] = []
        for node in free:
            data = node.holds(state.given.dataset.name)
            assert data is not None
            batch = min(spec.batch_size, data.count)
            # At most one pass over its own data: in more, a node with few items would only learn them by heart.
            samples = batch * max(1, round(min(parts[node.node_id], data.count) / batch))
            task = state.task(samples, spec.round_seconds or budget(samples, rates[node.node_id]))
            decisions.append(Lease(state.open.shard_id, node.node_id, self._on_own(task)))
        return decisions

    def _on_own(self, task: TrainTask) -> TrainTask:
        """The task, on the data that live on the node that gets it."""
        spec = self.state.given.spec
        return changed(
            task,
            node_data=self.state.given.dataset.name,
            privacy=spec.privacy,
            overlap=spec.overlap and spec.privacy is None,
        )


def _size(result: TrainResult) -> float:
    """The norm of an update, divided by its steps."""
    return result.norm / max(1, result.steps)
