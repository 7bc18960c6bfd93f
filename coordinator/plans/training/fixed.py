"""Training by rounds that gives the same bits again (`deterministic=True`): pure.

A round has as many parts as there were nodes at the job's beginning, each with data shards and a number of steps that are its own for
the whole job. What comes of a part depends on its task alone, so it does not matter which node does it, nor how often one was
killed on the way; the outer step takes the parts in their order. A slow node does a part only where nobody else would have done it
sooner, and a part that is late is given to another node as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from coordinator.plans.job import Attempt, Decision, Lease
from coordinator.plans.placement import ClusterView, NodeView, assign, split
from coordinator.plans.training.rounds import ROUNDS_PER_EPOCH, RoundsStrategy
from potluck.wire.messages import AnyTask, JobProgress, TrainTask

ALIKE = 1.25
"""Speeds that differ by less than this factor are taken for equal."""


@dataclass
class FixedStrategy(RoundsStrategy):
    """`parts` is 0 until the first round is open."""

    parts: int = 0

    def _plan_round(self, view: ClusterView, attempts: dict[str, Attempt]) -> list[Decision]:
        if self.parts and len(self.contributions) == self.parts:
            return [self._close_round()]
        mine = [attempt for attempt in attempts.values() if self._of_round(attempt)]
        if not (self.round or mine or self.contributions) and self._hopes(view, attempts):
            return []
        return self._leases(view, attempts, mine if view.now < self.due else [])

    def leased(self, attempt: Attempt, task: AnyTask) -> None:
        super().leased(attempt, task)
        if isinstance(task, TrainTask):
            self.parts = task.parts

    def progress(
        self, running: dict[str, tuple[Attempt, int, dict[str, float]]], nodes: Sequence[NodeView] = ()
    ) -> JobProgress:
        return replace(super().progress(running, nodes), strategy="local, deterministic")

    def _leases(self, view: ClusterView, attempts: dict[str, Attempt], in_time: list[Attempt]) -> list[Decision]:
        """The parts that nobody does, to the nodes that can begin one, one each. `in_time`: attempts that are waited for."""
        names, samples, data = self._round_parts(view)
        taken = self.contributions.keys() | {self._contributor(attempt) for attempt in in_time}
        missing = [number for number, name in enumerate(names) if name not in taken]
        able = self.readiness.able(view, attempts)
        free = sorted(
            (node for node in able.nodes if node.free_slots),
            key=lambda node: (-self.measured.get(node.node_id, 0.0), node.node_id),
        )
        at_work = {attempt.node_id for attempt in in_time} | {node.node_id for node in free}
        rates = {node_id: self.measured.get(node_id, 1.0) for node_id in at_work}
        # What the fastest would have done one after the other before a slow one is through with its first is not for that one.
        left = len(names) - len(self.contributions)
        worth = [node for node in free if rates[node.node_id] * left * ALIKE >= max(rates.values())]
        return [
            Lease(f"{self._shard_id}.{number}", node.node_id, self._part(number, names, samples, data))
            for number, node in zip(missing, worth, strict=False)
        ]

    def _rehearsals(self, nodes: list[NodeView], rates: dict[str, float]) -> dict[str, TrainTask]:
        names, samples, data = self._round_parts(ClusterView(tuple(nodes), 0.0))
        tasks = [replace(self._part(n, names, samples, data), weights=None, step=None) for n in range(len(names))]
        return {node.node_id: tasks[place % len(tasks)] for place, node in enumerate(nodes)}

    def _round_parts(self, view: ClusterView) -> tuple[list[str], dict[str, int], dict[str, tuple[int, ...]]]:
        """Names of the parts of the open round, and the samples and data shards of each."""
        batch = self._batch
        parts = self.parts or min(len(view.nodes), max(1, self.dataset.count // batch))
        names = [_name(number) for number in range(parts)]
        equal = dict.fromkeys(names, 1.0)
        data = assign([shard.count for shard in self.dataset.shards], equal, {})
        left = (self.epochs_ended + 1) * self.dataset.count - self.samples
        wanted = min(max(parts * batch, -(-self.dataset.count // ROUNDS_PER_EPOCH)), max(1, left))
        return names, split(max(wanted, parts), equal), data

    def _part(
        self, number: int, names: list[str], samples: dict[str, int], data: dict[str, tuple[int, ...]]
    ) -> TrainTask:
        name = names[number]
        batches = max(1, round(samples[name] / self._batch))
        return replace(
            self._task(batches * self._batch, 0.0),
            data=tuple(self.dataset.shards[index] for index in data[name]),
            overlap=False,
            part=number,
            parts=len(names),
        )

    @property
    def _batch(self) -> int:
        return min(self.spec.batch_size, self.dataset.count)

    def _of_round(self, attempt: Attempt) -> bool:
        return attempt.shard_id.startswith(f"{self._shard_id}.")

    def _contributor(self, attempt: Attempt) -> str:
        return _name(int(attempt.shard_id.rpartition(".")[2]))


def _name(part: int) -> str:
    """Names in the order of the parts."""
    return f"part {part:06}"
