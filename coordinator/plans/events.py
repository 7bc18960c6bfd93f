"""What happens to a job, as it stands in the journal: pure.

The journal is read by later versions: an event that is new is a new class, a new field gets a default.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from potluck.wire.jobs import AnyJobSpec, EpochMetrics
from potluck.wire.questions import JobEnded
from potluck.wire.tasks import AnyTask, AnyTaskResult
from potluck.wire.values import BlobRef, ErrorInfo, ImageOptions, ModelFormat


class Event(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="event", tag=True):
    """`at` is Unix time in seconds."""

    at: float


class JobSubmitted(Event, frozen=True):
    """The job with every name resolved: later changes of names do not change its data."""

    job_id: str
    request_id: str
    spec: AnyJobSpec
    model: BlobRef | None = None
    image: ImageOptions | None = None
    dataset: BlobRef | None = None
    validation: BlobRef | None = None
    model_format: ModelFormat = "keras"
    classes: tuple[str, ...] = ()
    """Classes of the model's scores, if it is registered with them."""
    owner: str = ""
    """The identity of who asked for it; "": it was asked for in an open cluster."""


class JobStarted(Event, frozen=True):
    """A job without shards works now; other jobs start with their first lease."""


class AttemptLeased(Event, frozen=True):
    attempt_id: str
    shard_id: str
    node_id: str
    task: AnyTask


class AttemptFinished(Event, frozen=True):
    """The blobs of its result are in the coordinator's store."""

    attempt_id: str
    result: AnyTaskResult


class AttemptEnded(Event, frozen=True):
    """Ended without a result. `error` is set when the node reported one, not when the node or the lease was lost."""

    attempt_id: str
    reason: str
    error: ErrorInfo | None = None


class RoundClosed(Event, frozen=True, kw_only=True):
    """The outer step of a round is taken, and its weights are a checkpoint in the store.

    `step` led there from `base`; `velocity` is the outer optimizer's state; `agreement` says how much the nodes' updates agreed
    (1: all the same). `rejected`: nodes whose update was left out. Synchronous training has its state in `optimizer` instead.
    """

    round: int
    base: BlobRef | None = None
    step: BlobRef | None = None
    weights: BlobRef
    velocity: BlobRef | None = None
    optimizer: BlobRef | None = None
    samples: int
    learning_rate: float = 1.0
    momentum: float = 0.0
    agreement: float = 1.0
    metrics: dict[str, float] = {}
    rejected: dict[str, str] = {}


class EpochEnded(Event, frozen=True):
    epoch: EpochMetrics


class StopAsked(Event, frozen=True):
    """Training must end after the current epoch."""


class StrategyChosen(Event, frozen=True):
    """What `auto` continues with, and why, in words."""

    chosen: Literal["local", "sync"]
    why: str


class RoundPlanned(Event, frozen=True):
    """How rounds share the data from this round on: shards by index, and speed as a share of the whole. `slow`: nodes that are left
    out because they would cost more than they bring, and why."""

    round: int
    assigned: dict[str, tuple[int, ...]] = {}
    shares: dict[str, float] = {}
    slow: dict[str, str] = {}


class MeasureAgain(Event, frozen=True):
    """These nodes have been too slow for long enough: measure them again."""

    nodes: tuple[str, ...]


class RoundBroken(Event, frozen=True):
    """A synchronous round that can no longer have a result."""

    round: int
    reason: str


class StoodStill(Event, frozen=True):
    """A member of a synchronous group stands still for inference, and so do all others."""


class JobFinished(Event, frozen=True):
    result: JobEnded


AnyEvent = (
    JobSubmitted
    | JobStarted
    | AttemptLeased
    | AttemptFinished
    | AttemptEnded
    | RoundClosed
    | EpochEnded
    | StopAsked
    | StrategyChosen
    | RoundPlanned
    | MeasureAgain
    | RoundBroken
    | StoodStill
    | JobFinished
)
OfTraining = (
    RoundClosed | EpochEnded | StopAsked | StrategyChosen | RoundPlanned | MeasureAgain | RoundBroken | StoodStill
)
"""Events that only training has."""
