"""What a node and its engine say to each other: 4 bytes of length (big-endian), then a msgpack map.

The bytes are those of `codec.pack`, but made and read by msgspec's own msgpack: 1 us a frame instead of 16, where one
inference takes 400 in all, and no second copy of large tensors.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec
from msgspec import Struct

from potluck.errors import BadMessage, TooLarge
from potluck.wire.reports import RequestOutcome
from potluck.wire.tasks import AnyTask, AnyTaskResult
from potluck.wire.values import BlobRef, ErrorInfo, ModelFormat, Signature, Tensor

FRAME_LIMIT_BYTES = 256 * 2**20
LENGTH = struct.Struct(">I")


class Frame(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="frame", tag=True):
    """`number` ties an answer to its question; 0: no question was asked."""

    number: int = 0


class RunTask(Frame, frozen=True):
    """`files`: a local path for every blob that the task names, by SHA-256."""

    job_id: str
    task: AnyTask
    files: dict[str, str]


class CancelTask(Frame, frozen=True):
    pass


class DropJob(Frame, frozen=True):
    job_id: str


class ApplyStep(Frame, frozen=True):
    """Apply the update at `update` to the weights at `weights`, and write the new weights; answered by `StepApplied`."""

    weights: str
    update: str


class StepApplied(Frame, frozen=True):
    weights: BlobRef
    """In the scratch folder, named by its hash."""


class LoadReplica(Frame, frozen=True):
    replica_id: str
    path: str
    format: ModelFormat = "keras"
    warm_rows: int = 64
    warm_seconds: float = 20.0
    pixel_scale: float = 1.0


class UnloadReplica(Frame, frozen=True):
    replica_id: str


class RunBatch(Frame, frozen=True):
    """`expires` 0 means never. `files`: a local path for every blob among the tensors, by SHA-256."""

    replica_id: str
    requests: tuple[tuple[Tensor, ...], ...]
    expires: float = 0.0
    files: dict[str, str] = {}


class CancelBatch(Frame, frozen=True):
    """The `RunBatch` of this number need not be computed. It still gets an answer."""


class Pause(Frame, frozen=True):
    """Tasks stand still from their next step or batch on, until `Resume`."""


class Resume(Frame, frozen=True):
    pass


class Started(Frame, frozen=True):
    runtimes: dict[str, str]
    gpus: tuple[str, ...] = ()
    sandbox: tuple[str, ...] = ()
    """What the engine is kept from: of `files`, `network` and `calls`."""
    unconfined: tuple[str, ...] = ()
    """What it is not kept from although that was asked for, with the reasons."""


class Heartbeat(Frame, frozen=True):
    pass


class TaskProgressed(Frame, frozen=True):
    done: int
    metrics: dict[str, float] = {}


class TaskDone(Frame, frozen=True):
    result: AnyTaskResult


class ReplicaLoaded(Frame, frozen=True):
    signature: Signature
    resident_bytes: int
    warm_rows: int = 0
    runtime: str = ""
    """The name of the runtime that holds the replica. Runtimes compute their batches side by side."""


class Done(Frame, frozen=True):
    pass


class BatchRun(Frame, frozen=True):
    outcomes: tuple[RequestOutcome, ...]
    seconds: float


class Failed(Frame, frozen=True):
    error: ErrorInfo


ToEngine = (
    RunTask | CancelTask | DropJob | ApplyStep | LoadReplica | UnloadReplica | RunBatch | CancelBatch | Pause | Resume
)
FromEngine = Started | Heartbeat | TaskProgressed | TaskDone | StepApplied | ReplicaLoaded | Done | BatchRun | Failed


_ENCODER = msgspec.msgpack.Encoder()
_TO_ENGINE: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ToEngine)
_FROM_ENGINE: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromEngine)


class _Numbered(Struct, frozen=True):
    number: int = 0


_NUMBERED = msgspec.msgpack.Decoder(_Numbered)


def encode(frame: Frame) -> bytes:
    """Length and body. Raises TooLarge for a frame over the limit, BadMessage for what a frame cannot carry."""
    try:
        body = _ENCODER.encode(frame)
    except (OverflowError, RecursionError, TypeError, ValueError) as error:
        raise BadMessage(f"{type(frame).__name__} cannot be given to the engine: {error}") from error
    if len(body) > FRAME_LIMIT_BYTES:
        raise TooLarge(
            f"{type(frame).__name__} of {len(body)} bytes is over the limit of {FRAME_LIMIT_BYTES} between a node and its "
            "engine: ask for fewer items at once"
        )
    return LENGTH.pack(len(body)) + body


def to_engine(body: bytes) -> ToEngine:
    """Raises BadMessage."""
    return _decoded(_TO_ENGINE, body)  # type: ignore[no-any-return]


def number_of(body: bytes) -> int:
    """The number of a frame that is otherwise unreadable, so that its sender gets an error; 0: the number is unreadable too."""
    try:
        return _NUMBERED.decode(body).number
    except (msgspec.DecodeError, RecursionError):
        return 0


def from_engine(body: bytes) -> FromEngine:
    """Raises BadMessage."""
    return _decoded(_FROM_ENGINE, body)  # type: ignore[no-any-return]


def _decoded(decoder: msgspec.msgpack.Decoder[Any], body: bytes) -> Any:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadMessage(f"a frame cannot be read: {error}") from error


class FrameSplitter:
    """Cuts a stream into the bodies of its frames, however it arrives in pieces."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies that are whole now. Raises BadMessage for a frame that announces more than the limit."""
        buffer = self._buffer
        buffer += data
        bodies: list[bytes] = []
        position = 0
        while len(buffer) - position >= LENGTH.size:
            (length,) = LENGTH.unpack_from(buffer, position)
            if length > FRAME_LIMIT_BYTES:
                raise BadMessage(f"a frame announces {length} bytes; the limit is {FRAME_LIMIT_BYTES}")
            end = position + LENGTH.size + length
            if len(buffer) < end:
                break
            bodies.append(bytes(memoryview(buffer)[position + LENGTH.size : end]))
            position = end
        if position:
            del buffer[:position]
        return bodies

    @property
    def missing(self) -> int:
        """How many bytes, at least, are needed before the next body is whole."""
        have = len(self._buffer)
        if have < LENGTH.size:
            return LENGTH.size - have
        return int(LENGTH.unpack_from(self._buffer)[0]) + LENGTH.size - have
