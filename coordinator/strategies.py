"""From a submitted job to the strategy that cuts it into shards. Pure."""

from __future__ import annotations

from coordinator.batch import BatchStrategy, ItemIndex
from coordinator.jobs import JobSubmitted, Strategy
from coordinator.training.rounds import RoundsStrategy
from coordinator.training.sync import SyncStrategy
from potluck.messages import (
    BlobRef,
    Dataset,
    DataSlice,
    Deploy,
    Evaluate,
    EvaluateTask,
    ImageOptions,
    Predict,
    PredictTask,
    Step,
    Train,
)


def strategy_for(job: JobSubmitted, dataset: Dataset | None, validation: Dataset | None) -> Strategy | None:
    """The strategy of a job over its data sets; None for a deployment, which has no shards."""
    spec, model, image = job.spec, job.model, job.image
    if isinstance(spec, Deploy):
        return None
    if model is None or dataset is None:
        raise ValueError(f"job {job.job_id} was submitted without its model or data set")
    if isinstance(spec, Train):
        make = None
        if validation is not None:
            held_out = validation

            def make(weights: BlobRef | None, step: Step | None, epoch: int) -> BatchStrategy:
                return _evaluation(model, weights, step, held_out, image, spec.batch_size, f"validation-{epoch}")

        kind = RoundsStrategy if spec.strategy == "local" else SyncStrategy
        return kind(spec=spec, model=model, image=image, dataset=dataset, validation=make)
    if isinstance(spec, Evaluate):
        return _evaluation(model, None, None, dataset, image, spec.batch_size, "evaluate")
    return _prediction(model, dataset, image, spec)


def _evaluation(
    model: BlobRef,
    weights: BlobRef | None,
    step: Step | None,
    dataset: Dataset,
    image: ImageOptions | None,
    batch_size: int,
    prefix: str,
) -> BatchStrategy:
    def task_for(slices: tuple[DataSlice, ...]) -> EvaluateTask:
        return EvaluateTask(
            model=model,
            weights=weights,
            slices=slices,
            format=dataset.format,
            image=image,
            batch_size=batch_size,
            step=step,
        )

    return BatchStrategy(ItemIndex(dataset.shards), batch_size, task_for, prefix=prefix)


def _prediction(model: BlobRef, dataset: Dataset, image: ImageOptions | None, spec: Predict) -> BatchStrategy:
    def task_for(slices: tuple[DataSlice, ...]) -> PredictTask:
        return PredictTask(model=model, slices=slices, format=dataset.format, image=image, batch_size=spec.batch_size)

    return BatchStrategy(ItemIndex(dataset.shards), spec.batch_size, task_for, prefix="predict")
