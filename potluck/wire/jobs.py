"""Jobs: what a user asks for, and what is told of how they go."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from potluck.wire.values import (
    BlobRef,
    Compression,
    Count,
    ImageOptions,
    Name,
    Objective,
    Part,
    Percent,
    Positive,
    Privacy,
    Quantization,
    Seconds,
    Source,
)

NODE_DATA = "node:"
DataName = Annotated[str, Meta(pattern=r"^(node:)?[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")]
"""A registered data set; or with `node:` before its name, data that live on the nodes and stay there."""
Factor = Annotated[float, Meta(ge=0)]
Epochs = Annotated[int, Meta(ge=1, le=1_000_000)]
"""Limited, so that a job's samples can be counted in 64 bits."""
Seed = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Strategy = Literal["auto", "local", "sync"]


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
