"""What a node and its engine say to each other: 4 bytes of length (big-endian), then a msgpack map."""

from __future__ import annotations

import struct

from msgspec import Struct

from potluck import codec
from potluck.errors import BadMessage
from potluck.messages import AnyTask, AnyTaskResult, ErrorInfo, RequestOutcome, Signature, Tensor

FRAME_LIMIT_BYTES = 256 * 2**20
LENGTH = struct.Struct(">I")


class Frame(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="frame", tag=True):
    """`number` ties an answer to its question; 0 for what nobody asked."""

    number: int = 0


class RunTask(Frame, frozen=True):
    """`files`: a local path for every blob that the task names, by SHA-256."""

    job_id: str
    task: AnyTask
    files: dict[str, str]


class CancelTask(Frame, frozen=True):
    pass


class ForgetJob(Frame, frozen=True):
    job_id: str


class LoadReplica(Frame, frozen=True):
    replica_id: str
    path: str


class UnloadReplica(Frame, frozen=True):
    replica_id: str


class Infer(Frame, frozen=True):
    replica_id: str
    requests: tuple[tuple[Tensor, ...], ...]


class Started(Frame, frozen=True):
    runtimes: dict[str, str]
    gpus: tuple[str, ...] = ()


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


class Done(Frame, frozen=True):
    pass


class Inferred(Frame, frozen=True):
    outcomes: tuple[RequestOutcome, ...]
    seconds: float


class Failed(Frame, frozen=True):
    error: ErrorInfo


ToEngine = RunTask | CancelTask | ForgetJob | LoadReplica | UnloadReplica | Infer
FromEngine = Started | Heartbeat | TaskProgressed | TaskDone | ReplicaLoaded | Done | Inferred | Failed


def encode(frame: Frame) -> bytes:
    """Raises BadMessage for a frame over the limit."""
    body = codec.pack(frame)
    if len(body) > FRAME_LIMIT_BYTES:
        raise BadMessage(f"a frame of {len(body)} bytes is over the limit of {FRAME_LIMIT_BYTES}")
    return LENGTH.pack(len(body)) + body
