"""What a training job is given: pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from potluck.wire.jobs import Train
from potluck.wire.tasks import TrainTask
from potluck.wire.values import BlobRef, Dataset, DataShard, ImageOptions


@dataclass(frozen=True)
class Given:
    """What the user asked for, and the model and data that it is done with. It never changes."""

    spec: Train
    model: BlobRef
    image: ImageOptions | None
    dataset: Dataset

    @property
    def batch(self) -> int:
        """Items of a step: a batch, or all there are if these are fewer."""
        return min(self.spec.batch_size, self.dataset.count)

    @property
    def room(self) -> int:
        """How many nodes can have a whole batch each. With more, some items would be repeated, and the step would be less exact."""
        return max(1, self.dataset.count // self.spec.batch_size)

    @property
    def counts(self) -> list[int]:
        """Items of each data shard."""
        return [shard.count for shard in self.dataset.shards]

    def shards(self, indexes: Iterable[int]) -> tuple[DataShard, ...]:
        return tuple(self.dataset.shards[index] for index in indexes)

    def indexes(self, task: TrainTask) -> tuple[int, ...]:
        """The places of a task's data among the shards of the data set."""
        indexes = {shard.blob.sha256: index for index, shard in enumerate(self.dataset.shards)}
        return tuple(indexes[shard.blob.sha256] for shard in task.data)
