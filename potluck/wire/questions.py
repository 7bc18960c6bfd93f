"""What clients ask the coordinator, and what it answers. Questions go to `coordinator/inbox`, unless their docstrings say otherwise."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from potluck.wire.jobs import AnyJobSpec, EpochMetrics, Evaluation, JobProgress, JobState, RoundMetrics
from potluck.wire.values import (
    BlobRef,
    Capacity,
    Count,
    ErrorInfo,
    ImageOptions,
    Message,
    ModelFormat,
    Name,
    NodeData,
    Part,
    Seconds,
    Signature,
    Source,
    Tensor,
    UnixTime,
)

Alias = Annotated[str, Meta(pattern=r"^(?!latest\Z|v[0-9]+\Z)[A-Za-z][A-Za-z0-9._-]{0,63}\Z")]
"""A name for one version of a model, `prod` in `digits:prod`. It must not look like a version (`3`, `v3`); `latest` is the plain name."""
TagKey = Annotated[str, Meta(min_length=1, max_length=64)]
TagValue = Annotated[str, Meta(max_length=256)]
Priority = Annotated[int, Meta(ge=-10, le=10)]
"""The priority of a request: a higher one comes first."""


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

    `subject`: what it happened to (`job`, `node`, `model`, `dataset`, `deployment`, `coordinator`,
    and in closed clusters `member`, `token`), `name`: which one, `what`: a word that stays the same (docs/protocol.md lists them; there may be others later), `text`: more, for people. The subject `events` tells
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


AnyQuestion = (
    SubmitJob | JobAccepted | CancelJob | StopTraining | GetJob | GetHistory | HistoryListed | ListJobs | JobChanged
    | JobEnded | JobsListed | ListNodes | NodesListed | AddDataset | DatasetAdded | RemoveDataset | DatasetRemoved
    | ListDatasets | DatasetsListed | RegisterModel | ModelRegistered | GetModel | ListModels | ModelsListed
    | SetAlias | RemoveAlias | TagModel | ModelChanged | DeleteModel | ModelsDeleted | ListDeployments
    | DeploymentsListed | Undeploy | Undeployed | Promote | RollBack | Infer | CancelInfer | Inferred | RequestFailed
    | FindReplicas | ReplicasFound | ListEvents | FollowEvents | EventsListed
)  # fmt: skip
"""Every question of a client, and every answer."""
