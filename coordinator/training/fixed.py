"""Training by rounds that gives the same bits again (`deterministic=True`): pure.

A round has as many parts as there were nodes at the job's beginning, each with data shards and a number of steps that are its own for
the whole job. What comes of a part depends on its task alone, so it does not matter which node does it, nor how often one was
killed on the way; the outer step takes the parts in their order. A round lasts as long as its slowest part.
"""

from __future__ import annotations

from dataclasses import dataclass

from msgspec.structs import replace

from coordinator.jobs import Attempt, Decision, Lease
from coordinator.placement import ClusterView, assign, split
from coordinator.training.rounds import ROUNDS_PER_EPOCH, RoundsStrategy
from potluck.messages import AnyTask, JobProgress, TrainTask


@dataclass
class FixedStrategy(RoundsStrategy):
    """`parts` is 0 until the first round is open."""

    parts: int = 0

    def plan(self, view: ClusterView, attempts: dict[str, Attempt]) -> list[Decision]:
        mine = [attempt for attempt in attempts.values() if self._of_round(attempt)]
        under_way = bool(self.contributions or mine)
        if not under_way or len(self.contributions) == self.parts:
            return super().plan(view, attempts)
        return self._leases(view, {self._contributor(attempt) for attempt in mine} | self.contributions.keys())

    def leased(self, attempt: Attempt, task: AnyTask) -> None:
        super().leased(attempt, task)
        if isinstance(task, TrainTask):
            self.parts = task.parts

    def progress(self, running: dict[str, tuple[Attempt, int, dict[str, float]]]) -> JobProgress:
        return replace(super().progress(running), strategy="local, deterministic")

    def _open_round(self, view: ClusterView) -> list[Decision]:
        return self._leases(view, set())

    def _leases(self, view: ClusterView, taken: set[str]) -> list[Decision]:
        """The parts that nobody does, to the nodes that are free, one each."""
        batch = min(self.spec.batch_size, self.dataset.count)
        parts = self.parts or min(len(view.nodes), max(1, self.dataset.count // batch))
        if not parts:
            return []
        names = [_name(number) for number in range(parts)]
        equal = dict.fromkeys(names, 1.0)
        data = assign([shard.count for shard in self.dataset.shards], equal, {})
        left = (self.epochs_ended + 1) * self.dataset.count - self.samples
        wanted = min(max(parts * batch, -(-self.dataset.count // ROUNDS_PER_EPOCH)), max(1, left))
        samples = split(max(wanted, parts), equal)
        free = sorted((node for node in view.nodes if node.free_slots), key=lambda node: (not node.idle, node.node_id))
        missing = [number for number in range(parts) if names[number] not in taken]
        return [
            Lease(f"{self._shard_id}.{number}", node.node_id, self._part(number, parts, samples, data, batch))
            for number, node in zip(missing, free, strict=False)
        ]

    def _part(
        self, number: int, parts: int, samples: dict[str, int], data: dict[str, tuple[int, ...]], batch: int
    ) -> TrainTask:
        name = _name(number)
        batches = max(1, round(samples[name] / batch))
        return replace(
            self._task(batches * batch, 0.0),
            data=tuple(self.dataset.shards[index] for index in data[name]),
            overlap=False,
            part=number,
            parts=parts,
        )

    def _of_round(self, attempt: Attempt) -> bool:
        return attempt.shard_id.startswith(f"{self._shard_id}.")

    def _contributor(self, attempt: Attempt) -> str:
        return _name(int(attempt.shard_id.rpartition(".")[2]))


def _name(part: int) -> str:
    """Names in the order of the parts."""
    return f"part {part:06}"
