"""Synchronous training, the strategy `sync`: pure.

The members of a group take every step together, so the result is that of one machine with the same batches. Here a round is the
steps between two checkpoints. Member 0 writes these. When a member is lost, the others form a new group and go on from the last
checkpoint. Nodes that get ready later join at the next round, if that makes the rest faster (`group`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from msgspec.structs import replace

from coordinator.plans.decisions import Choose, CloseSync, Decision, Lease, Withdraw
from coordinator.plans.events import RoundBroken, RoundClosed, RoundPlanned, StoodStill
from coordinator.plans.job import Attempt
from coordinator.plans.placement import ClusterView, NodeView, speeds
from coordinator.plans.training import group, warming
from coordinator.plans.training.costs import computing_seconds
from coordinator.plans.training.group import Group
from coordinator.plans.training.scores import weighted
from coordinator.plans.training.sizes import PROBE_SECONDS
from coordinator.plans.training.state import TrainingState
from potluck.errors import Unavailable
from potluck.wire.jobs import JobProgress
from potluck.wire.tasks import AnyTask, AnyTaskResult, SyncResult, SyncTask, TrainTask
from potluck.wire.values import ErrorInfo
from potluck.wording import counted

GRACE = 1.0
GRACE_SECONDS = 60.0
"""To form a group again is costly. So the first round waits for nodes that are not much slower: once a first node is ready, for GRACE
times what that node took to get ready, but for GRACE_SECONDS at most."""
FIRST_STEPS = 8
"""Steps of the first round, before anything is measured."""
TRIES_LIMIT = 5
"""If rounds break off so often in a row, the job fails."""
STUCK_FACTOR = 4.0
STUCK_SECONDS = 60.0
"""A round is broken off if it takes longer than STUCK_FACTOR times what was expected, and longer than STUCK_SECONDS: then its members wait
for each other in vain. While a member gives way to inference, all wait for that; then the time is counted from the end of it."""
FORMING_SECONDS = 180.0
FORMING_FACTOR = 3.0
"""In place of STUCK_SECONDS, for a round in which engines start, data are loaded and a group is formed: FORMING_SECONDS, or
FORMING_FACTOR times what the slowest member took to get ready, whichever is longer."""
NOT_TOGETHER = (
    "it takes no part in synchronous steps: its daemon listens on this machine alone. On a network that you trust, start it "
    "with --insecure, or train with strategy 'local'"
)
GAVE_WAY_SECONDS = 5.0
"""How often it is journaled that a member gives way."""


@dataclass
class SyncRounds:
    """The rounds of `state`, in which a group takes steps together."""

    state: TrainingState = field(repr=False)
    group: Group = field(default_factory=Group)
    parts: dict[str, SyncResult] = field(default_factory=dict)
    """Results of the open round by node."""
    steps_done: int = 0
    step_seconds: float = 0.0
    planned_seconds: float = 0.0
    """Of the open round."""
    gave_way_at: float = 0.0
    """When a member was last seen to give way to inference; then all of them stand still."""
    # Its steps are those of one process.
    may_leave: ClassVar[bool] = False

    def plan(self, view: ClusterView, attempts: dict[str, Attempt]) -> list[Decision]:
        mine = [attempt for attempt in attempts.values() if self.state.open.has(attempt)]
        if not mine and (closing := self._close()):
            return closing
        if choice := warming.measured_anew(self.state, view):
            return choice
        getting_ready = warming.warm_ups(self.state, self, view, attempts)
        return [*getting_ready, *(self._watch(view, mine) if mine else self._open(view, attempts))]

    def leased(self, attempt: Attempt, task: AnyTask) -> None:
        if not isinstance(task, SyncTask):
            return
        if task.rank == 0 and self.state.open.has(attempt):
            self.state.open.opened_at = attempt.leased_at
            self.planned_seconds = task.steps * self.step_seconds
            self.group.opened(task)
            if task.begins:
                self.parts = {}
        self.group.leased(attempt.node_id, task)

    def finished(self, attempt: Attempt, result: AnyTaskResult) -> None:
        if isinstance(result, SyncResult) and self.state.open.has(attempt):
            self.parts[attempt.node_id] = result
            self.state.measured.rated(attempt.node_id, result.rate)

    def breaks_off(self, attempt: Attempt, error: ErrorInfo | None) -> bool:
        self.group.breaks_off(error.message if error is not None else f"node {attempt.node_id} was lost")
        # The speeds of the members stay known, and for the next group all engines start again anyway.
        return True

    def happened(self, event: RoundClosed | RoundBroken | StoodStill) -> None:
        match event:
            case RoundClosed():
                self._closed(event)
            case RoundBroken() if event.round == self.state.open.number:
                self.group.breaks_off(event.reason)
            case StoodStill():
                self.gave_way_at = event.at
            case _:
                pass

    def done(self) -> dict[str, tuple[int, dict[str, float]]]:
        return {node_id: (part.samples, part.metrics) for node_id, part in self.parts.items()}

    def kept(self) -> set[str]:
        found = [ref for part in self.parts.values() for ref in (part.weights, part.optimizer)]
        return {ref.sha256 for ref in found if ref is not None}

    def metrics(self) -> dict[str, float]:
        return self.state.epochs.metrics()

    def told(self, progress: JobProgress, nodes: Sequence[NodeView], *, running: bool) -> JobProgress:
        able = self.holders(ClusterView(tuple(nodes), 0.0))
        alone = {node.node_id: NOT_TOGETHER for node in nodes if node not in able}
        return replace(progress, waiting=alone | progress.waiting)

    def holders(self, view: ClusterView) -> list[NodeView]:
        """The nodes that can take part in a group. If there are none: the fastest node, which then trains alone."""
        able = [node for node in view.nodes if node.collective]
        if able or not view.nodes:
            return able
        rates, members = speeds(view.nodes, self.state.measured.rates), self.group.members
        return [max(view.nodes, key=lambda node: (node.node_id in members, rates[node.node_id], node.node_id))]

    @property
    def room(self) -> int:
        # Each member has an item of each step, at least.
        return self.state.given.batch

    def rehearsals(self, nodes: list[NodeView], rates: dict[str, float]) -> dict[str, TrainTask]:
        return warming.with_data(self.state, nodes, rates)

    def hopes(self, view: ClusterView, attempts: dict[str, Attempt]) -> bool:
        """Whether the first round should wait a moment longer, for nodes that will soon be ready."""
        ready = self.state.readiness
        return ready.hopes(view.now, attempts, GRACE, GRACE_SECONDS, ready.alike(view))

    def _open(self, view: ClusterView, attempts: dict[str, Attempt]) -> list[Decision]:
        state, now = self.state, self.group
        state.epochs.check_monitor()
        if not state.open.number and self.hopes(view, attempts):
            return []
        if now.broken and now.tries + 1 >= TRIES_LIMIT:
            raise Unavailable(f"synchronous training broke off {counted(now.tries + 1, 'time')} in a row: {now.broken}")
        nodes = self.holders(state.readiness.able(view, attempts))
        rates = speeds(nodes, state.measured.rates)
        whole = now.whole and all(name in rates for name in now.members)
        rates = {
            node.node_id: rates[node.node_id] for node in nodes if node.idle or (whole and node.node_id in now.members)
        }
        if not rates:
            return []
        batch, left, took = state.given.batch, max(1, state.epochs.total - state.epochs.samples), state.readiness.took
        if whole:
            members = {name: rates.pop(name) for name in now.members}
            chosen = [*now.members, *group.worth_joining(batch, left, members, rates, took)]
            rates |= members
            slow = {name: "it would cost more than it brings" for name in rates if name not in chosen}
        else:
            chosen, slow = group.first_members(batch, left, rates, took)
        if slow != state.sharing.slow:
            return [Choose(RoundPlanned(at=view.now, round=state.open.number, slow=slow))]
        shares = group.shares(batch, {name: rates[name] for name in chosen}, now.batches if whole else {})
        # The members change if a node joins, or if one is so slow that it gets no items.
        begins = not whole or shares.keys() != set(now.members)
        ranked = list(shares) if begins else list(now.members)
        return self._leases(ranked, shares, {node.node_id: node.collective for node in nodes}, begins=begins)

    def _leases(
        self, ranked: Sequence[str], shares: dict[str, int], addresses: dict[str, str], *, begins: bool
    ) -> list[Decision]:
        """The parts of a round; `begins`: it forms the group."""
        given, exchange, number = self.state.given, self.state.exchange, self.state.open.number
        steps = self._steps()
        return [
            Lease(
                self.state.open.shard_id,
                node_id,
                SyncTask(
                    model=given.model,
                    data=given.dataset.shards,
                    format=given.dataset.format,
                    image=given.image,
                    formation=f"{number}.{self.group.formed}" if begins else self.group.formation,
                    members=tuple(addresses[name] for name in ranked),
                    batches=tuple(shares[name] for name in ranked),
                    rank=rank,
                    first_step=self.steps_done,
                    steps=steps,
                    begins=begins,
                    weights=exchange.weights if begins else None,
                    optimizer=exchange.optimizer if begins else None,
                    seed=given.spec.seed,
                    class_weight=given.spec.class_weight,
                ),
            )
            for rank, node_id in enumerate(ranked)
        ]

    def _steps(self) -> int:
        state = self.state
        left = max(1, state.epochs.left // state.given.batch)
        if not self.step_seconds:
            return min(left, FIRST_STEPS)
        budget = state.given.spec.round_seconds or max(computing_seconds(state.measured.overhead), PROBE_SECONDS)
        return min(left, max(1, round(budget / self.step_seconds)))

    def _watch(self, view: ClusterView, mine: list[Attempt]) -> list[Decision]:
        """Breaks off the open round if its members wait for each other in vain. Withdraws the parts of a round that is broken off."""
        members, broken = self.group.members, self.group.broken
        slowest = max((self.state.readiness.took.get(name, 0.0) for name in members), default=0.0)
        patience = max(FORMING_SECONDS, FORMING_FACTOR * slowest) if self.group.begins else STUCK_SECONDS
        gives_way = any(node.gives_way and node.node_id in members for node in view.nodes)
        if gives_way and view.now - self.gave_way_at >= GAVE_WAY_SECONDS:
            return [Choose(StoodStill(at=view.now))]
        began = view.now if gives_way else max(self.state.open.opened_at, self.gave_way_at)
        late = view.now - began > max(patience, STUCK_FACTOR * self.planned_seconds)
        if late and not broken:
            reason = "its members wait for each other: can all of them reach the others' addresses?"
            return [Choose(RoundBroken(at=view.now, round=self.state.open.number, reason=reason))]
        if not broken:
            return []
        return [Withdraw(attempt.attempt_id, f"the group is no more: {broken}") for attempt in mine]

    def _close(self) -> list[Decision]:
        checkpoint = next((part for part in self.parts.values() if part.weights is not None), None)
        if checkpoint is None or checkpoint.weights is None or checkpoint.optimizer is None:
            return []
        samples = checkpoint.steps * self.state.given.batch
        number, metrics = self.state.open.number, weighted(list(self.done().values()))
        return [CloseSync(number, checkpoint.weights, checkpoint.optimizer, samples, metrics)]

    def _closed(self, event: RoundClosed) -> None:
        parts = self.parts.values()
        seconds = max((part.seconds for part in parts), default=0.0)
        steps = max((part.steps for part in parts), default=0)
        if steps:
            self.step_seconds = seconds / steps
        self.steps_done += event.samples // self.state.given.batch
        reduced = max((part.reduced_bytes for part in parts), default=0) or event.weights.size
        self.state.round_closed(
            event,
            self.parts.keys(),
            longest_seconds=seconds,
            computing_seconds=seconds * len(parts),
            sent_bytes=steps * 2 * (len(self.group.members) - 1) * reduced,
            formed=self.group.begins,
        )
        self.group.round_closed()
        self.parts = {}
