"""Logging in daemons: one line per event, `key=value`, on standard error, with priorities for systemd's journal."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable


class _KeyValueFormatter(logging.Formatter):
    default_msec_format = "%s.%03d"


class _JournalFormatter(logging.Formatter):
    """Without timestamps, because the journal adds them; with a priority for each line, also for those of a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        return _with_priority(record.levelno, super().format(record))


class SeldomFilter(logging.Filter):
    """Lets `count` lines of a kind through in `seconds`; the next line then says how many were left out.

    Lines are of one kind if they have the same first line of text, before values are filled in.
    """

    _KINDS_LIMIT = 1000

    def __init__(self, count: int = 10, seconds: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._count = count
        self._seconds = seconds
        self._clock = clock
        self._seen: dict[str, tuple[float, int]] = {}
        """When a kind's time began, and how many lines it had since."""

    def filter(self, record: logging.LogRecord) -> bool:
        kind, now = str(record.msg).partition("\n")[0], self._clock()
        began, seen = self._seen.get(kind, (now, 0))
        if now - began >= self._seconds:
            if seen > self._count:
                record.msg = f"{record.msg} ({seen - self._count} more of these were left out)"
            began, seen = now, 0
        if len(self._seen) >= self._KINDS_LIMIT:
            self._seen.clear()
        self._seen[kind] = (began, seen + 1)
        return seen < self._count


def configure(level: str = "INFO") -> None:
    """Send this process's logs to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    line = "%(levelname)-7s %(name)s %(message)s"
    handler.setFormatter(_JournalFormatter(line) if _in_journal() else _KeyValueFormatter(f"%(asctime)s {line}"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("amqtt", "transitions", "mqtt", "aiohttp.access", "zeroconf", "asyncio"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
    loop = logging.getLogger("asyncio")  # asyncio logs each connection that it cannot accept, a thousand times a second
    loop.filters[:] = [SeldomFilter()]


class Seldom:
    """Tells when to log about a subject again: once in `seconds`. Beyond `limit` subjects in that time, all others count as one."""

    def __init__(self, seconds: float, limit: int = 64, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._limit = limit
        self._clock = clock
        self._known: dict[str, tuple[float, int]] = {}
        """For each subject: until when to stay silent, and how often it was silent."""

    def due(self, subject: str) -> int | None:
        """How often this subject was not logged since the last time; None: do not log now."""
        now = self._clock()
        if subject not in self._known and len(self._known) >= self._limit:
            self._known = {one: known for one, known in self._known.items() if known[0] > now}
            if len(self._known) >= self._limit:
                subject = ""
        until, more = self._known.get(subject, (0.0, 0))
        if now < until:
            self._known[subject] = until, more + 1
            return None
        self._known.pop(subject, None)  # move it behind the others
        self._known[subject] = now + self._seconds, 0
        return more


def say(level: int, text: str) -> None:
    """Write a text for people to standard error, as it is; in the journal with its priority."""
    sys.stderr.write((_with_priority(level, text) if _in_journal() else text) + "\n")


def fields(**values: object) -> str:
    """`key=value ...` in the order given, without None. Quotes a text with spaces, or with characters that a terminal would obey."""
    shown = ((key, str(value)) for key, value in values.items() if value is not None)
    return " ".join(f"{key}={text!r}" if _is_odd(text) else f"{key}={text}" for key, text in shown)


def _is_odd(text: str) -> bool:
    return not text or " " in text or not text.isprintable()


def _in_journal() -> bool:
    """Whether standard error is the journal: JOURNAL_STREAM names its device and inode (systemd.exec(5)).

    The variable alone proves nothing: a unit's children inherit it, wherever they write.
    """
    try:
        found = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):  # closed, or not a file: under a test, in a notebook
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def _with_priority(level: int, text: str) -> str:
    """The text with syslog's number of the level at the beginning of each line (sd-daemon(3))."""
    places = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
    number = next((number for least, number in places if level >= least), 7)
    return "\n".join(f"<{number}>{line}" for line in text.split("\n"))
