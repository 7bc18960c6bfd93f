"""Tasks: what one node does for a shard, and the results of that."""

from __future__ import annotations

from msgspec import Struct

from potluck.wire.values import (
    BlobRef,
    Compression,
    Count,
    DataFormat,
    DataShard,
    DataSlice,
    ImageOptions,
    ModelFormat,
    Name,
    Positive,
    Privacy,
    Quantization,
    Seconds,
    Signature,
    Step,
    Tensor,
)


class Task(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind"):
    """Base of the tasks that an engine gets for a shard."""


class TrainTask(Task, frozen=True, tag="train"):
    """One node's part of a round: train on `data` from `weights` until `samples` are seen or `seconds` have passed.

    Between the rounds of a job, the engine keeps the model, the optimizer and its position in the data. `weights` None: the model's own.
    `seen`: the samples that the whole cluster has trained on before this round; a learning rate schedule follows it.
    """

    model: BlobRef
    weights: BlobRef | None
    data: tuple[DataShard, ...]
    format: DataFormat
    image: ImageOptions | None
    round: Count
    samples: Positive
    seconds: Seconds
    batch_size: Positive
    seed: int = 0
    compression: Compression = "auto"
    seen: Count = 0
    class_weight: dict[str, float] = {}
    overlap: bool = False
    """After the result, train on until the next task comes: that counts for the next round."""
    step: Step | None = None
    node_data: Name | None = None
    """Train on all of the data set with this name that lives on the node; `data` is empty."""
    privacy: Privacy | None = None
    part: Count = 0
    parts: Count = 0
    """Above 0: this is part `part` of this many, and its result depends only on this task. The optimizer begins as in the model's
    file, the order of items comes from `seed` and `round`, and `seconds` is no limit."""


class WarmUpTask(Task, frozen=True, tag="warm_up"):
    """Get ready for rounds: start the engine, build the model, load the data, compile a step, and take some steps that change nothing.

    `task` is like the tasks that the node will get then. Nothing waits for this, however long it takes.
    """

    task: TrainTask


class SyncTask(Task, frozen=True, tag="sync"):
    """One member's part of synchronous training: `steps` steps together with all other `members` (`host:port`).

    Of each step's items, `batches[i]` are for member i; this node is member `rank`, and member 0 writes the checkpoint.
    Step s (counted from `first_step`) takes its items at s times their sum, from all of `data` in the order given by `seed`.
    `begins`: form the group, and start from `weights` (None: the model's own) and the optimizer's state in `optimizer`; otherwise,
    the group `formation` continues from where it is.
    """

    model: BlobRef
    data: tuple[DataShard, ...]
    format: DataFormat
    image: ImageOptions | None
    formation: str
    members: tuple[str, ...]
    batches: tuple[Positive, ...]
    rank: Count
    first_step: Count
    steps: Positive
    begins: bool = False
    weights: BlobRef | None = None
    optimizer: BlobRef | None = None
    seed: int = 0
    class_weight: dict[str, float] = {}


class EvaluateTask(Task, frozen=True, tag="evaluate"):
    model: BlobRef
    weights: BlobRef | None
    slices: tuple[DataSlice, ...]
    format: DataFormat
    image: ImageOptions | None
    batch_size: Positive
    step: Step | None = None
    node_data: Name | None = None
    """Evaluate on all of the data set with this name that lives on the node; `slices` is empty."""
    model_format: ModelFormat = "keras"
    """`savedmodel` and `tflite` have no loss: they are scored only by their outputs."""
    by_outputs: bool = False
    """Score a Keras model by its outputs, too."""
    states: dict[str, tuple[float, ...]] = {}
    """The merged counts of all parts of an evaluation. The answer is their `values`; `slices` only shows what items look like."""


class PredictTask(Task, frozen=True, tag="predict"):
    model: BlobRef
    slices: tuple[DataSlice, ...]
    format: DataFormat
    image: ImageOptions | None
    batch_size: Positive
    model_format: ModelFormat = "keras"


class ExportTask(Task, frozen=True, tag="export"):
    """Write `model` with `weights` as a `.keras` file."""

    model: BlobRef
    weights: BlobRef
    step: Step | None = None


class ConvertTask(Task, frozen=True, tag="convert"):
    """Write `model` as a LiteRT model with whole numbers of 8 bits inside and floats outside; `slices` are data like the usual inputs."""

    model: BlobRef
    slices: tuple[DataSlice, ...]
    format: DataFormat
    image: ImageOptions | None
    model_format: ModelFormat = "keras"
    quantize: Quantization = "int8"


AnyTask = TrainTask | EvaluateTask | PredictTask | ExportTask | SyncTask | ConvertTask | WarmUpTask


class TaskResult(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind"):
    """Base of an engine's results. `seconds` is the computing time, without loading.

    `fetched_bytes` is what the node fetched for it, in `fetch_seconds`: that shows the speed of its link. `image` is how images
    became the model's input, complete.
    """

    seconds: float = 0.0
    fetched_bytes: Count = 0
    fetch_seconds: float = 0.0
    image: ImageOptions | None = None


class TrainResult(TaskResult, frozen=True, tag="train"):
    """`base` is a safetensors file of the weights before the round, in the order of `model.weights` (keys `w00000`, ... for
    trained weights, `s00001`, ... for other state), and `update` leads to the weights after it (`potluck.weights.updates`).
    `items` counts the data that the node trained on, however many of them this round has seen.

    `metrics` are sums over `samples` divided by `samples`, with Keras' names. `norm` is that of the update (L2 over all
    trained weights); the coordinator measures it. `seconds_ahead` were computed before the lease began. `trained_bytes` is the size
    of the trained weights as float32; 0: unknown. `momentum` is that of the model's optimizer, where it makes steps longer.
    """

    base: BlobRef
    update: BlobRef
    samples: Count
    steps: Count
    metrics: dict[str, float] = {}
    norm: float = 0.0
    seconds_ahead: float = 0.0
    items: Count = 0
    trained_bytes: Count = 0
    momentum: float = 0.0


class WarmUpResult(TaskResult, frozen=True, tag="warm_up"):
    """Costs of a round here: steps at `rate` items/s, and `beside_seconds` to set weights and to write an update."""

    rate: float
    beside_seconds: Seconds


class SyncResult(TaskResult, frozen=True, tag="sync"):
    """`samples` are only this member's, in all `steps`; `seconds` includes waiting for the others, `rate` (items/s) does not.

    Member 0 adds the checkpoint: `weights` as in training by rounds, and the `optimizer`'s variables (keys `o00000`, ...).
    `step` is another way to get these weights, for a node that has the weights of the round before; given where most of a model is
    not trained. `reduced_bytes` is what all members add up in a step: gradients, and state that steps change; 0: unknown.
    """

    samples: Count
    steps: Count
    metrics: dict[str, float] = {}
    rate: float = 0.0
    weights: BlobRef | None = None
    optimizer: BlobRef | None = None
    reduced_bytes: Count = 0
    step: Step | None = None


class EvaluateResult(TaskResult, frozen=True, tag="evaluate"):
    """Sums and counts, so that results of several nodes merge exactly: `sums[name] / count` is a metric's mean.

    Metrics in `counts` are means over something other than items (over weights, or over time steps): results
    merge as means of `sums[name] / count` weighted by `counts[name]`.

    `states` are the counts of compiled metrics that are not means (AUC, precision), one row each: results merge by adding
    them. `values` are these metrics computed from them. The answer to a task with `states` has only `values`, and a `count` of 0.

    `threshold`: where one output tells two classes apart, an item with an output above it counts as class 1, in all metrics;
    `middle`: the threshold that belongs to the loss.
    """

    count: Count
    sums: dict[str, float] = {}
    confusion: tuple[tuple[int, ...], ...] = ()
    counts: dict[str, float] = {}
    states: dict[str, tuple[float, ...]] = {}
    values: dict[str, float] = {}
    threshold: float | None = None
    middle: float | None = None


class PredictResult(TaskResult, frozen=True, tag="predict"):
    count: Count
    outputs: tuple[Tensor, ...] = ()


class ExportResult(TaskResult, frozen=True, tag="export"):
    model: BlobRef
    signature: Signature


class ConvertResult(TaskResult, frozen=True, tag="convert"):
    """`model` is a `.tflite` file."""

    model: BlobRef


AnyTaskResult = TrainResult | EvaluateResult | PredictResult | ExportResult | SyncResult | ConvertResult | WarmUpResult
