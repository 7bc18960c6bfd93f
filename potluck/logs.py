"""Logging as the daemons do it: one line an event, `key=value`, to standard error, with priorities where that is systemd's journal."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable


class _KeyValueFormatter(logging.Formatter):
    default_msec_format = "%s.%03d"


class _JournalFormatter(logging.Formatter):
    """Without timestamps, for the journal has its own; each line with its priority, also those of a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        return _with_priority(record.levelno, super().format(record))


class SeldomFilter(logging.Filter):
    """Lets `count` lines of a kind through in `seconds`, and says with the next one how many were left out.

    Of a kind are those with the same first line of text, before values are filled in.
    """

    _KINDS_LIMIT = 1000

    def __init__(self, count: int = 10, seconds: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._count = count
        self._seconds = seconds
        self._clock = clock
        self._seen: dict[str, tuple[float, int]] = {}
        """When the time of a kind began, and how many there were since."""

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
    """Send the logs of this process to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    line = "%(levelname)-7s %(name)s %(message)s"
    handler.setFormatter(_JournalFormatter(line) if _in_journal() else _KeyValueFormatter(f"%(asctime)s {line}"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("amqtt", "transitions", "mqtt", "aiohttp.access", "zeroconf", "asyncio"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
    loop = logging.getLogger("asyncio")  # it says so of each connection that it cannot take, a thousand times a second
    loop.filters[:] = [SeldomFilter()]


class Seldom:
    """When it is time again to log of a subject: once in `seconds`. Beyond `limit` subjects in that time, the others are one."""

    def __init__(self, seconds: float, limit: int = 64, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._limit = limit
        self._clock = clock
        self._known: dict[str, tuple[float, int]] = {}
        """Until when nothing is said of each, and how often there was something."""

    def due(self, subject: str) -> int | None:
        """How often there was nothing said of this subject since the last time; None: it is not yet time again."""
        now = self._clock()
        if subject not in self._known and len(self._known) >= self._limit:
            self._known = {one: known for one, known in self._known.items() if known[0] > now}
            if len(self._known) >= self._limit:
                subject = ""
        until, more = self._known.get(subject, (0.0, 0))
        if now < until:
            self._known[subject] = until, more + 1
            return None
        self._known.pop(subject, None)  # behind the others
        self._known[subject] = now + self._seconds, 0
        return more


def say(level: int, text: str) -> None:
    """Write to standard error for people, as it is; with its priority for the journal."""
    sys.stderr.write((_with_priority(level, text) if _in_journal() else text) + "\n")


def fields(**values: object) -> str:
    """`key=value ...` in the order given, leaving out None; text with spaces, or signs that a terminal would obey, is quoted."""
    shown = ((key, str(value)) for key, value in values.items() if value is not None)
    return " ".join(f"{key}={text!r}" if _is_odd(text) else f"{key}={text}" for key, text in shown)


def _is_odd(text: str) -> bool:
    return not text or " " in text or not text.isprintable()


def _in_journal() -> bool:
    """Whether standard error is the journal's: JOURNAL_STREAM names its device and inode (systemd.exec(5)).

    The variable alone says nothing: it is handed on to whatever a unit starts, wherever that writes.
    """
    try:
        found = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):  # closed, or no file: under a test, in a notebook
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def _with_priority(level: int, text: str) -> str:
    """With syslog's number of the level at the beginning of each line (sd-daemon(3))."""
    places = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
    number = next((number for least, number in places if level >= least), 7)
    return "\n".join(f"<{number}>{line}" for line in text.split("\n"))
