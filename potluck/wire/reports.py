"""What a node reports to the coordinator, on `nodes/<id>/outbox`."""

from __future__ import annotations

from potluck.wire.tasks import AnyTaskResult
from potluck.wire.values import Count, ErrorInfo, Message, Part, Sha256, Signature, Tensor


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


AnyReport = (
    LeaseTaken | LeaseRefused | LeaseRenewed | ShardFinished | ShardFailed | ModelLoaded | ModelLoadFailed
    | ModelUnloaded | InferenceFinished | BlobsStored | HoldFailed
)  # fmt: skip
"""Everything that a node reports."""
