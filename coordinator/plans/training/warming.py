"""Who gets ready for a training job's rounds, and with what: pure."""

from __future__ import annotations

from typing import Protocol

from msgspec.structs import replace

from coordinator.plans.decisions import Choose, Decision, Lease, Withdraw
from coordinator.plans.events import MeasureAgain
from coordinator.plans.job import Attempt
from coordinator.plans.placement import ClusterView, NodeView, assign, speeds
from coordinator.plans.training.readiness import SLOWEST, WARM_UP, of_rounds
from coordinator.plans.training.sizes import PROBE_SECONDS
from coordinator.plans.training.state import TrainingState
from potluck.wire.tasks import TrainTask, WarmUpTask

LOST_SECONDS = 900.0
"""A part that is late for so long is taken back: its engine lives, but nobody can tell what it does."""


class Takers(Protocol):
    """Who may take part in the rounds of one kind of training."""

    def holders(self, view: ClusterView) -> list[NodeView]:
        """The nodes that may take part."""
        ...

    @property
    def room(self) -> int:
        """For how many of them there is something to do."""
        ...

    def rehearsals(self, nodes: list[NodeView], rates: dict[str, float]) -> dict[str, TrainTask]:
        """For each of these nodes a task like those that it may get in a round. `rates`: items/s of all nodes that may take part."""
        ...


def measured_anew(state: TrainingState, view: ClusterView) -> list[Decision]:
    """Lets nodes be measured again that were left out as slow, and may be faster now; not those that were left out just now."""
    if view.now <= state.sharing.slow_at:
        return []
    stale = tuple(sorted(node_id for node_id in state.sharing.slow if state.readiness.stale(node_id, view.now)))
    return [Choose(MeasureAgain(at=view.now, nodes=stale))] if stale else []


def warm_ups(state: TrainingState, takers: Takers, view: ClusterView, attempts: dict[str, Attempt]) -> list[Decision]:
    """Warm-ups for nodes that should get ready. Withdraws parts from which nothing can be expected any more."""
    late: list[Decision] = [
        Withdraw(attempt.attempt_id, "nothing has come of it for too long")
        for attempt in attempts.values()
        if of_rounds(attempt) and view.now - max(attempt.leased_at, state.open.opened_at) > LOST_SECONDS
    ]
    holders = takers.holders(view)
    nodes = state.readiness.needing(holders, attempts)
    if not nodes:
        looking = [node.node_id for node in view.nodes if node.free_slots]
        return [*late, *(state.validation.check(looking[0]) if looking else [])]
    rates = speeds(holders, state.measured.rates)
    # As many as can take part, and one more, in case one of them gets no further.
    known = {attempt.node_id for attempt in attempts.values()} | state.readiness.ready.keys()
    taken = sum(node.node_id in known and node.node_id not in state.sharing.slow for node in holders)
    nodes.sort(key=lambda node: (-rates[node.node_id], node.node_id))
    nodes = nodes[: max(0, takers.room + 1 - taken)]
    if not nodes:
        return late
    first = state.validation.check(max((node.node_id for node in nodes), key=lambda name: (rates[name], name)))
    tasks = takers.rehearsals(nodes, rates)
    return [*late, *first, *(Lease(WARM_UP, name, WarmUpTask(task=task)) for name, task in tasks.items())]


def rehearsal(state: TrainingState) -> TrainTask:
    """A task for warming up, without its data; nobody needs the weights yet."""
    return replace(state.task(state.given.spec.batch_size, PROBE_SECONDS), weights=None, step=None)


def with_data(state: TrainingState, nodes: list[NodeView], rates: dict[str, float]) -> dict[str, TrainTask]:
    """Rehearsals for these nodes, with the data that each will probably have in a round."""
    task, counts, assigned = rehearsal(state), state.given.counts, state.sharing.assigned
    # Much slower nodes get ready later, or are left out. Until then, the fast ones share the data among themselves.
    fast = {name: rate for name, rate in rates.items() if rate * SLOWEST >= max(rates.values())}
    data = assign(counts, rates, assigned) | assign(counts, fast, assigned)
    return {node.node_id: replace(task, data=state.given.shards(data[node.node_id])) for node in nodes}
