"""Makes a model smaller before it is deployed: one node converts it, and both models are evaluated on the same data. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from coordinator.plans.batch import BatchStrategy, ItemIndex
from coordinator.plans.decisions import Complete, Decision, Lease
from coordinator.plans.job import Attempt
from coordinator.plans.placement import RUNTIME_OF, ClusterView, NodeView
from potluck.wire.jobs import JobProgress
from potluck.wire.tasks import AnyTask, AnyTaskResult, ConvertResult, ConvertTask, EvaluateTask, TaskResult
from potluck.wire.values import BlobRef, Dataset, DataSlice, ErrorInfo, ImageOptions, ModelFormat

CALIBRATION_ITEMS = 100
"""How many items are used to calibrate: more of them hardly change the ranges."""
CONVERT = "convert"
BATCH_SIZE = 32


@dataclass
class QuantizeStrategy:
    """Convert `model` by `task`; meanwhile evaluate it on `evaluation`, and then evaluate the result."""

    model: BlobRef
    format: ModelFormat
    image: ImageOptions | None
    evaluation: Dataset
    task: ConvertTask
    converted: BlobRef | None = None
    after: BatchStrategy | None = None
    converting: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.before = self._evaluation("before", self.model, self.format)

    def plan(self, view: ClusterView, attempts: dict[str, Attempt]) -> list[Decision]:
        decisions: list[Decision] = []
        if self.converted is None and not self.converting:
            free = [node for node in view.nodes if node.free_slots]
            if free:
                chosen = max(free, key=lambda node: (node.idle, node.gflops, node.node_id))
                decisions.append(Lease(CONVERT, chosen.node_id, self.task))
                view = _used(view, chosen.node_id)
        for part in (self.before, self.after):
            if part is not None:
                mine = [one for one in part.plan(view, attempts) if not isinstance(one, Complete)]
                decisions += mine
                for lease in mine:
                    if isinstance(lease, Lease):
                        view = _used(view, lease.node_id)
        if self.before.complete and self.after is not None and self.after.complete:
            decisions.append(Complete())
        return decisions

    def leased(self, attempt: Attempt, task: AnyTask) -> None:
        if attempt.shard_id == CONVERT:
            self.converting.add(attempt.attempt_id)
        elif (part := self._part(attempt)) is not None:
            part.leased(attempt, task)

    def finished(self, attempt: Attempt, result: AnyTaskResult, at: float) -> None:
        if attempt.shard_id == CONVERT:
            self.converting.discard(attempt.attempt_id)
            if isinstance(result, ConvertResult):
                self.converted = result.model
                self.image = result.image or self.image  # the result does not show what the original's layers expect
                self.after = self._evaluation("after", result.model, "tflite")
        elif (part := self._part(attempt)) is not None:
            part.finished(attempt, result, at)

    def ended(self, attempt: Attempt, error: ErrorInfo | None) -> None:
        if attempt.shard_id == CONVERT:
            self.converting.discard(attempt.attempt_id)
        elif (part := self._part(attempt)) is not None:
            part.ended(attempt, error)

    def progress(
        self, running: dict[str, tuple[Attempt, int, dict[str, float]]], nodes: Sequence[NodeView] = ()
    ) -> JobProgress:
        """Items evaluated, of both models together."""
        parts = [part.progress(running) for part in (self.before, self.after) if part is not None]
        message = "converting" if self.converted is None else "evaluating"
        if self.after is not None and self.after.complete and self.before.complete:
            message = "deploying"
        return JobProgress(
            done=sum(part.done for part in parts),
            total=2 * self.before.total,
            nodes={node_id: rate for part in parts for node_id, rate in part.nodes.items()},
            items_per_second=sum(part.items_per_second for part in parts),
            message=message,
        )

    def evaluated(self) -> tuple[list[TaskResult], list[TaskResult]]:
        """Results of the original, and of the converted model."""
        return self.before.in_order(), self.after.in_order() if self.after is not None else []

    def _part(self, attempt: Attempt) -> BatchStrategy | None:
        return self.before if attempt.shard_id.startswith(self.before.prefix) else self.after

    def _evaluation(self, prefix: str, model: BlobRef, model_format: ModelFormat) -> BatchStrategy:
        def task_for(slices: tuple[DataSlice, ...]) -> EvaluateTask:
            return EvaluateTask(
                model=model,
                weights=None,
                slices=slices,
                format=self.evaluation.format,
                image=self.image,
                batch_size=BATCH_SIZE,
                model_format=model_format,
                by_outputs=True,
            )

        index = ItemIndex(self.evaluation.shards)
        return BatchStrategy(index, BATCH_SIZE, task_for, prefix=prefix, runtime=RUNTIME_OF[model_format])


def convert_task(model: BlobRef, model_format: ModelFormat, image: ImageOptions | None, data: Dataset) -> ConvertTask:
    """The task; it calibrates with the first items of `data`, whose shards were shuffled when they were packed."""
    index = ItemIndex(data.shards)
    return ConvertTask(
        model=model,
        slices=index.slices(0, min(CALIBRATION_ITEMS, index.count)),
        format=data.format,
        image=image,
        model_format=model_format,
    )


def _used(view: ClusterView, node_id: str) -> ClusterView:
    """The view with one slot of a node taken."""
    return replace(
        view,
        nodes=tuple(
            replace(node, free_slots=node.free_slots - 1, idle=False) if node.node_id == node_id else node
            for node in view.nodes
        ),
    )
