"""Every message on the wire: read this first.

A message is a plain map whose `type` is the class name below: commands in the imperative (`LeaseShard`), events in the
past tense (`ShardFinished`). Unknown fields are ignored, new fields have defaults, types never change; the golden files in
`tests/contract/golden` freeze the wire. A message is complete without MQTT 5: `id`, `reply_to` and `expires` stand in
the body. An answer carries the `id` of its question.

Units: `*_seconds` are seconds, `*_bytes` bytes, `*_at` and `expires` Unix time in seconds.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

PROTOCOL_VERSION = 1
INLINE_LIMIT_BYTES = 256 * 1024
"""Largest message on the bus; larger tensors and files travel as blobs."""
INPUT_BLOB_LIMIT_BYTES = 64 * 2**20
"""Largest input of an inference that is a blob."""
SHARDS_LIMIT = 500
"""Of a data set: a lease that names them all, with who has each, goes into a message."""
CLASS_NAMES_LIMIT_BYTES = 112 * 1024
"""Of a data set: they go with every lease and into every listing."""

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")]
"""A name that a user gives to a model or data set."""
Alias = Annotated[str, Meta(pattern=r"^(?!latest\Z|v[0-9]+\Z)[A-Za-z][A-Za-z0-9._-]{0,63}\Z")]
"""A name for one version of a model, `prod` in `digits:prod`; it looks like no version (`3`, `v3`), and `latest` is the plain name."""
TagKey = Annotated[str, Meta(min_length=1, max_length=64)]
TagValue = Annotated[str, Meta(max_length=256)]
Source = Annotated[str, Meta(max_length=256)]
NODE_DATA = "node:"
DataName = Annotated[str, Meta(pattern=r"^(node:)?[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")]
"""A registered data set, or with `node:` before its name data that live on the nodes and stay there."""
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Count = Annotated[int, Meta(ge=0, le=2**53)]
"""Up to what JavaScript holds: sums of counts stay within the 64 bits of msgpack."""
Positive = Annotated[int, Meta(ge=1, le=2**53)]
Seconds = Annotated[float, Meta(ge=0)]
UnixTime = Annotated[float, Meta(ge=0, le=1e11)]
"""0: not said."""
Epoch = Annotated[int, Meta(ge=0, le=2**53)]
"""Of a coordinator's journal: the higher one is the newer one."""
Percent = Annotated[int, Meta(ge=0, le=100)]
Factor = Annotated[float, Meta(ge=0)]
Epochs = Annotated[int, Meta(ge=1, le=1_000_000)]
"""With a limit, so that a job's samples can be counted in 64 bits."""
Seed = Annotated[int, Meta(ge=0, le=2**32 - 1)]


Objective = Annotated[float, Meta(ge=0, le=3600)]
Priority = Annotated[int, Meta(ge=-10, le=10)]
"""Of a request; higher ones come first."""

Compression = Literal["auto", "none", "int8", "int4"]
Strategy = Literal["auto", "local", "sync"]
Quantization = Literal["none", "int8"]
ModelFormat = Literal["keras", "h5", "savedmodel", "tflite"]
"""What a model's blob is: a `.keras` or `.h5` file, a tar of a SavedModel folder, or a LiteRT `.tflite` file."""


class Part(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A map inside a message."""


class Message(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="type", tag=True):
    """What every message may carry. `expires` 0 means never."""

    id: str = ""
    reply_to: str = ""
    expires: UnixTime = 0.0


# --- values ----------------------------------------------------------------------------------------------------------


class BlobRef(Part, frozen=True):
    """Bytes named by their SHA-256, and the base URLs of those who hold them (`GET <holder>/blobs/<sha256>`)."""

    sha256: Sha256
    size: Count
    holders: tuple[str, ...] = ()


class Tensor(Part, frozen=True):
    """A tensor as the Open Inference Protocol names it. `data` is bytes (little-endian, C order), a (nested) list, or a blob."""

    name: str
    datatype: str
    shape: tuple[Count, ...]
    data: bytes | list[Any] | BlobRef


class TensorSpec(Part, frozen=True):
    """One input or output of a model; -1 in `shape` is the batch or another free dimension."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class Signature(Part, frozen=True):
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    pixel_scale: float = 0.0
    """What the model's own first layers expect pixels of 0 to 255 to be multiplied by (1: they scale them themselves); 0: they do not say."""


class ErrorInfo(Part, frozen=True):
    """An error on the wire; `code` is one of `potluck.errors`."""

    code: str
    message: str
    retryable: bool = False
    retry_after_seconds: float | None = None


class Gpu(Part, frozen=True):
    name: str
    memory_bytes: Count


class Capacity(Part, frozen=True):
    """What a node has, and how fast that was measured to be (`gflops`: float32 matrix product, 0 until measured)."""

    hostname: str
    system: str
    cores: Annotated[int, Meta(ge=1, le=1_000_000)]
    memory_bytes: Count
    gpus: tuple[Gpu, ...] = ()
    runtimes: dict[str, str] = {}
    gflops: Annotated[float, Meta(ge=0, le=1e9)] = 0.0


Side = Annotated[int, Meta(ge=1, le=4096)]
"""Of an image as a model takes it, in pixels: with four channels of float32 256 MiB at most."""


class ImageOptions(Part, frozen=True):
    """How images become tensors: decoded to `channels`, resized bilinearly to height x width, multiplied by `scale`.

    `scale` None: by what the model's own layers expect, 1 (pixels 0 to 255) or 1/255 (docs/data.md, "What the model sees").
    """

    height: Side
    width: Side
    channels: Literal[1, 3, 4] = 3
    scale: float | None = None


class DataShard(Part, frozen=True):
    """One content-addressed piece of a data set: `count` items, shuffled by class when it was packed."""

    blob: BlobRef
    count: Positive


class DataFormat(Part, frozen=True):
    """How the items of a data set's shards are read.

    `images`, `texts`, `audio`: a WebDataset tar with `<key>.<png|jpg|...>`, `<key>.txt` (UTF-8) or `<key>.wav` (16-bit PCM, at
    `rate` samples a second), and `<key>.cls` (class index as text).
    `arrays`: a safetensors file with one tensor per input name and, when there is a target, one under `target`.
    For a model with several outputs there is one under each name of `targets` instead: the names of the outputs, or
    `y_0`, `y_1`, ... for targets in their order. `weight` names a tensor with the weight of each item in the loss.
    """

    kind: Literal["images", "arrays", "texts", "audio"]
    classes: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    target: str = ""
    targets: tuple[str, ...] = ()
    weight: str = ""
    places: tuple[Count, ...] = ()
    """Where these shards count classes otherwise: their class i is class `places[i]` of `classes`."""
    rate: Count = 0


class Dataset(Part, frozen=True):
    """A data set as the coordinator keeps it. Item order is that of `shards`; `keys` names each item (a blob of JSON).

    `skipped` names items that could not be used; `remarks` are sentences about all else that was left out, or may not be meant.
    """

    name: Name
    format: DataFormat
    count: Count
    shards: tuple[DataShard, ...]
    class_counts: tuple[Count, ...] = ()
    skipped: tuple[str, ...] = ()
    keys: BlobRef | None = None
    remarks: tuple[str, ...] = ()


class NodeData(Part, frozen=True):
    """What a node says of a data set that it holds for itself: everything but the items."""

    name: Name
    format: DataFormat
    count: Positive


class Privacy(Part, frozen=True):
    """What hides single examples, or whole nodes, in training on data of the nodes (differential privacy).

    `unit` `example`: the gradient of each example is cut to the norm `l2_norm_clip`, and normal noise of `noise_multiplier` times that
    is added to their sum (DP-SGD, Abadi et al., 2016); `node`: the same is done to the update of each node in each round
    (McMahan et al., 2018). `delta` is that of (epsilon, delta).
    """

    l2_norm_clip: Annotated[float, Meta(gt=0)]
    noise_multiplier: Annotated[float, Meta(ge=0)] = 0.0
    unit: Literal["example", "node"] = "example"
    delta: Annotated[float, Meta(gt=0, lt=1)] = 1e-5


class Step(Part, frozen=True):
    """Another way to the weights of a round, for who has those of the round before: what `update` makes of `base`.

    `update` is a file as `potluck.weights.updates` describes it; the result is the same to the bit as the file of the weights.
    """

    base: BlobRef
    update: BlobRef


class DataSlice(Part, frozen=True):
    """Items `start` to `stop` (exclusive) of one data shard."""

    blob: BlobRef
    start: Count
    stop: Count


# --- jobs: what a user asks for ---------------------------------------------------------------------------------------


class JobSpec(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind"):
    """Base of the four kinds of job. `model` is a registry name (`digits`, `digits:1`, `digits:prod`) or the blob of a `.keras` file."""


class Train(JobSpec, frozen=True, tag="train"):
    """Train `model` on `dataset`; the result is a `.keras` file, registered as `register` when that is given.

    `round_seconds` 0: as long as measured bandwidth and speed suggest. `compression` is that of updates on the network: `auto`
    takes 4 bits a weight, or 8 where the measured error of 4 is large. With `overlap` nodes train on while updates travel.
    `outer_learning_rate` and `outer_momentum` (Nesterov)
    are those of the step that is taken with the mean of a round's updates; None: by rule (docs/training.md).

    `strategy`: `local` trains in rounds, apart; `sync` takes every step together, with `batch_size` items over all nodes; `auto`
    begins like `local`, and chooses by what was measured. `weights` begins from a checkpoint of an earlier job (`JobEnded.checkpoint`) instead of the model's own, and `initial_epoch`
    counts on from there, to `epochs` in all. `class_weight` weighs the loss by a class's label. `monitor` names a metric of epochs
    (`val_loss`): the result is the model as it was after the best epoch, and with `patience` training ends after so
    many epochs that were not better than that by more than `min_delta`. `privacy` is for a `dataset` that lives on the nodes.
    """

    model: str | BlobRef
    dataset: DataName
    validation: DataName | None = None
    epochs: Epochs = 1
    batch_size: Positive = 32
    image: ImageOptions | None = None
    register: Name | None = None
    strategy: Strategy = "auto"
    round_seconds: Annotated[float, Meta(ge=0, le=86_400)] = 0.0
    seed: Seed = 0
    compression: Compression = "auto"
    overlap: bool = True
    outer_learning_rate: Annotated[float, Meta(gt=0, le=10)] | None = None
    outer_momentum: Annotated[float, Meta(ge=0, lt=1)] | None = None
    weights: BlobRef | None = None
    initial_epoch: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    class_weight: dict[str, Annotated[float, Meta(ge=0)]] = {}
    monitor: str = ""
    monitor_mode: Literal["auto", "min", "max"] = "auto"
    """Whether it is better when it is small or large; `auto`: by its name, where that tells."""
    patience: Epochs | None = None
    min_delta: Annotated[float, Meta(ge=0)] = 0.0
    privacy: Privacy | None = None
    deterministic: bool = False
    """Rounds of a fixed number of steps, parts that depend on nothing but their tasks: the same nodes give the same bits again."""
    model_name: Source = ""
    """What people call a model that is a blob: `cnn.keras`. In each kind of job."""


class Evaluate(JobSpec, frozen=True, tag="evaluate"):
    model: str | BlobRef
    dataset: DataName
    batch_size: Positive = 32
    image: ImageOptions | None = None
    model_name: Source = ""


class Predict(JobSpec, frozen=True, tag="predict"):
    model: str | BlobRef
    dataset: DataName
    batch_size: Positive = 32
    image: ImageOptions | None = None
    model_name: Source = ""


class Deploy(JobSpec, frozen=True, tag="deploy"):
    """Keep a registered model loaded on `replicas` nodes (0: on every node). Succeeds when all are ready.

    Then it answers to the model's plain name, and the version that did so before goes (not with `keep`) after `watch_seconds`, when
    what it was asked is answered. As a `canary` it answers only so many percent of the questions, as a `shadow` it gets
    a copy of each and its answers are thrown away. One that does worse than the stable version by more than `rollback_factor`
    in failures or p99 is withdrawn (0: never).

    With `max_replicas` the number follows the load: more when requests wait for longer than `queue_seconds`, never fewer than
    `min_replicas`. After `idle_seconds` without a request none is held until the next one (0: never so).

    With `quantize` what is deployed is `<name>-int8`, a LiteRT model with whole numbers of 8 bits that this job makes: `calibration`
    names data that show what is usual (None: those that the model was trained on), and both models are evaluated on `evaluation`
    (None: on those again).
    """

    model: str
    replicas: Count = 1
    canary: Percent = 0
    shadow: bool = False
    keep: bool = False
    rollback_factor: Factor = 2.0
    watch_seconds: Seconds = 30.0
    min_replicas: Count = 0
    max_replicas: Count = 0
    queue_seconds: Seconds = 0.2
    idle_seconds: Seconds = 0.0
    objective_seconds: Objective = 0.0
    """How long an answer may take: batches are as large as that allows, training gives way, and what would take longer is refused.
    0: nobody said."""
    quantize: Quantization = "none"
    calibration: Name | None = None
    evaluation: Name | None = None


AnyJobSpec = Train | Evaluate | Predict | Deploy
JobState = Literal["queued", "running", "succeeded", "failed", "cancelled"]


class EpochMetrics(Part, frozen=True):
    """One epoch of a training job; metrics as Keras names them, validation ones with `val_`.

    `samples` counts from the job's beginning. `computing` is the share of the rounds' time in which nodes computed: the rest
    went into exchanging weights. `exchanged_bytes` are those of the updates and steps of its rounds.
    """

    epoch: int
    metrics: dict[str, float]
    samples: int = 0
    seconds: float = 0.0
    rounds: int = 0
    computing: float = 0.0
    exchanged_bytes: int = 0


class RoundMetrics(Part, frozen=True):
    """One round of a training job: metrics in training as Keras names them, and the outer step that was taken with its updates.

    `samples` are this round's own. `rejected`: nodes whose update was left out, and why.
    """

    round: int
    samples: int
    metrics: dict[str, float]
    outer_learning_rate: float
    outer_momentum: float
    closed_at: float = 0.0
    rejected: dict[str, str] = {}


class JobProgress(Part, frozen=True):
    """What a person would want to see while a job runs. `done` and `total` count items (samples, for training)."""

    done: Count = 0
    total: Count = 0
    epoch: int = 0
    epochs: int = 0
    round: int = 0
    metrics: dict[str, float] = {}
    items_per_second: float = 0.0
    """Of all together, with what they wait for each other and for what is sent."""
    nodes: dict[str, float] = {}
    """Items per second of each node at work, while it computes; of very many the fastest."""
    nodes_more: Count = 0
    """Nodes at work that are not among `nodes`."""
    message: str = ""
    quarantined: dict[str, str] = {}
    """Nodes that are left out of the job, and why."""
    waiting: dict[str, str] = {}
    """Nodes that take no part in training yet or for now, and why."""
    exchanged_bytes: Count = 0
    """Of updates and steps, until now."""
    strategy: str = ""
    """Of a training job: what `auto` chose, and the figures that it rests on."""
    image: ImageOptions | None = None
    """How images become the model's input, as the nodes read it from the model where the job does not say it."""


class ClassScore(Part, frozen=True):
    label: str
    precision: float
    recall: float
    f1: float
    support: int


class Evaluation(Part, frozen=True):
    """Metrics merged from counts. `confusion[i][j]` counts items of class i predicted as j.

    `precision`, `recall` and `f1` are those of class 1 where one output tells two classes apart (above `threshold`, as the
    confusion matrix and the accuracy count); else unweighted means over classes, which are named `macro_...` beside compiled ones.
    """

    count: int
    metrics: dict[str, float]
    confusion: tuple[tuple[int, ...], ...] = ()
    classes: tuple[ClassScore, ...] = ()
    threshold: float | None = None
    remark: str = ""
    """What should be known of the figures."""


# --- client <-> coordinator ------------------------------------------------------------------------------------------


class SubmitJob(Message, frozen=True):
    """On `jobs/submit`. Answered by `JobAccepted`. The same non-empty `id` and `reply_to` submitted twice is one job."""

    job: AnyJobSpec


class JobAccepted(Message, frozen=True):
    job_id: str


class CancelJob(Message, frozen=True):
    """Answered by `JobChanged` with the state it is in then."""

    job_id: str


class StopTraining(Message, frozen=True):
    """End a training job after the epoch that is under way, as if it had been the last. Answered by `JobChanged`."""

    job_id: str


class GetJob(Message, frozen=True):
    """Answered by `JobChanged`, or by `JobEnded` when it has ended."""

    job_id: str


class GetHistory(Message, frozen=True):
    """The epochs of a training job that ended so far, also while it runs. Answered by `HistoryListed`."""

    job_id: str
    after: Count = 0
    """Those above this number only."""


class ListJobs(Message, frozen=True):
    after: str = ""
    """Those that were asked for after the job of this id; empty, or of a job that is forgotten: from the oldest on."""


class JobSubject(Part, frozen=True):
    """What a job is about, as people call it; empty where there is no such thing."""

    name: str = ""
    """Under which its result is registered: `flowers` as it was asked for, `flowers:3` when that is done."""
    model: str = ""
    """As it was asked for: `name`, `name:version`, or the name of a file."""
    data: str = ""
    """The data set that it works on."""


class JobChanged(Message, frozen=True):
    """Retained on `jobs/<id>/status`, and in order on `jobs/<id>/events`."""

    job_id: str
    kind: str
    state: JobState
    created_at: float
    started_at: float = 0.0
    ended_at: float = 0.0
    progress: JobProgress = JobProgress()
    error: ErrorInfo | None = None
    subject: JobSubject = JobSubject()


class JobEnded(Message, frozen=True):
    """Retained on `jobs/<id>/result`; which fields are set depends on the kind of job."""

    job_id: str
    kind: str
    state: JobState
    created_at: float
    started_at: float
    ended_at: float
    error: ErrorInfo | None = None
    model: BlobRef | None = None
    checkpoint: BlobRef | None = None
    """Of a training job, also of one that failed or was cancelled: the weights after its last round."""
    best_epoch: int = 0
    """Where a metric was monitored: the epoch that `model` is of."""
    registered: str = ""
    history: tuple[EpochMetrics, ...] = ()
    rounds: tuple[RoundMetrics, ...] = ()
    """Of a training job, evenly thinned where there were very many."""
    evaluation: Evaluation | None = None
    outputs: tuple[Tensor, ...] = ()
    """Predictions of the whole data set in item order; large ones as blobs."""
    classes: tuple[str, ...] = ()
    keys: BlobRef | None = None
    deployment: str = ""
    before: Evaluation | None = None
    """Where a model was converted to be deployed: how the original does on what `evaluation` is of."""
    evaluated_on: str = ""
    """The data set of both."""
    subject: JobSubject = JobSubject()
    image: ImageOptions | None = None
    """How images became the model's input."""


class JobsListed(Message, frozen=True):
    """As many as go into a message, the oldest first. With `more`, ask again `after` the last of them."""

    jobs: tuple[JobChanged, ...]
    more: bool = False


class HistoryListed(Message, frozen=True):
    """The next epochs, as many as fit into a message; with none there is none yet."""

    job_id: str
    epochs: tuple[EpochMetrics, ...] = ()


class NodeInfo(Part, frozen=True):
    node_id: str
    state: Literal["online", "suspect", "offline"]
    capacity: Capacity
    http: tuple[str, ...] = ()
    cpu_percent: float = 0.0
    memory_used_bytes: Count = 0
    leases: Count = 0
    replicas: tuple[str, ...] = ()
    seen_at: float = 0.0
    data: tuple[NodeData, ...] = ()
    """Data sets that live on it."""
    gives_way: bool = False
    """Whether jobs stand still on it while inference has an objective to keep."""
    software: dict[str, str] = {}
    """Versions of what it runs, as in its birth."""
    data_missing: dict[str, str] = {}
    """Data sets that its settings name and that cannot be had: why, by name."""
    left: bool = False
    """Whether it is offline because it was ended in order."""
    clock_ahead_seconds: float = 0.0
    """How far its clock is ahead of the coordinator's, as its telemetry came; 0 where it did not say."""
    shortage: str = ""
    """Why it can take no more blobs, as its telemetry says."""
    left_out: str = ""
    """Why it gets no jobs (or nothing at all, where it speaks another version of the protocol); empty: it does."""


class ListNodes(Message, frozen=True):
    after: str = ""
    """Those whose ids come after this one; empty: from the first on."""


class NodesListed(Message, frozen=True):
    """As many as go into a message. With `more`, ask again `after` the last of them."""

    nodes: tuple[NodeInfo, ...]
    sent_at: float = 0.0
    """By the coordinator's clock; 0: it does not say."""
    more: bool = False


class AddDataset(Message, frozen=True):
    """Register a data set whose blobs the coordinator's store holds; `manifest` is the blob of a msgpack `Dataset` map."""

    name: Name
    manifest: BlobRef
    packed: bool = False
    """Packed for a job that is asked for next, and named by nobody: it is forgotten when the last job that uses it has ended."""


class DatasetInfo(Part, frozen=True):
    name: str
    kind: str
    count: int
    shards: int
    size_bytes: int
    classes: tuple[str, ...] = ()
    skipped: int = 0
    nodes: tuple[str, ...] = ()
    """Those that hold it, of data that live on nodes."""
    packed: bool = False
    """Packed for a job, and forgotten with it."""


class DatasetAdded(Message, frozen=True):
    dataset: DatasetInfo


class RemoveDataset(Message, frozen=True):
    """Forget a registered data set; refused with `conflict` while a job under way uses it. Answered by `DatasetRemoved`."""

    name: Name


class DatasetRemoved(Message, frozen=True):
    name: str


class ListDatasets(Message, frozen=True):
    after: str = ""
    """Those whose names come after this one, registered ones before those that live on nodes; empty: from the first on."""


class DatasetsListed(Message, frozen=True):
    """As many as go into a message. With `more`, ask again `after` the last of them."""

    datasets: tuple[DatasetInfo, ...]
    more: bool = False


class RegisterModel(Message, frozen=True):
    """Register a blob as the next version of `name`; the same bytes registered twice keep their version."""

    name: Name
    model: BlobRef
    format: ModelFormat = "keras"
    image: ImageOptions | None = None
    classes: tuple[str, ...] = ()
    tags: dict[TagKey, TagValue] = {}
    source: Source = ""
    """Where it came from, for people."""


class ModelInfo(Part, frozen=True):
    """A version of a model. Nothing of it ever changes but its tags and aliases, and a signature that is learnt later."""

    name: str
    version: int
    model: BlobRef
    created_at: float
    signature: Signature | None = None
    image: ImageOptions | None = None
    classes: tuple[str, ...] = ()
    rate: Count = 0
    """Samples a second of the recordings that it was trained on; 0 for other data."""
    metrics: dict[str, float] = {}
    job_id: str = ""
    format: ModelFormat = "keras"
    tags: dict[str, str] = {}
    aliases: tuple[str, ...] = ()
    source: str = ""
    """Where it came from, for people: `job 4be1c06f2a9d`, `imported from model.h5`."""


class ModelRegistered(Message, frozen=True):
    model: ModelInfo


class GetModel(Message, frozen=True):
    """`model` is `name` (the newest version), `name:version` or `name:alias`, here as everywhere. Answered by `ModelRegistered`."""

    model: str


class SetAlias(Message, frozen=True):
    """From now on `name:alias` is the version that `model` is now. Answered by `ModelChanged`."""

    model: str
    alias: Alias


class RemoveAlias(Message, frozen=True):
    """`model` is `name:alias`. Answered by `ModelChanged` with the version that it was."""

    model: str


class TagModel(Message, frozen=True):
    """Set `tags` of a version, and take away those whose keys are in `remove`. Answered by `ModelChanged`."""

    model: str
    tags: dict[TagKey, TagValue] = {}
    remove: tuple[str, ...] = ()


class ModelChanged(Message, frozen=True):
    """What people call a version, or say of it, is now so."""

    model: ModelInfo


class DeleteModel(Message, frozen=True):
    """Delete a version, or with `every_version` all of the name `model`; their numbers are never given again.

    Refused with `conflict` while a deployment, an alias or a job under way uses one. Answered by `ModelsDeleted`.
    """

    model: str
    every_version: bool = False


class ModelsDeleted(Message, frozen=True):
    models: tuple[str, ...]
    """Each `name:version`."""


class ListModels(Message, frozen=True):
    after: str = ""
    """Those that come after this `name:version`, by name and version; empty: from the first on."""


class ModelsListed(Message, frozen=True):
    """As many as go into a message. With `more`, ask again `after` the last of them."""

    models: tuple[ModelInfo, ...]
    more: bool = False


class ReplicaInfo(Part, frozen=True):
    replica_id: str
    node_id: str
    state: Literal["loading", "ready", "failed"]
    error: ErrorInfo | None = None
    warm_rows: int = 0
    """Batches of up to so many rows were run before it was ready."""


class DeploymentInfo(Part, frozen=True):
    """What became of a deployment. Latencies (of good answers) and `failure_rate` are those of the last two minutes."""

    name: str
    """`name:version` of the model."""
    wanted: int
    """Replicas while it is asked; 0: one on every node."""
    replicas: tuple[ReplicaInfo, ...]
    queued: int = 0
    served: int = 0
    state: Literal["loading", "ready", "failing", "idle", "evicted", "withdrawn", "retired"] = "loading"
    """`idle`, `evicted` and `withdrawn` ones hold no replica until they are asked; a `retired` one answers what it has, and goes."""
    role: Literal["", "stable", "canary", "shadow", "previous"] = ""
    """What it is to the model's plain name; "": it is asked by its own name alone."""
    weight: int = 0
    """Percent of the plain name's questions that it answers."""
    reason: str = ""
    """Why it is in this state, or has fewer replicas than wanted."""
    resident_bytes: int = 0
    """Memory that a replica takes, as measured; 0: not yet."""
    min_replicas: int = 0
    max_replicas: int = 0
    objective_seconds: float = 0.0
    queue_seconds: float = 0.0
    """How long a request that comes now waits for a replica, as expected."""
    p50_seconds: float = 0.0
    p99_seconds: float = 0.0
    failure_rate: float = 0.0


class ListDeployments(Message, frozen=True):
    after: str = ""
    """Those whose names come after this one; empty: from the first on."""


class DeploymentsListed(Message, frozen=True):
    """As many as go into a message. With `more`, ask again `after` the last of them."""

    deployments: tuple[DeploymentInfo, ...]
    more: bool = False


class Undeploy(Message, frozen=True):
    """`model` is `name` (every version), `name:version` or `name:alias`."""

    model: str


class Undeployed(Message, frozen=True):
    deployments: tuple[str, ...]


class Promote(Message, frozen=True):
    """Make the canary (or shadow) of this model the stable version. Answered by `DeploymentsListed`, of this model."""

    model: str


class RollBack(Message, frozen=True):
    """Withdraw the canary or shadow of this model, or else go back to the version before. Answered by `DeploymentsListed`."""

    model: str


class Infer(Message, frozen=True):
    """On `models/<name>/infer` (`name`, `name:version` or `name:alias`). Answered by `Inferred`.

    Of the requests that wait, those of a higher `priority` go first; one that cannot be answered in time is refused at once: within
    `valid_seconds` of its receipt, or, where that is 0, by `expires` on the coordinator's clock.
    """

    inputs: tuple[Tensor, ...]
    priority: Priority = 0
    valid_seconds: Seconds = 0.0


class CancelInfer(Message, frozen=True):
    """On the topic of an `Infer`, with its `id` and `reply_to`: nobody waits for its answer any more, which is the error `cancelled`
    then, unless it was on its way. Not answered itself."""


class Inferred(Message, frozen=True):
    model: str
    """`name:version`."""
    outputs: tuple[Tensor, ...]


class FindReplicas(Message, frozen=True):
    """Where large inputs of a deployed model can be sent, as `POST <address>/inputs`. Answered by `ReplicasFound`."""

    model: str


class ReplicaPlace(Part, frozen=True):
    """A node with a replica that is ready, and the addresses of its HTTP server."""

    node_id: str
    http: tuple[str, ...]


class ReplicasFound(Message, frozen=True):
    """Some of the nodes, in no order, where there are many; none while no replica is ready."""

    replicas: tuple[ReplicaPlace, ...] = ()


class RequestFailed(Message, frozen=True):
    """The answer to any question that could not be answered otherwise."""

    error: ErrorInfo


# --- retained births and wills ----------------------------------------------------------------------------------------


class CoordinatorStatus(Message, frozen=True):
    """Retained on `coordinator/status`; the will carries the same `session` and state `offline`."""

    session: str
    epoch: Epoch
    state: Literal["online", "offline"]
    http: tuple[str, ...] = ()
    version: int = PROTOCOL_VERSION
    software: dict[str, str] = {}
    """Versions of `potluck` and `python`, by name."""
    since: UnixTime = 0.0
    """When it came into this state; 0 in a will, which cannot know."""
    shortage: str = ""
    """Why it can take no more blobs, and jobs wait: its disk is full; "": it can."""
    cluster_id: str = ""
    """Of the journal: a cluster's name may be given twice, this is drawn by lot. Empty in a will."""
    founded: UnixTime = 0.0
    """When that journal was begun."""
    empty: bool = False
    """Whether nothing was kept in it yet: no job, no model."""
    others: tuple[str, ...] = ()
    """Where other coordinators serve a cluster of this name on another bus, as `host:port` of their brokers."""


class NodeStatus(Message, frozen=True):
    """Retained on `nodes/<id>/status`. A stale will never kills a live node: its `session` differs."""

    node_id: str
    session: str
    state: Literal["online", "offline"]
    http: tuple[str, ...] = ()
    version: int = PROTOCOL_VERSION
    collective: str = ""
    """`host:port` at which its engine takes part in synchronous training; empty where it may not."""
    software: dict[str, str] = {}
    """Versions by name: `potluck` and `python` of the daemon, and of the runtimes that its engines have (`Capacity.runtimes`)."""
    left: bool = False
    """Whether it is offline because it was ended in order; never in a will."""


class NodeCapacity(Message, frozen=True):
    """Retained on `nodes/<id>/capacity`."""

    node_id: str
    capacity: Capacity
    data: tuple[NodeData, ...] = ()
    """Data sets that live on it, and stay there."""
    data_missing: dict[str, str] = {}
    """Data sets that its settings name and that cannot be had: why, by name."""


class NodeTelemetry(Message, frozen=True):
    """JSON, QoS 0, on `nodes/<id>/telemetry`, every few seconds."""

    node_id: str
    session: str
    cpu_percent: Annotated[float, Meta(ge=0, le=1e6)]
    memory_used_bytes: Count
    memory_available_bytes: Count
    attempts: tuple[str, ...] = ()
    replicas: tuple[str, ...] = ()
    gpu_percent: tuple[float, ...] = ()
    serving: bool = False
    """Whether the engine for replicas runs: what it takes is not available any more."""
    gives_way: bool = False
    """Whether jobs stand still on it while inference has an objective to keep."""
    sent_at: UnixTime = 0.0
    """By the node's clock; 0: it does not say."""
    coordinator_lost_at: UnixTime = 0.0
    """Since when the node knows of no coordinator that is online; 0: there is one."""
    shortage: str = ""
    """Why it can take no more blobs: its disk is full; "": it can."""


# --- shards: what one node does ---------------------------------------------------------------------------------------


class Task(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind"):
    """Base of what an engine is asked to do for a shard."""


class TrainTask(Task, frozen=True, tag="train"):
    """One node's part of a round: train on `data` from `weights` until `samples` are seen or `seconds` are over.

    The engine keeps model, optimizer and position in the data between the rounds of a job. `weights` None: the model's own.
    `seen` counts the samples that the whole cluster has trained on before this round: a schedule of the learning rate follows it.
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
    """After the result, go on with what comes next until the next task: it counts for the next round."""
    step: Step | None = None
    node_data: Name | None = None
    """Train on the data set that the node holds by this name, all of it; `data` is empty."""
    privacy: Privacy | None = None
    part: Count = 0
    parts: Count = 0
    """Above 0: this is part `part` of so many, and its result depends on nothing but this task: the optimizer begins as in the model's
    file, and the order of items with `seed` and `round`; `seconds` is no limit."""


class WarmUpTask(Task, frozen=True, tag="warm_up"):
    """Get ready for rounds: start the engine, build the model, load the data, compile a step, and take some that change nothing.

    `task` is such as the node will be given then. Nothing waits for it, however long that takes.
    """

    task: TrainTask


class SyncTask(Task, frozen=True, tag="sync"):
    """One member's part of synchronous training: `steps` steps together with all other `members` (`host:port`).

    Of each step's items, `batches[i]` are those of member i; this node is member `rank`, and member 0 writes the checkpoint.
    Step s (counted from `first_step`) takes the items from s times their sum on, of all of `data` in the order that `seed` gives.
    `begins`: form the group and start from `weights` (None: the model's own) and the state of the optimizer in `optimizer`; else
    the group `formation` goes on from where it is.
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
    """Evaluate on all of the data set that the node holds by this name; `slices` is empty."""
    model_format: ModelFormat = "keras"
    """`savedmodel` and `tflite` have no loss: they are scored by their outputs alone."""
    by_outputs: bool = False
    """Score a Keras model so, too."""
    states: dict[str, tuple[float, ...]] = {}
    """What all parts of an evaluation have counted: the answer is the `values` of that, and `slices` only shows what items look like."""


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
    """Write `model` as a LiteRT model with whole numbers of 8 bits inside and floats outside; `slices` show what is usual."""

    model: BlobRef
    slices: tuple[DataSlice, ...]
    format: DataFormat
    image: ImageOptions | None
    model_format: ModelFormat = "keras"
    quantize: Quantization = "int8"


AnyTask = TrainTask | EvaluateTask | PredictTask | ExportTask | SyncTask | ConvertTask | WarmUpTask


class TaskResult(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind"):
    """Base of what an engine answers. `seconds` is the time computing, without loading.

    `fetched_bytes` is what the node fetched for it, in `fetch_seconds`: so much its link has shown to carry. `image` is how images
    became the model's input, all of it said.
    """

    seconds: float = 0.0
    fetched_bytes: Count = 0
    fetch_seconds: float = 0.0
    image: ImageOptions | None = None


class TrainResult(TaskResult, frozen=True, tag="train"):
    """`base` is a safetensors file of the weights before the round, in the order of `model.weights` (keys `w00000`, ... for
    those that are trained, `s00001`, ... for other state), and `update` leads to those after it (`potluck.weights.updates`).
    `items` are those of the data that it was trained on, however many of them this round has seen.

    `metrics` are sums over `samples` divided by `samples`, named as Keras names them. `norm` is that of the update (L2, of
    all weights that are trained), which the coordinator measures. `seconds_ahead` were computed before the lease began. `trained_bytes`
    are those of the trained weights as float32; 0: nobody says. `momentum` is that of the model's optimizer, where it makes steps longer.
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
    """What a round will cost here: steps at `rate` items/s, and `beside_seconds` to set weights and to write an update."""

    rate: float
    beside_seconds: Seconds


class SyncResult(TaskResult, frozen=True, tag="sync"):
    """`samples` are this member's own, of all `steps`; `seconds` includes waiting for the others, `rate` (items/s) does not.

    Member 0 adds the checkpoint: `weights` as in training by rounds, and the `optimizer`'s variables (keys `o00000`, ...).
    `step` is another way to these weights, for who has those of the round before: it is there where most of a model is not trained.
    `reduced_bytes` are those that all members add up in a step: gradients, and the state that steps change; 0: nobody says.
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
    """Sums and counts, so that results of several nodes merge exactly: `sums[name] / count` is a mean metric.

    Metrics in `counts` are means over something else than items (by their weights, or over steps of time): results
    merge as means of `sums[name] / count` weighted by `counts[name]`.

    `states` are what compiled metrics that are no means (AUC, precision) have counted, in one row each: results merge by adding
    them. `values` is what these metrics make of it. The answer to a task with `states` has those alone, and a `count` of 0.

    `threshold`: of two classes that one output tells apart, the output above which an item counts as of class 1, for all that is told of
    them; `middle`: where the loss has it.
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


# --- coordinator -> node, on nodes/<id>/inbox -------------------------------------------------------------------------


class LeaseShard(Message, frozen=True):
    """Do this shard; renew within `lease_seconds`, or it is given to another. Resent until `LeaseTaken` or its result comes."""

    epoch: Epoch
    job_id: str
    shard_id: str
    attempt_id: str
    lease_seconds: Seconds
    task: AnyTask


class WithdrawLease(Message, frozen=True):
    epoch: Epoch
    attempt_id: str
    reason: str


class AcknowledgeResult(Message, frozen=True):
    """The coordinator has `ShardFinished` or `ShardFailed` of this attempt in its journal; the node stops resending."""

    attempt_id: str
    epoch: Epoch = 0
    """0: of a coordinator that does not say."""


class ForgetJob(Message, frozen=True):
    """The job has ended: the engine may drop what it keeps for it."""

    job_id: str
    epoch: Epoch = 0


class LoadModel(Message, frozen=True):
    """Become a replica. Resent until `ModelLoaded` or `ModelLoadFailed` comes.

    Before it is loaded, every batch size up to `warm_rows` is run once, for `warm_seconds` at most. Whole numbers of 8 bits (UINT8) for an
    input of images in floats are pixels, and multiplied by `pixel_scale`; 0: by what the model's layers say, and refused where they do not.
    """

    epoch: Epoch
    replica_id: str
    name: str
    model: BlobRef
    format: ModelFormat = "keras"
    warm_rows: Count = 64
    warm_seconds: Seconds = 20.0
    pixel_scale: float = 1.0


class UnloadModel(Message, frozen=True):
    epoch: Epoch
    replica_id: str


class HoldBlob(Message, frozen=True):
    """Keep a copy of a registered model's blob for others, until `ReleaseBlob`. Resent until `BlobsStored` names it or `HoldFailed` comes."""

    epoch: Epoch
    blob: BlobRef


class ReleaseBlob(Message, frozen=True):
    """The blob need not be held any more."""

    epoch: Epoch
    sha256: Sha256


class Rebirth(Message, frozen=True):
    """Publish your status and capacity again: the coordinator hears your telemetry, and does not know you."""


class RunInference(Message, frozen=True):
    """A batch for a replica: several requests, run together and answered apart. `id` names the batch."""

    replica_id: str
    requests: tuple[tuple[Tensor, ...], ...]
    objective_seconds: Objective = 0.0
    """How long an answer may take: the node's training gives way when it takes longer."""
    valid_seconds: Seconds = 0.0
    """From its receipt on, whatever the node's clock says; 0: until `expires`."""


class CancelInference(Message, frozen=True):
    """Nobody waits for the batch of this `id` any more. What has not begun is answered with the error `cancelled`. At QoS 0, like
    the batch."""

    replica_id: str


# --- node -> coordinator, on nodes/<id>/outbox -----------------------------------------------------------------------


class LeaseTaken(Message, frozen=True):
    attempt_id: str


class LeaseRefused(Message, frozen=True):
    attempt_id: str
    error: ErrorInfo


class LeaseRenewed(Message, frozen=True):
    """Still at it: `done` items so far of this attempt, and the metrics until now."""

    attempt_id: str
    done: Count = 0
    metrics: dict[str, float] = {}
    stage: str = ""
    """For people, before the first item: `starting engine (TensorFlow)`, `loading the model`."""
    also: tuple[str, ...] = ()
    """Other attempts that the node holds, and of which there is nothing else to say."""


class ShardFinished(Message, frozen=True):
    attempt_id: str
    result: AnyTaskResult


class ShardFailed(Message, frozen=True):
    attempt_id: str
    error: ErrorInfo


class ModelLoaded(Message, frozen=True):
    """`warm_rows`: the largest batch up to which all sizes were run; fewer than asked for where time was up or a size is free."""

    replica_id: str
    signature: Signature
    resident_bytes: Count = 0
    warm_rows: Count = 0


class ModelLoadFailed(Message, frozen=True):
    replica_id: str
    error: ErrorInfo


class ModelUnloaded(Message, frozen=True):
    """Asked for, or the serving engine died: `error` says why in that case."""

    replica_id: str
    error: ErrorInfo | None = None


class RequestOutcome(Part, frozen=True):
    """What became of one request of a batch: its outputs, or its error."""

    outputs: tuple[Tensor, ...] = ()
    error: ErrorInfo | None = None


class InferenceFinished(Message, frozen=True):
    """`id` is that of `RunInference`; `outcomes` in the order of its requests. `seconds` is the engine's time."""

    replica_id: str
    outcomes: tuple[RequestOutcome, ...]
    seconds: float = 0.0


class BlobsStored(Message, frozen=True):
    """This node now holds these blobs and serves them to its peers."""

    blobs: tuple[Sha256, ...]


class HoldFailed(Message, frozen=True):
    """This node cannot hold this blob: it cannot be fetched, or there is no room."""

    sha256: Sha256
    error: ErrorInfo


AnyMessage = (
    SubmitJob | JobAccepted | CancelJob | StopTraining | GetJob | GetHistory | HistoryListed | ListJobs | JobChanged
    | JobEnded | JobsListed
    | Rebirth | ListNodes | NodesListed | AddDataset | DatasetAdded | RemoveDataset | DatasetRemoved | ListDatasets | DatasetsListed
    | RegisterModel | ModelRegistered | GetModel | ListModels | ModelsListed
    | SetAlias | RemoveAlias | TagModel | ModelChanged | DeleteModel | ModelsDeleted
    | ListDeployments | DeploymentsListed | Undeploy | Undeployed | Promote | RollBack | Infer | CancelInfer | Inferred | RequestFailed
    | FindReplicas | ReplicasFound
    | CoordinatorStatus | NodeStatus | NodeCapacity | NodeTelemetry
    | LeaseShard | WithdrawLease | AcknowledgeResult | ForgetJob | LoadModel | UnloadModel | RunInference | CancelInference
    | HoldBlob | ReleaseBlob
    | LeaseTaken | LeaseRefused | LeaseRenewed | ShardFinished | ShardFailed
    | ModelLoaded | ModelLoadFailed | ModelUnloaded | InferenceFinished | BlobsStored | HoldFailed
)  # fmt: skip
