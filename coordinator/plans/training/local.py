"""The strategy `local`: rounds in which the nodes share the data by their speed. Pure.

All parts of a round should end at the same time. A node that costs more than it brings is left out for a while.
"""

from __future__ import annotations

from dataclasses import dataclass

from msgspec.structs import replace

from coordinator.plans.decisions import Choose, Decision, Lease
from coordinator.plans.events import RoundPlanned
from coordinator.plans.job import Attempt
from coordinator.plans.placement import ClusterView, NodeView, speeds, without_slow
from coordinator.plans.training import sizes, warming
from coordinator.plans.training.manner import Manner
from coordinator.plans.training.measurements import budget
from coordinator.plans.training.state import TrainingState
from potluck.wire.tasks import TrainTask

GRACE = 0.1
GRACE_SECONDS = 2.0
"""Nodes that are alike get ready at nearly the same time. So once a first node is ready, the first round waits for others: for GRACE
times what that node took to get ready, but for GRACE_SECONDS at most."""


@dataclass
class Local(Manner):
    """It keeps nothing of its own."""

    def rehearsals(self, nodes: list[NodeView], rates: dict[str, float]) -> dict[str, TrainTask]:
        return warming.with_data(self.state, nodes, rates)

    def parts(self, view: ClusterView, attempts: dict[str, Attempt], in_time: list[Attempt]) -> list[Decision]:
        if in_time:
            return []
        self.state.epochs.check_monitor()
        if not self.state.open.number and hopes(self.state, view, attempts):
            return []
        # If all parts are late, other nodes that are ready do the round.
        return self._open(self.state.readiness.able(view, attempts))

    def _open(self, view: ClusterView) -> list[Decision]:
        """Parts for nodes that are ready."""
        state, spec = self.state, self.state.given.spec
        free = state.trust.trusted([node for node in view.nodes if node.free_slots])
        if not free:
            return []
        rates = speeds(free, state.measured.rates)
        # Nodes of the last round come first: they have the data, and their optimizers have a state.
        crew = state.open.crew
        chosen = sorted(rates, key=lambda node_id: (node_id not in crew, -rates[node_id], node_id))[: self.room]
        rates = {node_id: rates[node_id] for node_id in sorted(chosen)}
        wanted = sizes.round_size(state, rates)
        found, slow = without_slow(wanted, rates, state.measured.usual_delays, spec.batch_size)
        parts = sizes.at_least(found, wanted, spec.batch_size)
        data, shares = state.sharing.assignment(state.given.counts, {node_id: rates[node_id] for node_id in parts})
        if (data, shares, slow) != (state.sharing.assigned, state.sharing.shares, state.sharing.slow):
            planned = RoundPlanned(at=view.now, round=state.open.number, assigned=data, shares=shares, slow=slow)
            return [Choose(planned)]
        decisions: list[Decision] = []
        for node_id, part in parts.items():
            samples = sizes.whole_batches(part, spec.batch_size)
            task = state.task(samples, spec.round_seconds or budget(samples, rates[node_id]))
            decisions.append(Lease(state.open.shard_id, node_id, replace(task, data=state.given.shards(data[node_id]))))
        return decisions


def hopes(state: TrainingState, view: ClusterView, attempts: dict[str, Attempt]) -> bool:
    """Whether the first round should wait a moment longer, for nodes that will soon be ready."""
    ready = state.readiness
    return ready.hopes(view.now, attempts, GRACE, GRACE_SECONDS, ready.alike(view))
