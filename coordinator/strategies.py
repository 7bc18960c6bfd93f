"""From a submitted job to the strategy that cuts it into shards. Pure."""

from __future__ import annotations

from msgspec.structs import replace

from coordinator.batch import BatchStrategy, ItemIndex
from coordinator.federated import NodesEvaluation
from coordinator.jobs import JobSubmitted, Strategy
from coordinator.training.federated import FederatedStrategy
from coordinator.training.fixed import FixedStrategy
from coordinator.training.rounds import Evaluation, RoundsStrategy
from coordinator.training.sync import SyncStrategy
from potluck.messages import (
    NODE_DATA,
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
            held_out, stays = validation, (spec.validation or "").startswith(NODE_DATA)

            def make(weights: BlobRef | None, step: Step | None, epoch: int) -> Evaluation:
                prefix = f"validation-{epoch}"
                return _evaluation(model, weights, step, held_out, image, spec.batch_size, prefix, stays)

        kind: type[RoundsStrategy] = RoundsStrategy if spec.strategy == "local" else SyncStrategy
        if spec.dataset.startswith(NODE_DATA):
            kind = FederatedStrategy
        elif spec.deterministic:
            kind = FixedStrategy
        return kind(spec=spec, model=model, image=image, dataset=dataset, validation=make)
    if isinstance(spec, Evaluate):
        stays = spec.dataset.startswith(NODE_DATA)
        return _evaluation(model, None, None, dataset, image, spec.batch_size, "evaluate", stays)
    return _prediction(model, dataset, image, spec)


def _evaluation(
    model: BlobRef,
    weights: BlobRef | None,
    step: Step | None,
    dataset: Dataset,
    image: ImageOptions | None,
    batch_size: int,
    prefix: str,
    stays: bool,
) -> Evaluation:
    """`stays`: the data live on the nodes."""

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

    if stays:
        return NodesEvaluation(dataset, replace(task_for(()), node_data=dataset.name), prefix)
    return BatchStrategy(ItemIndex(dataset.shards), batch_size, task_for, prefix=prefix)


def _prediction(model: BlobRef, dataset: Dataset, image: ImageOptions | None, spec: Predict) -> BatchStrategy:
    def task_for(slices: tuple[DataSlice, ...]) -> PredictTask:
        return PredictTask(model=model, slices=slices, format=dataset.format, image=image, batch_size=spec.batch_size)

    return BatchStrategy(ItemIndex(dataset.shards), spec.batch_size, task_for, prefix="predict")
