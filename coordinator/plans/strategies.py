"""Makes the strategy that cuts a submitted job into shards. Pure."""

from __future__ import annotations

from msgspec.structs import replace

from coordinator.plans.batch import BatchStrategy, ItemIndex
from coordinator.plans.events import JobSubmitted
from coordinator.plans.job import VALIDATION, Strategy, Training
from coordinator.plans.node_data import NodesEvaluation
from coordinator.plans.placement import RUNTIME_OF
from coordinator.plans.quantizing import QuantizeStrategy, convert_task
from coordinator.plans.training.auto import AutoStrategy
from coordinator.plans.training.contributions import Contributions
from coordinator.plans.training.federated import Federated
from coordinator.plans.training.fixed import Fixed
from coordinator.plans.training.given import Given
from coordinator.plans.training.local import Local
from coordinator.plans.training.rounds import UpdateRounds
from coordinator.plans.training.state import TrainingState
from coordinator.plans.training.strategy import TrainingStrategy
from coordinator.plans.training.sync import SyncRounds
from coordinator.plans.training.validation import Evaluation
from potluck.wire.jobs import NODE_DATA, Deploy, Evaluate, Predict, Train
from potluck.wire.tasks import EvaluateTask, PredictTask
from potluck.wire.values import BlobRef, Dataset, DataSlice, ImageOptions, ModelFormat, Step


def strategy_for(job: JobSubmitted, dataset: Dataset | None, validation: Dataset | None) -> Strategy | None:
    """The strategy of a job over its data sets; None for the deployment of an unchanged model, which has no shards.

    For a model that is quantized first, the second data set is for calibration.
    """
    spec, model, image = job.spec, job.model, job.image
    if isinstance(spec, Deploy):
        if spec.quantize == "none" or model is None or dataset is None or validation is None:
            return None
        task = convert_task(model, job.model_format, image, validation)
        return QuantizeStrategy(model, job.model_format, image, dataset, task)
    if model is None or dataset is None:
        raise ValueError(f"job {job.job_id} was submitted without its model or data set")
    if isinstance(spec, Train):
        make = None
        if validation is not None:
            held_out, stays = validation, (spec.validation or "").startswith(NODE_DATA)

            def make(weights: BlobRef | None, step: Step | None, epoch: int) -> Evaluation:
                prefix = f"{VALIDATION}{epoch}"
                return _evaluation(model, weights, step, held_out, image, spec.batch_size, prefix, stays)

        return _training(TrainingState.of(Given(spec, model, image, dataset), make))
    if isinstance(spec, Evaluate):
        stays = spec.dataset.startswith(NODE_DATA)
        return _evaluation(model, None, None, dataset, image, spec.batch_size, "evaluate", stays, job.model_format)
    return _prediction(model, dataset, image, spec, job.model_format)


def _training(state: TrainingState) -> Training:
    """The kind of training that is asked for, from this state on."""
    spec = state.given.spec
    if spec.dataset.startswith(NODE_DATA):
        why = "local, since the data stay on the nodes"
        return TrainingStrategy(state, UpdateRounds(state, Federated(state)), why)
    if spec.deterministic:
        found = Contributions()
        return TrainingStrategy(state, UpdateRounds(state, Fixed(state, found), found), "local, deterministic")
    if spec.strategy == "sync":
        return TrainingStrategy(state, SyncRounds(state), "sync")
    local = TrainingStrategy(state, UpdateRounds(state, Local(state)))
    return AutoStrategy(local) if spec.strategy == "auto" else local


def _evaluation(
    model: BlobRef,
    weights: BlobRef | None,
    step: Step | None,
    dataset: Dataset,
    image: ImageOptions | None,
    batch_size: int,
    prefix: str,
    stays: bool,
    model_format: ModelFormat = "keras",
) -> Evaluation:
    """An evaluation. `stays`: the data live on the nodes."""

    def task_for(slices: tuple[DataSlice, ...]) -> EvaluateTask:
        return EvaluateTask(
            model=model,
            weights=weights,
            slices=slices,
            format=dataset.format,
            image=image,
            batch_size=batch_size,
            step=step,
            model_format=model_format,
        )

    if stays:
        return NodesEvaluation(dataset, replace(task_for(()), node_data=dataset.name), prefix)
    runtime = RUNTIME_OF[model_format]
    return BatchStrategy(ItemIndex(dataset.shards), batch_size, task_for, prefix=prefix, runtime=runtime)


def _prediction(
    model: BlobRef, dataset: Dataset, image: ImageOptions | None, spec: Predict, model_format: ModelFormat
) -> BatchStrategy:
    def task_for(slices: tuple[DataSlice, ...]) -> PredictTask:
        return PredictTask(
            model=model,
            slices=slices,
            format=dataset.format,
            image=image,
            batch_size=spec.batch_size,
            model_format=model_format,
        )

    runtime = RUNTIME_OF[model_format]
    return BatchStrategy(ItemIndex(dataset.shards), spec.batch_size, task_for, prefix="predict", runtime=runtime)
