"""Every error that potluck raises or sends: one base class, a stable code, and whether trying again can help."""

from __future__ import annotations

from typing import ClassVar


class PotluckError(Exception):
    """Base of all errors. `code` is stable and goes on the wire; `retryable` says that the same request may succeed later.

    The message says what is wrong, why, and what to do about it, in one or two sentences.
    """

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_seconds = retry_after_seconds


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
    """A model that fails on a request that fits its signature: it may not take these values, or be itself at fault."""

    code = "model_failed"


class InvalidModel(PotluckError):
    """A model that cannot be loaded, is not compiled, or does not fit the data."""

    code = "invalid_model"
    exit_code = 2


class CodeNotAllowed(PotluckError):
    """A model holds code of its users', and this node does not allow it. Another node may."""

    code = "code_not_allowed"
    exit_code = 2


class Diverged(PotluckError):
    """Training whose loss or weights are no numbers any more, or went far away from those of the other nodes."""

    code = "diverged"
    retryable = True


class InvalidData(PotluckError):
    """A data set that is missing, empty, or has too many items that cannot be read."""

    code = "invalid_data"
    exit_code = 2


class InvalidSettings(PotluckError):
    """A settings file, environment variable or flag that is wrong."""

    code = "invalid_settings"
    exit_code = 2


class CannotListen(InvalidSettings):
    """An address that is not this machine's, or a port that is taken: now. A network may come up late, a program may end."""

    exit_code = 5


class NotFound(PotluckError):
    """A job, model, data set, deployment, node or blob that does not exist."""

    code = "not_found"
    exit_code = 3


class Conflict(PotluckError):
    """A name that is taken, or a state that forbids the request."""

    code = "conflict"


class GaveWay(Conflict):
    """A coordinator that had nothing to keep, where another serves the cluster: starting it again would change nothing."""

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
    """The inputs of a request are blobs that nobody has any more. Whoever sent them can send them again."""

    code = "inputs_lost"


class TimedOut(PotluckError):
    """No answer within the time allowed."""

    code = "timed_out"
    retryable = True
    exit_code = 4


class PeerLost(PotluckError):
    """Another member of a group that trains synchronously is gone: what is left of the group forms anew."""

    code = "peer_lost"
    retryable = True


class Cancelled(PotluckError):
    """The job or request was cancelled by its user."""

    code = "cancelled"


class EngineFailed(PotluckError):
    """The engine process died, froze, or raised outside of what the user's model or data explains."""

    code = "engine_failed"
    retryable = True


class ModelCrashed(EngineFailed):
    """The engine died while it loaded this model or ran it, or had to be killed since that did not end."""

    code = "model_crashed"


class OutOfMemory(PotluckError):
    """A node has not enough memory, of its own or of its GPU, for a model and its data. Another node may have."""

    code = "out_of_memory"
    retryable = True


class CorruptBlob(PotluckError):
    """Bytes whose SHA-256 is not the one asked for."""

    code = "corrupt_blob"
    retryable = True


class DiskFull(PotluckError):
    """No room for a blob: on the disk, or within the store's limit beside what is pinned."""

    code = "disk_full"
    retryable = True


def _all_errors(base: type[PotluckError]) -> list[type[PotluckError]]:
    return [base, *(found for sub in base.__subclasses__() for found in _all_errors(sub))]


BY_CODE: dict[str, type[PotluckError]] = {error.code: error for error in reversed(_all_errors(PotluckError))}


def from_code(code: str, message: str, retry_after_seconds: float | None = None) -> PotluckError:
    """The exception for an error received on the wire; an unknown code gives the base class."""
    return BY_CODE.get(code, PotluckError)(message, retry_after_seconds=retry_after_seconds)


def expected(error: BaseException) -> PotluckError | None:
    """The first PotluckError of an error or a group of them; None where anything else is among them.

    In place of `except*`: what is raised within that (also SystemExit) comes out of it in a group before Python 3.11.4.
    """
    if not isinstance(error, BaseExceptionGroup):
        return error if isinstance(error, PotluckError) else None
    known = [expected(one) for one in error.exceptions]
    return None if None in known else known[0]
