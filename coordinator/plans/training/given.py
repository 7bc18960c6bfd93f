"""What a training job is given: pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from potluck.wire.jobs import Train
from potluck.wire.tasks import TrainTask
from potluck.wire.values import BlobRef, Dataset, DataShard, ImageOptions


@dataclass(frozen=True)
class Given:
    """What was asked for, and what it is to be done with: never changed."""

    spec: Train
    model: BlobRef
    image: ImageOptions | None
    dataset: Dataset

    @property
    def batch(self) -> int:
        """Items of a step: all there are, where that is fewer than a batch."""
        return min(self.spec.batch_size, self.dataset.count)

    @property
    def room(self) -> int:
        """As many nodes as can have a whole batch each: on fewer items than that, more would repeat some and blur the step."""
        return max(1, self.dataset.count // self.spec.batch_size)

    @property
    def counts(self) -> list[int]:
        """Items of each data shard."""
        return [shard.count for shard in self.dataset.shards]

    def shards(self, indexes: Iterable[int]) -> tuple[DataShard, ...]:
        return tuple(self.dataset.shards[index] for index in indexes)

    def indexes(self, task: TrainTask) -> tuple[int, ...]:
        """Of a task's data among the shards of the data set."""
        indexes = {shard.blob.sha256: index for index, shard in enumerate(self.dataset.shards)}
        return tuple(indexes[shard.blob.sha256] for shard in task.data)
