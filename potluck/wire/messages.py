"""Every message on the wire: read this first.

A message is a plain map whose `type` is the class name below: commands in the imperative (`LeaseShard`), events in the
past tense (`ShardFinished`). Unknown fields are ignored, new fields have defaults, types never change; the golden files in
`tests/contract/golden` freeze the wire. A message is complete without MQTT 5: `id`, `reply_to` and `expires` are in
the body. An answer has the `id` of its question.

Units: `*_seconds` are seconds, `*_bytes` bytes, `*_at` and `expires` Unix time in seconds.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

PROTOCOL_VERSION = 1
INLINE_LIMIT_BYTES = 256 * 1024
"""Largest message on the bus; larger tensors and files travel as blobs."""
INPUT_BLOB_LIMIT_BYTES = 64 * 2**20
"""Largest blob that can be an input of an inference."""
SHARDS_LIMIT = 500
"""Most shards of a data set: a lease that names them all, with their holders, must fit into a message."""
CLASS_NAMES_LIMIT_BYTES = 112 * 1024
"""Total size of a data set's class names: every lease and listing has them."""

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")]
"""A name that a user gives to a model or data set."""
Alias = Annotated[str, Meta(pattern=r"^(?!latest\Z|v[0-9]+\Z)[A-Za-z][A-Za-z0-9._-]{0,63}\Z")]
"""A name for one version of a model, `prod` in `digits:prod`. It must not look like a version (`3`, `v3`); `latest` is the plain name."""
TagKey = Annotated[str, Meta(min_length=1, max_length=64)]
TagValue = Annotated[str, Meta(max_length=256)]
Source = Annotated[str, Meta(max_length=256)]
NODE_DATA = "node:"
DataName = Annotated[str, Meta(pattern=r"^(node:)?[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")]
"""A registered data set; or with `node:` before its name, data that live on the nodes and stay there."""
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Count = Annotated[int, Meta(ge=0, le=2**53)]
"""At most what JavaScript holds: sums of counts then fit into the 64 bits of msgpack."""
Positive = Annotated[int, Meta(ge=1, le=2**53)]
Seconds = Annotated[float, Meta(ge=0)]
UnixTime = Annotated[float, Meta(ge=0, le=1e11)]
"""0: unknown."""
Epoch = Annotated[int, Meta(ge=0, le=2**53)]
"""The epoch of a coordinator's journal: a higher one is newer."""
Percent = Annotated[int, Meta(ge=0, le=100)]
Factor = Annotated[float, Meta(ge=0)]
Epochs = Annotated[int, Meta(ge=1, le=1_000_000)]
"""Limited, so that a job's samples can be counted in 64 bits."""
Seed = Annotated[int, Meta(ge=0, le=2**32 - 1)]


Objective = Annotated[float, Meta(ge=0, le=3600)]
Priority = Annotated[int, Meta(ge=-10, le=10)]
"""The priority of a request: a higher one comes first."""

Compression = Literal["auto", "none", "int8", "int4"]
Strategy = Literal["auto", "local", "sync"]
Quantization = Literal["none", "int8"]
ModelFormat = Literal["keras", "h5", "savedmodel", "tflite"]
"""The format of a model's blob: a `.keras` or `.h5` file, a tar of a SavedModel folder, or a LiteRT `.tflite` file."""


class Part(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A map inside a message."""


class Message(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="type", tag=True):
    """The fields that every message may have. `expires` 0: never."""

    id: str = ""
    reply_to: str = ""
    expires: UnixTime = 0.0


# --- values ----------------------------------------------------------------------------------------------------------


class BlobRef(Part, frozen=True):
    """Bytes named by their SHA-256, and the base URLs of their holders (`GET <holder>/blobs/<sha256>`)."""

    sha256: Sha256
    size: Count
    holders: tuple[str, ...] = ()


class Tensor(Part, frozen=True):
    """A tensor, named as in the Open Inference Protocol. `data` is bytes (little-endian, C order), a (nested) list, or a blob."""

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
    """The factor that the model's first layers expect for pixels of 0 to 255 (1: they scale pixels themselves); 0: they do not say."""


class ErrorInfo(Part, frozen=True):
    """An error on the wire; `code` is one of those in `potluck.errors`."""

    code: str
    message: str
    retryable: bool = False
    retry_after_seconds: float | None = None


class Gpu(Part, frozen=True):
    name: str
    memory_bytes: Count


class Capacity(Part, frozen=True):
    """What a node has, and its measured speed (`gflops`: float32 matrix product, 0 until measured)."""

    hostname: str
    system: str
    cores: Annotated[int, Meta(ge=1, le=1_000_000)]
    memory_bytes: Count
    gpus: tuple[Gpu, ...] = ()
    runtimes: dict[str, str] = {}
    gflops: Annotated[float, Meta(ge=0, le=1e9)] = 0.0


Side = Annotated[int, Meta(ge=1, le=4096)]
"""Height or width in pixels of an image for a model: with four channels of float32, an image has at most 256 MiB."""


class ImageOptions(Part, frozen=True):
    """How images become tensors: decoded to `channels`, resized bilinearly to height x width, multiplied by `scale`.

    `scale` None: as the model's own layers expect, 1 (pixels 0 to 255) or 1/255 (docs/data.md, "What the model sees").
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
    """How to read the items in a data set's shards.

    `images`, `texts`, `audio`: a WebDataset tar with `<key>.<png|jpg|...>`, `<key>.txt` (UTF-8) or `<key>.wav` (16-bit PCM, at
    `rate` samples a second), and `<key>.cls` (class index as text).
    `arrays`: a safetensors file with one tensor per input name and, if there is a target, one named `target`.
    For a model with several outputs, there is one for each of `targets` instead: the names of the outputs, or
    `y_0`, `y_1`, ... for targets in order. `weight` names a tensor with the weight of each item in the loss.
    """

    kind: Literal["images", "arrays", "texts", "audio"]
    classes: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    target: str = ""
    targets: tuple[str, ...] = ()
    weight: str = ""
    places: tuple[Count, ...] = ()
    """Where these shards number classes differently: their class i is class `places[i]` of `classes`."""
    rate: Count = 0


class Dataset(Part, frozen=True):
    """A data set as the coordinator keeps it. Items are in the order of `shards`; `keys` names each item (a blob of JSON).

    `skipped` names items that could not be used; `remarks` are sentences about other data left out, or about likely mistakes.
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
    """What a node tells of a data set that lives on it: everything except the items."""

    name: Name
    format: DataFormat
    count: Positive


class Privacy(Part, frozen=True):
    """How training on nodes' own data hides single examples, or whole nodes (differential privacy).

    `unit` `example`: the gradient of each example is clipped to the norm `l2_norm_clip`, and normal noise of `noise_multiplier` times
    that norm is added to their sum (DP-SGD, Abadi et al., 2016); `node`: the same happens to each node's update in each round
    (McMahan et al., 2018). `delta` is the delta of (epsilon, delta).
    """

    l2_norm_clip: Annotated[float, Meta(gt=0)]
    noise_multiplier: Annotated[float, Meta(ge=0)] = 0.0
    unit: Literal["example", "node"] = "example"
    delta: Annotated[float, Meta(gt=0, lt=1)] = 1e-5


class Step(Part, frozen=True):
    """Another way to get a round's weights, for a node that has the weights before the round: apply `update` to `base`.

    `update` is a file as in `potluck.weights.updates`; the result is exactly the file of the weights, bit for bit.
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
    """Train `model` on `dataset`; the result is a `.keras` file, registered as `register` if that is given.

    `round_seconds` 0: chosen from measured bandwidth and speed. `compression` is for updates on the network: `auto` uses 4 bits
    per weight, or 8 where the measured error of 4 bits is large. With `overlap`, nodes train on while updates travel.
    `outer_learning_rate` and `outer_momentum` (Nesterov) are for the step with the mean of a round's updates; None: by rule
    (docs/training.md).

    `strategy`: `local` trains in rounds; `sync` takes every step together, with `batch_size` items over all nodes; `auto`
    begins like `local`, and then chooses by measurements. `weights`: begin from a checkpoint of an earlier job
    (`JobEnded.checkpoint`) instead of the model's weights; `initial_epoch` counts on from there, to `epochs` in all. `class_weight`
    weighs the loss by a class's label. `monitor` names a metric of epochs (`val_loss`): the result is the model after the best epoch;
    with `patience`, training ends after this many epochs in a row that were not better by more than `min_delta`.
    `privacy` is for a `dataset` that lives on the nodes.
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
    """Whether a small or a large value is better; `auto`: decided by the metric's name, if that tells."""
    patience: Epochs | None = None
    min_delta: Annotated[float, Meta(ge=0)] = 0.0
    privacy: Privacy | None = None
    deterministic: bool = False
    """Rounds have a fixed number of steps, and parts depend only on their tasks: the same nodes give exactly the same result again."""
    model_name: Source = ""
    """People's name for a model that is a blob: `cnn.keras`. Every kind of job has this."""


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
    """Keep a registered model loaded on `replicas` nodes (0: on every node). Succeeds when all replicas are ready.

    Then the model answers to its plain name. The version that did so before is unloaded (not with `keep`) after `watch_seconds`, when
    its requests are answered. A `canary` answers only this percentage of the requests; a `shadow` gets a copy of each request, and its
    answers are dropped. A version that is worse than the stable one by more than `rollback_factor` in failures or p99 is withdrawn
    (0: never).

    With `max_replicas`, the number follows the load: more while requests wait longer than `queue_seconds`, but never fewer than
    `min_replicas`. After `idle_seconds` without a request all are unloaded, until the next request (0: never).

    With `quantize`, the job makes and deploys `<name>-int8`, a LiteRT model with whole numbers of 8 bits. `calibration` names data
    like the usual inputs (None: the model's training data), and both models are evaluated on `evaluation` (None: on the calibration
    data).
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
    """How long an answer may take: batches are as large as that allows, training gives way, and a request that would take longer is
    refused. 0: no objective."""
    quantize: Quantization = "none"
    calibration: Name | None = None
    evaluation: Name | None = None


AnyJobSpec = Train | Evaluate | Predict | Deploy
JobState = Literal["queued", "running", "succeeded", "failed", "cancelled"]


class EpochMetrics(Part, frozen=True):
    """One epoch of a training job; metrics have Keras' names, those of validation with `val_`.

    `samples` counts from the job's beginning. `computing` is the share of the rounds' time in which nodes computed; the rest
    was exchange of weights. `exchanged_bytes` are those of the updates and steps of the epoch's rounds.
    """

    epoch: int
    metrics: dict[str, float]
    samples: int = 0
    seconds: float = 0.0
    rounds: int = 0
    computing: float = 0.0
    exchanged_bytes: int = 0


class RoundMetrics(Part, frozen=True):
    """One round of a training job: its training metrics with Keras' names, and the outer step that was taken with its updates.

    `samples` are only this round's. `rejected`: nodes whose update was left out, and why.
    """

    round: int
    samples: int
    metrics: dict[str, float]
    outer_learning_rate: float
    outer_momentum: float
    closed_at: float = 0.0
    rejected: dict[str, str] = {}


class JobProgress(Part, frozen=True):
    """What a person wants to see while a job runs. `done` and `total` count items (samples, for training)."""

    done: Count = 0
    total: Count = 0
    epoch: int = 0
    epochs: int = 0
    round: int = 0
    metrics: dict[str, float] = {}
    items_per_second: float = 0.0
    """Speed of all nodes together, including waiting for each other and for transfers."""
    nodes: dict[str, float] = {}
    """Items per second of each working node, while it computes; of very many nodes only the fastest."""
    nodes_more: Count = 0
    """Number of working nodes that are not among `nodes`."""
    message: str = ""
    quarantined: dict[str, str] = {}
    """Nodes that are left out of the job, and why."""
    waiting: dict[str, str] = {}
    """Nodes that do not take part in training yet, or not now, and why."""
    exchanged_bytes: Count = 0
    """Updates and steps sent until now."""
    strategy: str = ""
    """In a training job: what `auto` chose, and the measurements that it used."""
    image: ImageOptions | None = None
    """How images become the model's input; read from the model where the job does not say it."""


class ClassScore(Part, frozen=True):
    label: str
    precision: float
    recall: float
    f1: float
    support: int


class Evaluation(Part, frozen=True):
    """Metrics merged from counts. `confusion[i][j]` is the number of items of class i predicted as j.

    `precision`, `recall` and `f1` are of class 1 where one output tells two classes apart (above `threshold`, as also for the
    confusion matrix and the accuracy); else they are unweighted means over classes, named `macro_...` if the model compiled its own.
    """

    count: int
    metrics: dict[str, float]
    confusion: tuple[tuple[int, ...], ...] = ()
    classes: tuple[ClassScore, ...] = ()
    threshold: float | None = None
    remark: str = ""
    """Remarks that people need to understand the metrics."""


# --- client <-> coordinator ------------------------------------------------------------------------------------------


class SubmitJob(Message, frozen=True):
    """On `jobs/submit`. Answered by `JobAccepted`. The same non-empty `id` and `reply_to` submitted twice is one job."""

    job: AnyJobSpec


class JobAccepted(Message, frozen=True):
    job_id: str


class CancelJob(Message, frozen=True):
    """Answered by `JobChanged` with the job's state then."""

    job_id: str


class StopTraining(Message, frozen=True):
    """End a training job after the current epoch, as if it had been the last. Answered by `JobChanged`."""

    job_id: str


class GetJob(Message, frozen=True):
    """Answered by `JobChanged`, or by `JobEnded` if it has ended."""

    job_id: str


class GetHistory(Message, frozen=True):
    """The epochs of a training job that have ended so far, also while it runs. Answered by `HistoryListed`."""

    job_id: str
    after: Count = 0
    """Only epochs above this number."""


class ListJobs(Message, frozen=True):
    after: str = ""
    """Only jobs submitted after this one; empty, or a job that is no longer known: from the oldest on."""


class JobSubject(Part, frozen=True):
    """What a job is about, with people's names; empty where the job has no such thing."""

    name: str = ""
    """The name for its result: `flowers` as it was asked for, `flowers:3` once it is registered."""
    model: str = ""
    """The model as it was asked for: `name`, `name:version`, or the name of a file."""
    data: str = ""
    """The data set that the job works on."""


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
    """The weights after the last round of a training job, also of a failed or cancelled one."""
    best_epoch: int = 0
    """Where a metric was monitored: the epoch after which `model` was taken."""
    registered: str = ""
    history: tuple[EpochMetrics, ...] = ()
    rounds: tuple[RoundMetrics, ...] = ()
    """The rounds of a training job; of very many, an even selection."""
    evaluation: Evaluation | None = None
    outputs: tuple[Tensor, ...] = ()
    """Predictions for the whole data set in item order; large ones as blobs."""
    classes: tuple[str, ...] = ()
    keys: BlobRef | None = None
    deployment: str = ""
    before: Evaluation | None = None
    """Where a model was converted for deployment: the evaluation of the original on the same data as `evaluation`."""
    evaluated_on: str = ""
    """The data set of both evaluations."""
    subject: JobSubject = JobSubject()
    image: ImageOptions | None = None
    """How images became the model's input."""


class JobsListed(Message, frozen=True):
    """As many as fit into a message, the oldest first. With `more`, ask again `after` the last of them."""

    jobs: tuple[JobChanged, ...]
    more: bool = False


class HistoryListed(Message, frozen=True):
    """The next epochs, as many as fit into a message; empty: no further epoch has ended yet."""

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
    """Data sets that live on the node."""
    gives_way: bool = False
    """Whether the node's jobs stand still, so that inference meets its objective."""
    software: dict[str, str] = {}
    """Versions of its software, as in its birth."""
    data_missing: dict[str, str] = {}
    """Unavailable data sets that its settings name: the reason, by name."""
    left: bool = False
    """Whether it is offline because it was ended in order."""
    clock_ahead_seconds: float = 0.0
    """How far its clock was ahead of the coordinator's when its telemetry came; 0: unknown."""
    shortage: str = ""
    """Why it can store no more blobs, from its telemetry."""
    left_out: str = ""
    """Why it gets no jobs (or nothing at all, if it speaks another version of the protocol); empty: it gets jobs."""


class ListNodes(Message, frozen=True):
    after: str = ""
    """Only nodes with ids after this one; empty: from the first on."""


class NodesListed(Message, frozen=True):
    """As many as fit into a message. With `more`, ask again `after` the last of them."""

    nodes: tuple[NodeInfo, ...]
    sent_at: float = 0.0
    """The time of the answer by the coordinator's clock; 0: unknown."""
    more: bool = False


class AddDataset(Message, frozen=True):
    """Register a data set whose blobs are in the coordinator's store; `manifest` is the blob of a msgpack `Dataset` map."""

    name: Name
    manifest: BlobRef
    packed: bool = False
    """Packed for a job that is submitted next, without a name from a user: removed when the last job that uses it has ended."""


class DatasetInfo(Part, frozen=True):
    name: str
    kind: str
    count: int
    shards: int
    size_bytes: int
    classes: tuple[str, ...] = ()
    skipped: int = 0
    nodes: tuple[str, ...] = ()
    """For data that live on nodes: the nodes that have it."""
    packed: bool = False
    """Packed for a job, and removed with it."""


class DatasetAdded(Message, frozen=True):
    dataset: DatasetInfo


class RemoveDataset(Message, frozen=True):
    """Remove a registered data set; refused with `conflict` while a running job uses it. Answered by `DatasetRemoved`."""

    name: Name


class DatasetRemoved(Message, frozen=True):
    name: str


class ListDatasets(Message, frozen=True):
    after: str = ""
    """Only data sets with names after this one, registered ones before those that live on nodes; empty: from the first on."""


class DatasetsListed(Message, frozen=True):
    """As many as fit into a message. With `more`, ask again `after` the last of them."""

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
    """Where the model came from, for people."""


class ModelInfo(Part, frozen=True):
    """A version of a model. Nothing in it changes, except its tags and aliases, and a signature that is learnt later."""

    name: str
    version: int
    model: BlobRef
    created_at: float
    signature: Signature | None = None
    image: ImageOptions | None = None
    classes: tuple[str, ...] = ()
    rate: Count = 0
    """Samples per second of the recordings that it was trained on; 0 for other data."""
    metrics: dict[str, float] = {}
    job_id: str = ""
    format: ModelFormat = "keras"
    tags: dict[str, str] = {}
    aliases: tuple[str, ...] = ()
    source: str = ""
    """Where the model came from, for people: `job 4be1c06f2a9d`, `imported from model.h5`."""


class ModelRegistered(Message, frozen=True):
    model: ModelInfo


class GetModel(Message, frozen=True):
    """`model` is `name` (the newest version), `name:version` or `name:alias`, here as everywhere. Answered by `ModelRegistered`."""

    model: str


class SetAlias(Message, frozen=True):
    """Let `name:alias` mean the version that `model` is now. Answered by `ModelChanged`."""

    model: str
    alias: Alias


class RemoveAlias(Message, frozen=True):
    """`model` is `name:alias`. Answered by `ModelChanged` with the version that it named."""

    model: str


class TagModel(Message, frozen=True):
    """Set `tags` of a version, and remove tags with keys in `remove`. Answered by `ModelChanged`."""

    model: str
    tags: dict[TagKey, TagValue] = {}
    remove: tuple[str, ...] = ()


class ModelChanged(Message, frozen=True):
    """The new names and tags of a version."""

    model: ModelInfo


class DeleteModel(Message, frozen=True):
    """Delete a version, or with `every_version` all of the name `model`; their numbers are never used again.

    Refused with `conflict` while a deployment, an alias or a running job uses one. Answered by `ModelsDeleted`.
    """

    model: str
    every_version: bool = False


class ModelsDeleted(Message, frozen=True):
    models: tuple[str, ...]
    """Each `name:version`."""


class ListModels(Message, frozen=True):
    after: str = ""
    """Only versions after this `name:version`, by name and version; empty: from the first on."""


class ModelsListed(Message, frozen=True):
    """As many as fit into a message. With `more`, ask again `after` the last of them."""

    models: tuple[ModelInfo, ...]
    more: bool = False


class ReplicaInfo(Part, frozen=True):
    replica_id: str
    node_id: str
    state: Literal["loading", "ready", "failed"]
    error: ErrorInfo | None = None
    warm_rows: int = 0
    """Before it was ready, batches of up to this many rows were run."""


class DeploymentInfo(Part, frozen=True):
    """The state of a deployment. Latencies (of good answers) and `failure_rate` are of the last two minutes."""

    name: str
    """`name:version` of the model."""
    wanted: int
    """Wanted replicas while it gets requests; 0: one on every node."""
    replicas: tuple[ReplicaInfo, ...]
    queued: int = 0
    served: int = 0
    state: Literal["loading", "ready", "failing", "idle", "evicted", "withdrawn", "retired"] = "loading"
    """`idle`, `evicted` and `withdrawn`: no replica until the next request; `retired`: answers the requests that it has, and then goes."""
    role: Literal["", "stable", "canary", "shadow", "previous"] = ""
    """Its role for the model's plain name; "": it answers only to its own name."""
    weight: int = 0
    """Percent of the requests to the plain name that it answers."""
    reason: str = ""
    """Why it is in this state, or has fewer replicas than wanted."""
    resident_bytes: int = 0
    """Measured memory of one replica; 0: not measured yet."""
    min_replicas: int = 0
    max_replicas: int = 0
    objective_seconds: float = 0.0
    queue_seconds: float = 0.0
    """How long a request that comes now is expected to wait for a replica."""
    p50_seconds: float = 0.0
    p99_seconds: float = 0.0
    failure_rate: float = 0.0


class ListDeployments(Message, frozen=True):
    after: str = ""
    """Only deployments with names after this one; empty: from the first on."""
    model: str = ""
    """Only those of this model: `name` (every version), `name:version` or `name:alias`; empty: all."""


class DeploymentsListed(Message, frozen=True):
    """As many as fit into a message. With `more`, ask again `after` the last of them."""

    deployments: tuple[DeploymentInfo, ...]
    more: bool = False


class Undeploy(Message, frozen=True):
    """`model` is `name` (every version), `name:version` or `name:alias`."""

    model: str


class Undeployed(Message, frozen=True):
    deployments: tuple[str, ...]


class Promote(Message, frozen=True):
    """Make the canary (or shadow) of this model the stable version. Answered by `DeploymentsListed` with this model's deployments."""

    model: str


class RollBack(Message, frozen=True):
    """Withdraw the canary or shadow of this model; if it has none, go back to the version before. Answered by `DeploymentsListed`."""

    model: str


class Infer(Message, frozen=True):
    """On `models/<name>/infer` (`name`, `name:version` or `name:alias`). Answered by `Inferred`.

    Waiting requests with a higher `priority` go first. A request that cannot be answered in time is refused at once: in time means
    within `valid_seconds` of receipt, or, where that is 0, until `expires` on the coordinator's clock.
    """

    inputs: tuple[Tensor, ...]
    priority: Priority = 0
    valid_seconds: Seconds = 0.0


class CancelInfer(Message, frozen=True):
    """On the topic of an `Infer`, with its `id` and `reply_to`: nobody waits for its answer any more. The answer is then the error
    `cancelled`, unless another one was already on its way. This message itself is not answered."""


class Inferred(Message, frozen=True):
    model: str
    """`name:version`."""
    outputs: tuple[Tensor, ...]


class FindReplicas(Message, frozen=True):
    """Where to send large inputs of a deployed model, as `POST <address>/inputs`. Answered by `ReplicasFound`."""

    model: str


class ReplicaPlace(Part, frozen=True):
    """A node with a ready replica, and the addresses of its HTTP server."""

    node_id: str
    http: tuple[str, ...]


class ReplicasFound(Message, frozen=True):
    """If there are many nodes: some of them, in no order. Empty while no replica is ready."""

    replicas: tuple[ReplicaPlace, ...] = ()


class ClusterEvent(Part, frozen=True):
    """Something that happened in the cluster, for people and dashboards. `number` counts in the order of what happened; none is given twice.

    `subject`: what it happened to (`job`, `node`, `model`, `dataset`, `deployment`, `coordinator`), `name`: which one, `what`: a word that
    stays the same (docs/protocol.md lists them; there may be others later), `text`: more, for people. The subject `events` tells
    of events themselves: `missed`, where some that were asked for are not kept any more.
    """

    at: UnixTime
    subject: str
    name: str
    what: str
    text: str = ""
    number: Count = 0


class ListEvents(Message, frozen=True):
    """What has happened, as far as it is kept. Answered by `EventsListed`."""

    after: Count = 0
    """What happened after the event of this number; 0: from the oldest that is kept on."""
    last: Count = 0
    """Of those the newest so many; 0: all."""


class FollowEvents(Message, frozen=True):
    """What happens from now on. Answered by one `EventsListed` at once, and then by one whenever something has happened, for `seconds`.

    Whoever wants more asks again in time, with the same `id` and `reply_to`: what was asked before ends then, and it goes on
    `after` the event that is named. With `seconds` 0 it ends, and nothing is answered.
    """

    after: Count | None = None
    """What happened after the event of this number, too; None: nothing of before."""
    seconds: Annotated[float, Meta(ge=0, le=300)] = 30.0


class EventsListed(Message, frozen=True):
    """All `events` after the number `after` and up to `last`, in order. With `more` there are others already: ask (or wait) for those
    after `last`."""

    after: Count
    last: Count
    events: tuple[ClusterEvent, ...] = ()
    more: bool = False


class RequestFailed(Message, frozen=True):
    """The answer to any question that failed."""

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
    """When it came into this state; 0 in a will, which cannot know that."""
    shortage: str = ""
    """Why it can store no more blobs, so that jobs wait: its disk is full; "": it can."""
    cluster_id: str = ""
    """The id of the journal, drawn at random, because two clusters may have the same name. Empty in a will."""
    founded: UnixTime = 0.0
    """When that journal began."""
    empty: bool = False
    """Whether that journal is still empty: no job, no model."""
    others: tuple[str, ...] = ()
    """Brokers (`host:port`) of other coordinators that serve a cluster of the same name on another bus."""


class NodeStatus(Message, frozen=True):
    """Retained on `nodes/<id>/status`. A stale will never kills a live node: its `session` differs."""

    node_id: str
    session: str
    state: Literal["online", "offline"]
    http: tuple[str, ...] = ()
    version: int = PROTOCOL_VERSION
    collective: str = ""
    """`host:port` of its engine for synchronous training; empty where it must not take part."""
    software: dict[str, str] = {}
    """Versions by name: `potluck` and `python` of the daemon, and the runtimes of its engines (`Capacity.runtimes`)."""
    left: bool = False
    """Whether it is offline because it was ended in order; never in a will."""


class NodeCapacity(Message, frozen=True):
    """Retained on `nodes/<id>/capacity`."""

    node_id: str
    capacity: Capacity
    data: tuple[NodeData, ...] = ()
    """Data sets that live on it, and stay there."""
    data_missing: dict[str, str] = {}
    """Unavailable data sets that its settings name: the reason, by name."""


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
    """Whether the engine for replicas runs: its memory is not available any more."""
    gives_way: bool = False
    """Whether the node's jobs stand still, so that inference meets its objective."""
    sent_at: UnixTime = 0.0
    """The time by the node's clock; 0: unknown."""
    coordinator_lost_at: UnixTime = 0.0
    """Since when the node knows no online coordinator; 0: it knows one."""
    shortage: str = ""
    """Why it can store no more blobs: its disk is full; "": it can."""


# --- shards: what one node does ---------------------------------------------------------------------------------------


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


# --- coordinator -> node, on nodes/<id>/inbox -------------------------------------------------------------------------


class LeaseHints(Part, frozen=True):
    """Who has the blobs of a lease, as far as is known at the time of sending. It may be wrong: each blob is checked by its hash.

    `http`: addresses of the coordinator, which has all blobs. `holders`: addresses of nodes, by the last 16 digits of a blob's hash.
    """

    http: tuple[str, ...] = ()
    holders: dict[str, tuple[str, ...]] = {}


class LeaseShard(Message, frozen=True):
    """Do this shard; renew within `lease_seconds`, or another node gets it. Resent until `LeaseTaken` or its result comes.

    All fields but `hints` are its body, which is made once and has the same bytes each time it is sent. The body names the coordinator's
    addresses as holders, for nodes that do not know hints.
    """

    epoch: Epoch
    job_id: str
    shard_id: str
    attempt_id: str
    lease_seconds: Seconds
    task: AnyTask
    hints: LeaseHints = LeaseHints()


class WithdrawLease(Message, frozen=True):
    epoch: Epoch
    attempt_id: str
    reason: str


class AcknowledgeResult(Message, frozen=True):
    """`ShardFinished` or `ShardFailed` of this attempt is in the coordinator's journal; the node stops resending it."""

    attempt_id: str
    epoch: Epoch = 0
    """0: from a coordinator that does not tell its epoch."""


class ForgetJob(Message, frozen=True):
    """The job has ended: the engine may drop what it keeps for the job."""

    job_id: str
    epoch: Epoch = 0


class LoadModel(Message, frozen=True):
    """Become a replica. Resent until `ModelLoaded` or `ModelLoadFailed` comes.

    Before it is ready, every batch size up to `warm_rows` is run once, for at most `warm_seconds`. UINT8 values for an input of float
    images are pixels, and are multiplied by `pixel_scale`; 0: by what the model's layers say, and refused where they do not say it.
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
    """Keep a copy of a registered model's blob for others, until `ReleaseBlob`. Resent until `BlobsStored` or `HoldFailed` names it."""

    epoch: Epoch
    blob: BlobRef


class ReleaseBlob(Message, frozen=True):
    """The node need not keep the blob any more."""

    epoch: Epoch
    sha256: Sha256


class Rebirth(Message, frozen=True):
    """Publish your status and capacity again: the coordinator gets your telemetry, but does not know you."""


class RunInference(Message, frozen=True):
    """A batch for a replica: several requests, run together and answered separately. `id` names the batch."""

    replica_id: str
    requests: tuple[tuple[Tensor, ...], ...]
    objective_seconds: Objective = 0.0
    """How long an answer may take: the node's training gives way when answers take longer."""
    valid_seconds: Seconds = 0.0
    """Counted from receipt, whatever the node's clock says; 0: until `expires`."""


class CancelInference(Message, frozen=True):
    """Nobody waits for the batch with this `id` any more. Requests that have not begun are answered with the error `cancelled`.
    At QoS 0, like the batch."""

    replica_id: str


# --- node -> coordinator, on nodes/<id>/outbox -----------------------------------------------------------------------


class LeaseTaken(Message, frozen=True):
    attempt_id: str


class LeaseRefused(Message, frozen=True):
    attempt_id: str
    error: ErrorInfo


class LeaseRenewed(Message, frozen=True):
    """The node still works on the attempt: `done` items so far, and the metrics until now."""

    attempt_id: str
    done: Count = 0
    metrics: dict[str, float] = {}
    stage: str = ""
    """What it does before the first item, for people: `starting engine (TensorFlow)`, `loading the model`."""
    also: tuple[str, ...] = ()
    """Other attempts that the node holds, and that have no news."""


class ShardFinished(Message, frozen=True):
    attempt_id: str
    result: AnyTaskResult


class ShardFailed(Message, frozen=True):
    attempt_id: str
    error: ErrorInfo


class ModelLoaded(Message, frozen=True):
    """`warm_rows`: all batch sizes up to this one were run; fewer than asked for where time was up or a size is free."""

    replica_id: str
    signature: Signature
    resident_bytes: Count = 0
    warm_rows: Count = 0


class ModelLoadFailed(Message, frozen=True):
    replica_id: str
    error: ErrorInfo


class ModelUnloaded(Message, frozen=True):
    """It was asked for, or the serving engine died: then `error` says why."""

    replica_id: str
    error: ErrorInfo | None = None


class RequestOutcome(Part, frozen=True):
    """The result of one request of a batch: its outputs, or its error."""

    outputs: tuple[Tensor, ...] = ()
    error: ErrorInfo | None = None


class InferenceFinished(Message, frozen=True):
    """`id` is that of `RunInference`; `outcomes` are in the order of its requests. `seconds` is the engine's time."""

    replica_id: str
    outcomes: tuple[RequestOutcome, ...]
    seconds: float = 0.0


class BlobsStored(Message, frozen=True):
    """This node now has these blobs, and serves them to its peers."""

    blobs: tuple[Sha256, ...]


class HoldFailed(Message, frozen=True):
    """This node cannot hold this blob: it could not be fetched, or there is no room."""

    sha256: Sha256
    error: ErrorInfo


AnyMessage = (
    SubmitJob | JobAccepted | CancelJob | StopTraining | GetJob | GetHistory | HistoryListed | ListJobs | JobChanged
    | JobEnded | JobsListed
    | Rebirth | ListNodes | NodesListed | AddDataset | DatasetAdded | RemoveDataset | DatasetRemoved | ListDatasets | DatasetsListed
    | RegisterModel | ModelRegistered | GetModel | ListModels | ModelsListed
    | SetAlias | RemoveAlias | TagModel | ModelChanged | DeleteModel | ModelsDeleted
    | ListDeployments | DeploymentsListed | Undeploy | Undeployed | Promote | RollBack | Infer | CancelInfer | Inferred | RequestFailed
    | FindReplicas | ReplicasFound | ListEvents | FollowEvents | EventsListed
    | CoordinatorStatus | NodeStatus | NodeCapacity | NodeTelemetry
    | LeaseShard | WithdrawLease | AcknowledgeResult | ForgetJob | LoadModel | UnloadModel | RunInference | CancelInference
    | HoldBlob | ReleaseBlob
    | LeaseTaken | LeaseRefused | LeaseRenewed | ShardFinished | ShardFailed
    | ModelLoaded | ModelLoadFailed | ModelUnloaded | InferenceFinished | BlobsStored | HoldFailed
)  # fmt: skip
