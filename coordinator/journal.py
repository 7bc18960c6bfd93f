"""The journal (SQLite, WAL): every change of state is an event in it before its effects happen.

Events are structs in named streams (`job/<id>`, `registry`, `deployments`); a state is what replaying its stream gives.
Each opening of the journal raises the epoch, which fences commands of a coordinator that was here before.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from potluck import codec
from potluck.errors import Conflict, Unavailable

T = TypeVar("T")

FATAL = (Unavailable,)
"""What nobody goes on after: what is not in the journal must not happen."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (seq INTEGER PRIMARY KEY, stream TEXT NOT NULL, body BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS events_by_stream ON events (stream, seq);
CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, value INTEGER NOT NULL);
"""


class Journal:
    """An open journal. One process at a time: opening it twice raises Conflict.

    The epoch is one more than the last, and at least `least_epoch`: given the time, a coordinator whose journal was lost is
    still newer than what its nodes have seen.
    """

    def __init__(self, path: Path, *, least_epoch: int = 0) -> None:
        self._path = path
        self._db = sqlite3.connect(path, isolation_level=None, timeout=1.0)
        try:
            # EXCLUSIVE keeps the file lock for as long as we live: two coordinators on one journal would undo each other.
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(_SCHEMA)
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute("INSERT OR IGNORE INTO facts VALUES ('epoch', 0)")
            self._db.execute("UPDATE facts SET value = max(value + 1, ?) WHERE key = 'epoch'", (least_epoch,))
            self._db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            self._db.close()
            if error.sqlite_errorcode in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise Conflict(f"the journal {path} is in use ({error}): does another coordinator run?") from error
            raise Unavailable(f"the journal {path} cannot be opened: {error}") from error
        row = self._db.execute("SELECT value FROM facts WHERE key = 'epoch'").fetchone()
        self.epoch: int = row[0]

    def append(self, stream: str, *events: msgspec.Struct) -> None:
        """Write `events` to `stream`, all or none, before returning. Raises Unavailable, when the disk is full for one."""
        rows = [(stream, codec.pack(event)) for event in events]
        with self._transaction():
            self._db.executemany("INSERT INTO events (stream, body) VALUES (?, ?)", rows)

    def replay(self, stream: str, kind: type[T]) -> Iterator[T]:
        """The events of `stream` in order, as `kind` (a tagged union of structs)."""
        for (body,) in self._db.execute("SELECT body FROM events WHERE stream = ? ORDER BY seq", (stream,)).fetchall():
            yield codec.unpack(body, kind)

    def streams(self, prefix: str) -> list[str]:
        """The names of streams that begin with `prefix`, oldest first."""
        rows = self._db.execute(
            "SELECT stream FROM events WHERE substr(stream, 1, ?) = ? GROUP BY stream ORDER BY min(seq)",
            (len(prefix), prefix),
        )
        return [stream for (stream,) in rows.fetchall()]

    def rewrite(self, stream: str, events: Iterable[msgspec.Struct]) -> None:
        """Replace a stream by fewer events that give the same state (none: the stream is gone)."""
        rows = [(stream, codec.pack(event)) for event in events]
        with self._transaction():
            self._db.execute("DELETE FROM events WHERE stream = ?", (stream,))
            self._db.executemany("INSERT INTO events (stream, body) VALUES (?, ?)", rows)

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            with self._db:
                yield
        except sqlite3.OperationalError as error:
            raise Unavailable(
                f"the journal {self._path} cannot be written ({error}): make room on its disk and start the coordinator again; "
                "jobs go on where they were"
            ) from error
