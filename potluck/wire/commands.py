"""What the coordinator tells a node, on `nodes/<id>/inbox`."""

from __future__ import annotations

from potluck.wire.tasks import AnyTask
from potluck.wire.values import BlobRef, Count, Epoch, Message, ModelFormat, Objective, Part, Seconds, Sha256, Tensor


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


class Sealed(Message, frozen=True):
    """A command of a closed cluster: a packed `Seal`, the command's own bytes (msgpack), and the signature over both.

    `potluck.wire.seals` says what is signed and how it is opened. A node of a closed cluster carries out nothing that comes without it.
    """

    seal: bytes
    body: bytes
    signature: bytes


AnyCommand = (
    Sealed | Rebirth | LeaseShard | WithdrawLease | AcknowledgeResult | ForgetJob | LoadModel | UnloadModel | RunInference
    | CancelInference | HoldBlob | ReleaseBlob
)  # fmt: skip
"""Everything that the coordinator tells a node."""
