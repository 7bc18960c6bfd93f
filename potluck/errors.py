"""Every error that potluck raises or sends: one base class, a stable code, and whether trying again can help."""

from __future__ import annotations

from typing import ClassVar

WORDS_LIMIT = 4000
"""How many characters a message may have: what it quotes may come from anyone, and must not fill a log or a message on the bus."""


class PotluckError(Exception):
    """Base of all errors. `code` is stable and goes on the wire; `retryable`: the same request may succeed later.

    The message says what is wrong, why, and what to do, in one or two sentences.
    """

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, retry_after_seconds: float | None = None) -> None:
        message = _sendable(message)
        super().__init__(message)
        self.message = message
        self.retry_after_seconds = retry_after_seconds


def _sendable(message: str) -> str:
    """The message, cut in the middle where it is too long, and with escapes for halves of surrogate pairs, which UTF-8 does not have."""
    if len(message) > WORDS_LIMIT:
        half = WORDS_LIMIT // 2
        message = f"{message[:half]} ... ({len(message) - 2 * half} characters left out) ... {message[-half:]}"
    return message.encode(errors="backslashreplace").decode()


class BadMessage(PotluckError):
    """A payload that is not a msgpack or JSON map, or whose fields have wrong types."""

    code = "bad_message"


class TooLarge(PotluckError):
    """A payload, tensor or blob over its size limit."""

    code = "too_large"


class InvalidRequest(PotluckError):
    """A request that is well formed but cannot be carried out as asked (shape, name, option)."""

    code = "invalid_request"
    exit_code = 2


class ModelFailed(InvalidRequest):
    """A model fails on a request that fits its signature: it may not take these values, or the model is wrong."""

    code = "model_failed"


class InvalidModel(PotluckError):
    """A model that cannot be loaded, is not compiled, or does not fit the data."""

    code = "invalid_model"
    exit_code = 2


class CodeNotAllowed(PotluckError):
    """A model contains its users' code, which this node does not allow. Another node may."""

    code = "code_not_allowed"
    exit_code = 2


class Diverged(PotluckError):
    """Training whose loss or weights are no longer numbers, or are far from those of the other nodes."""

    code = "diverged"
    retryable = True


class InvalidData(PotluckError):
    """A data set that is missing, empty, or has too many unreadable items."""

    code = "invalid_data"
    exit_code = 2


class InvalidSettings(PotluckError):
    """A settings file, environment variable or flag that is wrong."""

    code = "invalid_settings"
    exit_code = 2


class CannotListen(InvalidSettings):
    """An address that this machine does not have now, or a port that is taken now. That may change: a network comes up, a program ends."""

    exit_code = 5


class NotAuthenticated(PotluckError):
    """Nobody knows who asks: a closed cluster answers its members only."""

    code = "not_authenticated"
    exit_code = 7


class NotAllowed(PotluckError):
    """Whoever asks may not do this."""

    code = "not_allowed"
    exit_code = 7


class NotFound(PotluckError):
    """A job, model, data set, deployment, node or blob that does not exist."""

    code = "not_found"
    exit_code = 3


class Conflict(PotluckError):
    """A name that is taken, or a state that forbids the request."""

    code = "conflict"


class GaveWay(Conflict):
    """A coordinator with an empty journal ends because another one serves the cluster. Starting it again would change nothing."""

    exit_code = 6


class Overloaded(PotluckError):
    """A bounded queue is full: try again after `retry_after_seconds`."""

    code = "overloaded"
    retryable = True


class Unavailable(PotluckError):
    """Nothing that could serve the request is there now: no coordinator, node, replica or holder."""

    code = "unavailable"
    retryable = True
    exit_code = 4


class InputsLost(Unavailable):
    """The inputs of a request are blobs that nobody has any more. Their sender can send them again."""

    code = "inputs_lost"


class TimedOut(PotluckError):
    """No answer within the time allowed."""

    code = "timed_out"
    retryable = True
    exit_code = 4


class PeerLost(PotluckError):
    """Another member of a group that trains synchronously is gone: the remaining members form a new group."""

    code = "peer_lost"
    retryable = True


class Cancelled(PotluckError):
    """The job or request was cancelled by its user."""

    code = "cancelled"


class EngineFailed(PotluckError):
    """The engine process died, froze, or failed for a reason that is not in the user's model or data."""

    code = "engine_failed"
    retryable = True


class ModelCrashed(EngineFailed):
    """The engine died while it loaded or ran this model, or had to be killed because it did not finish."""

    code = "model_crashed"


class OutOfMemory(PotluckError):
    """A node has too little memory, of its own or of its GPU, for a model and its data. Another node may have enough."""

    code = "out_of_memory"
    retryable = True


class CorruptBlob(PotluckError):
    """Bytes whose SHA-256 is not the one asked for."""

    code = "corrupt_blob"
    retryable = True


class DiskFull(PotluckError):
    """No room for a blob: on the disk, or within the store's limit, which pinned blobs fill."""

    code = "disk_full"
    retryable = True


def _all_errors(base: type[PotluckError]) -> list[type[PotluckError]]:
    return [base, *(found for sub in base.__subclasses__() for found in _all_errors(sub))]


BY_CODE: dict[str, type[PotluckError]] = {error.code: error for error in reversed(_all_errors(PotluckError))}


def from_code(code: str, message: str, retry_after_seconds: float | None = None) -> PotluckError:
    """The exception for an error received on the wire; an unknown code gives the base class."""
    return BY_CODE.get(code, PotluckError)(message, retry_after_seconds=retry_after_seconds)


def expected(error: BaseException) -> PotluckError | None:
    """The first PotluckError of an error or a group of errors; None where there is any other error among them.

    Used instead of `except*`: before Python 3.11.4, an error raised inside that (also SystemExit) comes out of it in a group.
    """
    if not isinstance(error, BaseExceptionGroup):
        return error if isinstance(error, PotluckError) else None
    known = [expected(one) for one in error.exceptions]
    return None if None in known else known[0]
