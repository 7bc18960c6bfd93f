"""A defect in one request, message or turn of a loop must not end the daemon with everything that it serves."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager

from potluck.errors import PotluckError
from potluck.logs import Seldom, fields

log = logging.getLogger(__name__)

_SELDOM = Seldom(5.0)


def as_defect(error: Exception, doing: str) -> PotluckError:
    """The error to tell: one of ours stays as it is; any other is logged, and becomes `a defect of potluck`."""
    if isinstance(error, PotluckError):
        return error
    _tell(doing, error)
    return PotluckError(f"a defect of potluck: {repr(error)[:500]}")


def _tell(doing: str, error: Exception) -> None:
    if (more := _SELDOM.due(doing)) is not None:
        log.error("defect %s", fields(doing=doing, more=more or None), exc_info=error)


@contextmanager
def surviving(doing: str, *, fatal: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Log any error raised inside, except `fatal` ones, with its traceback, at most every few seconds; then go on after the block."""
    try:
        yield
    except fatal:
        raise
    except Exception as error:  # noqa: BLE001 - that is what this is for
        _tell(doing, error)


async def outlived(work: Awaitable[object], doing: str) -> None:
    """Await `work` whose result nobody waits for, like `surviving`."""
    with surviving(doing):
        await work
