"""Synchronous training, the strategy `sync`: pure.

The members of a group take every step together, so the result is that of one machine with the same batches. A round is here the
stretch of steps between two checkpoints, which member 0 writes. When a member is lost, what is left forms a new group and goes
on from the last checkpoint; nodes that get ready later join at the next round, where that pays (`group`).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from coordinator.plans.job import (
    Attempt,
    Choose,
    CloseSync,
    Decision,
    Lease,
    OfTraining,
    RoundBroken,
    RoundClosed,
    RoundPlanned,
    StoodStill,
    Training,
    Withdraw,
)
from coordinator.plans.placement import ClusterView, NodeView, speeds
from coordinator.plans.training import group
from coordinator.plans.training.costs import computing_seconds
from coordinator.plans.training.rounds import OVERHEADS_KEPT, PACES_KEPT, PROBE_SECONDS, RoundsStrategy
from coordinator.plans.training.scores import weighted
from potluck.errors import Unavailable
from potluck.wire.messages import (
    AnyTask,
    AnyTaskResult,
    BlobRef,
    ErrorInfo,
    JobProgress,
    SyncResult,
    SyncTask,
)
from potluck.wording import counted

GRACE = 1.0
GRACE_SECONDS = 60.0
"""A group is not easily formed anew, so its first round waits longer than others for nodes that are not much slower: as long again as
the first node that is ready took, and so many seconds at most."""
FIRST_STEPS = 8
"""Of the first round, before anything is measured."""
TRIES_LIMIT = 5
"""So often in a row a round may break off."""
STUCK_FACTOR = 4.0
STUCK_SECONDS = 60.0
"""A round that takes longer than this factor of what was expected, and so many seconds, is broken off: its members wait for each other.
While one of them gives way to inference, and for so long after it, that is what they wait for."""
FORMING_SECONDS = 180.0
FORMING_FACTOR = 3.0
"""The same for a round that begins with engines to start, data to load and a group to form: so many seconds, or so many times what
the slowest member took to get ready."""
NOT_TOGETHER = (
    "it takes no part in synchronous steps: its daemon listens on this machine alone. On a network that you trust, start it "
    "with --insecure, or train with strategy 'local'"
)


GAVE_WAY_SECONDS = 5.0
"""How often it is noted that a member gives way."""


@dataclass
class SyncStrategy(RoundsStrategy):
    """`why` says in words why it is this one, where `auto` chose it."""

    why: str = "sync"
    optimizer: BlobRef | None = None
    members: tuple[str, ...] = ()
    """Of the group, in the order of their ranks."""
    formed: int = 0
    formation: str = ""
    steps_done: int = 0
    batches: dict[str, int] = field(default_factory=dict)
    """Items of a step by member."""
    parts: dict[str, SyncResult] = field(default_factory=dict)
    """Results of the open round by node."""
    broken: str = ""
    """Why the open round can have no result."""
    tries: int = 0
    begins: bool = False
    """Whether the open round formed its group."""
    planned_seconds: float = 0.0
    """Of the open round."""
    gave_way_at: float = 0.0
    """When a member was last seen to stand still for inference, and all with it."""
    step_seconds: float = 0.0

    @property
    def batch(self) -> int:
        """Items of a step, over all members."""
        return min(self.spec.batch_size, self.dataset.count)

    @property
    def kept(self) -> set[str]:
        found = [self.optimizer, *(ref for part in self.parts.values() for ref in (part.weights, part.optimizer))]
        return super().kept | {ref.sha256 for ref in found if ref is not None}

    def leased(self, attempt: Attempt, task: AnyTask) -> None:
        if not isinstance(task, SyncTask):
            super().leased(attempt, task)
            return
        if task.rank == 0 and attempt.shard_id == self._shard_id:
            self.opened_at = attempt.leased_at
            self.begins = task.begins
            self.planned_seconds = task.steps * self.step_seconds
            if task.begins:
                self.formed += 1
                self.tries += bool(self.broken)
                self.broken, self.formation, self.parts = "", task.formation, {}
                self.members = ("",) * len(task.members)
            self.batches = {}
        self.batches[attempt.node_id] = task.batches[task.rank]
        if task.begins:
            self.members = (*self.members[: task.rank], attempt.node_id, *self.members[task.rank + 1 :])
        self.epoch_started_at = self.epoch_started_at or attempt.leased_at

    def finished(self, attempt: Attempt, result: AnyTaskResult, at: float) -> None:
        if not isinstance(result, SyncResult):
            super().finished(attempt, result, at)
        elif attempt.shard_id == self._shard_id:
            self.parts[attempt.node_id] = result
            if result.rate > 0:
                self.measured[attempt.node_id] = result.rate

    def ended(self, attempt: Attempt, error: ErrorInfo | None) -> None:
        if attempt.shard_id == self._shard_id:
            self.broken = self.broken or (error.message if error is not None else f"node {attempt.node_id} was lost")
            return  # how fast its members are is known, and engines start anew for the next group anyway
        super().ended(attempt, error)

    def happened(self, event: OfTraining) -> Training:
        match event:
            case RoundBroken() if event.round == self.round:
                self.broken = self.broken or event.reason
            case StoodStill():
                self.gave_way_at = event.at
            case _:
                super().happened(event)
        return self

    def _closed_round(self, event: RoundClosed) -> None:
        computing = max((part.seconds for part in self.parts.values()), default=0.0)
        overhead = max(0.0, event.at - self.opened_at - computing)
        if not self.begins:  # forming a group is no part of what a round costs
            self.overheads = [*self.overheads, overhead][-OVERHEADS_KEPT:]
        steps = max((part.steps for part in self.parts.values()), default=0)
        if steps:
            self.step_seconds = computing / steps
        pace = event.samples, max(0.0, event.at - (self.closed_at or self.opened_at))
        self.paces = [*self.paces, pace][-PACES_KEPT:]
        self.computing_seconds += computing * len(self.parts)
        self.round_seconds += len(self.parts) * max(0.0, event.at - (self.closed_at or self.opened_at))
        self.closed_at = event.at
        reduced = max((part.reduced_bytes for part in self.parts.values()), default=0) or event.weights.size
        self.exchanged_bytes += steps * 2 * (len(self.members) - 1) * reduced
        self.weights, self.optimizer, self.step = event.weights, event.optimizer, None
        self.samples += event.samples
        self.steps_done += event.samples // self.batch
        self.round += 1
        self.round_metrics.append((event.samples, event.metrics))
        if self.broken:
            self.members = ()
        self.crew, self.parts, self.broken, self.tries = frozenset(self.parts), {}, "", 0

    def plan(self, view: ClusterView, attempts: dict[str, Attempt]) -> list[Decision]:
        if not self.epoch_full and not self.all_trained:
            mine = [attempt for attempt in attempts.values() if attempt.shard_id == self._shard_id]
            if mine:
                if choice := self._measured_anew(view):
                    return choice
                return [*self._plan_warm_ups(view, attempts), *self._watch(view, mine)]
            if closing := self._close_sync():
                return closing
        return super().plan(view, attempts)

    def progress(
        self, running: dict[str, tuple[Attempt, int, dict[str, float]]], nodes: Sequence[NodeView] = ()
    ) -> JobProgress:
        found = super().progress(running, nodes)
        able = self._holders(ClusterView(tuple(nodes), 0.0))
        alone = {node.node_id: NOT_TOGETHER for node in nodes if node not in able}
        return replace(found, strategy=self.why, waiting=alone | found.waiting)

    def _done_parts(self) -> list[tuple[int, dict[str, float]]]:
        return super()._done_parts() + [(part.samples, part.metrics) for part in self.parts.values()]

    @property
    def _may_leave(self) -> bool:
        return False  # its steps are those of one process

    @property
    def _room(self) -> int:
        return self.batch  # members have an item of each step at least

    def _hopes(self, view: ClusterView, attempts: dict[str, Attempt]) -> bool:
        return self.readiness.hopes(view.now, attempts, GRACE, GRACE_SECONDS, self._alike(view))

    def _holders(self, view: ClusterView) -> list[NodeView]:
        """Of nodes that can take part in no group, the one with the fastest processor, alone."""
        nodes = super()._holders(view)
        able = [node for node in nodes if node.collective]
        if not able and nodes:
            rates = speeds(nodes, self.measured)
            able = [max(nodes, key=lambda node: (node.node_id in self.members, rates[node.node_id], node.node_id))]
        return able

    def _open_round(self, view: ClusterView) -> list[Decision]:
        if self.broken and self.tries + 1 >= TRIES_LIMIT:
            raise Unavailable(
                f"synchronous training broke off {counted(self.tries + 1, 'time')} in a row: {self.broken}"
            )
        nodes = self._holders(view)
        rates = speeds(nodes, self.measured)
        left = max(1, self.total - self.samples)
        whole = bool(self.members) and not self.broken and all(name in rates for name in self.members)
        rates = {
            node.node_id: rates[node.node_id] for node in nodes if node.idle or (whole and node.node_id in self.members)
        }
        if not rates:
            return []
        took = self.readiness.took
        if whole:
            members = {name: rates.pop(name) for name in self.members}
            new = group.worth_joining(self.batch, left, members, rates, took)
            chosen = [*self.members, *new]
            rates |= members
            slow = {name: "it would cost more than it brings" for name in rates if name not in chosen}
        else:
            chosen, slow = group.first_members(self.batch, left, rates, took)
        if slow != self.slow:
            return [Choose(RoundPlanned(at=view.now, round=self.round, slow=slow))]
        shares = group.shares(self.batch, {name: rates[name] for name in chosen}, self.batches if whole else {})
        begins = not whole or shares.keys() != set(self.members)  # a new one, or one so slow that it gets nothing
        ranked = list(shares) if begins else list(self.members)
        addresses = {node.node_id: node.collective for node in view.nodes}
        steps = self._steps()
        return [
            Lease(
                self._shard_id,
                node_id,
                SyncTask(
                    model=self.model,
                    data=self.dataset.shards,
                    format=self.dataset.format,
                    image=self.image,
                    formation=self.formation if not begins else f"{self.round}.{self.formed}",
                    members=tuple(addresses.get(name, "") for name in ranked),
                    batches=tuple(shares[name] for name in ranked),
                    rank=rank,
                    first_step=self.steps_done,
                    steps=steps,
                    begins=begins,
                    weights=self.weights if begins else None,
                    optimizer=self.optimizer if begins else None,
                    seed=self.spec.seed,
                    class_weight=self.spec.class_weight,
                ),
            )
            for rank, node_id in enumerate(ranked)
        ]

    def _steps(self) -> int:
        left = max(1, ((self.epochs_ended + 1) * self.dataset.count - self.samples) // self.batch)
        if not self.step_seconds:
            return min(left, FIRST_STEPS)
        overhead = statistics.median(self.overheads) if self.overheads else 0.0
        budget = self.spec.round_seconds or max(computing_seconds(overhead), PROBE_SECONDS)
        return min(left, max(1, round(budget / self.step_seconds)))

    def _watch(self, view: ClusterView, mine: list[Attempt]) -> list[Decision]:
        slowest = max((self.readiness.took.get(name, 0.0) for name in self.members), default=0.0)
        patience = max(FORMING_SECONDS, FORMING_FACTOR * slowest) if self.begins else STUCK_SECONDS
        gives_way = any(node.gives_way and node.node_id in self.members for node in view.nodes)
        if gives_way and view.now - self.gave_way_at >= GAVE_WAY_SECONDS:
            return [Choose(StoodStill(at=view.now))]
        began = view.now if gives_way else max(self.opened_at, self.gave_way_at)
        late = view.now - began > max(patience, STUCK_FACTOR * self.planned_seconds)
        if late and not self.broken:
            reason = "its members wait for each other: can all of them reach the others' addresses?"
            return [Choose(RoundBroken(at=view.now, round=self.round, reason=reason))]
        if not self.broken:
            return []
        return [Withdraw(attempt.attempt_id, f"the group is no more: {self.broken}") for attempt in mine]

    def _close_sync(self) -> list[Decision]:
        checkpoint = next((part for part in self.parts.values() if part.weights is not None), None)
        if checkpoint is None or checkpoint.weights is None or checkpoint.optimizer is None:
            return []
        metrics = weighted([(part.samples, part.metrics) for part in self.parts.values()])
        return [CloseSync(self.round, checkpoint.weights, checkpoint.optimizer, checkpoint.steps * self.batch, metrics)]
