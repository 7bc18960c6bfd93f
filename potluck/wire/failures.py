"""Errors to the wire and back: the only place that knows both forms."""

from __future__ import annotations

from potluck.errors import PotluckError, from_code
from potluck.wire.values import ErrorInfo


def error_info(error: PotluckError) -> ErrorInfo:
    """An error as it is sent."""
    return ErrorInfo(
        code=error.code,
        message=error.message,
        retryable=error.retryable,
        retry_after_seconds=error.retry_after_seconds,
    )


def as_error(info: ErrorInfo, message: str = "") -> PotluckError:
    """The exception for a received error, with `message` instead of its own text if given; an unknown code gives the base class."""
    return from_code(info.code, message or info.message, info.retry_after_seconds)
