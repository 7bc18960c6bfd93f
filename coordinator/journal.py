"""The journal (SQLite, WAL): every change of state is an event in it before its effects happen.

Events are structs in named streams (`job/<id>`, `registry`, `deployments`); replaying a stream gives a state. Each event has a number
that is never used again: a reader that has read up to one number can `follow` from there. A snapshot begins a stream again, and
the stream's events before it are deleted.

A second table, with its own numbers, has what the journal tells people about events: it is written with them and changes no state.
Only the newest is kept.

Each time the journal is opened, its epoch rises (the term of Raft, section 5.1), so that commands of earlier coordinators are refused.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from potluck.errors import BadMessage, Conflict, NotFound, PotluckError, Unavailable
from potluck.logs import fields
from potluck.wire import codec

log = logging.getLogger(__name__)

T = TypeVar("T")
BALLAST_BYTES = 4 * 2**20
RETAKE_SECONDS = 30.0
"""How often to look whether there is room for the ballast again."""

FATAL = (Unavailable,)
"""Errors that must end the coordinator: what is not in the journal must not happen."""

TOLD_KEPT = 10_000
"""Of what is told, the newest."""
TOLD_WAITING = 1_000
"""Of what there is no room for, the newest."""
GONE_KEPT = 10_000
"""How many removed streams the journal still tells of, so that a follower hears of their end."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS events
    (seq INTEGER PRIMARY KEY AUTOINCREMENT, stream TEXT NOT NULL, body BLOB NOT NULL, begins INTEGER NOT NULL DEFAULT 0);
CREATE INDEX IF NOT EXISTS events_by_stream ON events (stream, seq);
CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS told (number INTEGER PRIMARY KEY AUTOINCREMENT, body BLOB NOT NULL);
"""
_UNNUMBERED = "SELECT 1 FROM sqlite_master WHERE name = 'events' AND sql NOT LIKE '%AUTOINCREMENT%'"
_NUMBER = """
ALTER TABLE events RENAME TO unnumbered;
DROP INDEX IF EXISTS events_by_stream;
CREATE TABLE events
    (seq INTEGER PRIMARY KEY AUTOINCREMENT, stream TEXT NOT NULL, body BLOB NOT NULL, begins INTEGER NOT NULL DEFAULT 0);
INSERT INTO events (seq, stream, body) SELECT seq, stream, body FROM unnumbered;
DROP TABLE unnumbered;
"""
"""Converts a journal from before events had fixed numbers."""


def _number(db: sqlite3.Connection) -> None:
    """0 to 1. Journals of version 0 have either tables."""
    if db.execute(_UNNUMBERED).fetchone() is not None:
        _run(db, _NUMBER)


_MIGRATIONS: Sequence[Callable[[sqlite3.Connection], None]] = (_number,)
"""What makes version n + 1 of version n, at place n; called in a transaction."""


def _run(db: sqlite3.Connection, script: str) -> None:
    """Its statements, in the transaction that is open: `executescript` would commit that first."""
    for statement in filter(None, map(str.strip, script.split(";"))):
        db.execute(statement)


@dataclass(frozen=True)
class Entry:
    """An event as `follow` returns it. `begins`: its stream begins with it, events before it no longer count. Empty body: the stream is gone."""

    number: int
    stream: str
    begins: bool
    body: bytes


@dataclass(frozen=True)
class Position:
    """How far a reader has followed: up to `number`. What was deleted up to `covers`, it never had."""

    number: int
    covers: int


@dataclass(frozen=True)
class Told:
    """Some of what is told, each with its number, and the first and last numbers of all that is kept (0: nothing is)."""

    rows: Sequence[tuple[int, bytes]]
    oldest: int
    newest: int


Watcher = Callable[[str, Sequence[msgspec.Struct]], None]
"""Called with a stream, and the events that are about to be appended to it."""


class Journal:
    """An open journal. Only one process at a time: opening it twice raises Conflict.

    A journal of an older potluck is migrated, after a copy of it to `<name>.v<its version>`; one of a newer potluck raises Unavailable.

    The epoch is one more than the last. `cluster_id` and `founded` (Unix time in whole seconds; 0: unknown) belong to the journal: after
    a lost journal, the new one is another cluster's, and its epochs are not compared with the old ones.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            try:
                self._open()
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_FULL or not _ballast_of(path).exists():
                    raise
                log.warning("journal uses its reserved room: the disk is full %s", fields(path=path))
                _ballast_of(path).unlink()
                self._open()
        except (sqlite3.Error, OSError) as error:
            raise _cannot_read(path, error) from error
        if path.exists():  # after a power cut, no epoch and no number may be used again
            _sync_file(path.with_name(f"{path.name}-wal"))
        # A journal in memory (`:memory:`, sqlite3_open(3)) has no disk that could be full.
        self._ballast = _Ballast(_ballast_of(path) if path.exists() else None)
        self._soon: list[tuple[str, bytes]] = []
        """Rows for the next write."""
        self._tell_soon: list[tuple[bytes]] = []
        """The same, of what is told."""
        self._untold = False
        """Whether there was no room for it."""
        self._watchers: list[Watcher] = []
        facts: dict[str, int] = dict(self._db.execute("SELECT key, value FROM facts").fetchall())
        self.epoch = facts["epoch"]
        self.cluster_id = f"{facts['cluster']:016x}"
        self.founded = facts["founded"]
        self._forgotten = facts["forgotten"]
        """The highest number of a deleted event that followers can no longer be told of."""
        self._unsafe: Unavailable | None = None
        """Why new events cannot be relied on any more."""
        self._unsynced = False
        """Whether something was written after the last sync began."""
        self._syncing: asyncio.Task[None] | None = None
        self._syncing_next: asyncio.Task[None] | None = None

    def _open(self) -> None:
        self._db = sqlite3.connect(self._path, isolation_level=None, timeout=1.0)
        try:
            # EXCLUSIVE holds the file lock as long as we live: two coordinators on one journal would undo each other's work.
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._migrate()
            self._db.execute("BEGIN IMMEDIATE")
            _run(self._db, _SCHEMA)
            self._db.execute("INSERT OR IGNORE INTO facts VALUES ('epoch', 0)")
            self._db.execute("INSERT OR IGNORE INTO facts VALUES ('forgotten', 0)")
            self._db.execute("UPDATE facts SET value = value + 1 WHERE key = 'epoch'")
            self._db.execute("INSERT OR IGNORE INTO facts VALUES ('cluster', ?)", (secrets.randbits(63),))
            # A journal from before this fact is older than all journals that have it.
            began = "SELECT 'founded', CASE WHEN EXISTS (SELECT 1 FROM events) THEN 0 ELSE ? END"
            self._db.execute(f"INSERT OR IGNORE INTO facts {began}", (int(time.time()),))
            self._db.execute("COMMIT")
        except BaseException:
            self._db.close()
            raise

    def _migrate(self) -> None:
        """Bring the tables to our version, all or nothing, after a copy of the file. Raises Unavailable for a newer version than ours,
        and without room for the copy."""
        ours = len(_MIGRATIONS)
        (found,) = self._db.execute("PRAGMA user_version").fetchone()
        if found > ours or found < 0:
            raise Unavailable(
                f"the journal {self._path} is of version {found}, but this potluck knows versions up to {ours}: install the newer potluck "
                f"again{self._copy_to_use(ours)}"
            )
        if found == ours:
            return
        if self._db.execute("SELECT 1 FROM sqlite_master").fetchone() is not None:
            self._back_up(_copy_of(self._path, found))
        self._db.execute("BEGIN IMMEDIATE")
        with self._db:
            for step in _MIGRATIONS[found:]:
                step(self._db)
            self._db.execute(f"PRAGMA user_version = {ours}")

    def _copy_to_use(self, ours: int) -> str:
        """What else to do about a newer journal: use the newest copy that we can read, if there is one."""
        for version in range(ours, -1, -1):
            if (copy := _copy_of(self._path, version)).is_file():
                return (
                    f", or put {copy.name}, the copy from before the upgrade, in its place, and delete {self._path.name}-wal "
                    "(what happened since the upgrade is then lost)"
                )
        return f" (there is no copy from before the upgrade in {self._path.parent})"

    def _back_up(self, path: Path) -> None:
        """A copy of this journal at `path`, which survives a power cut. Raises Unavailable, and then leaves nothing."""
        partial = path.with_name(f"{path.name}.partial")
        pieces = partial, partial.with_name(f"{partial.name}-journal")
        try:
            for left in pieces:  # by a power cut
                left.unlink(missing_ok=True)
            partial.touch(mode=0o600)
            copy = sqlite3.connect(partial)
            try:
                self._db.backup(copy)
            finally:
                copy.close()
            partial.rename(path)
            _sync_file(path)
        except (sqlite3.Error, OSError) as error:
            for left in pieces:
                with suppress(OSError):  # the first error is the one to tell
                    left.unlink(missing_ok=True)
            size = self._path.stat().st_size
            reason = error.strerror if isinstance(error, OSError) else error
            raise Unavailable(
                f"the journal {self._path} is of an older potluck, and before it is changed, it is copied to {path.name}, which failed "
                f"({reason}): nothing was changed; make room there for {size} bytes, or give write access, and start the coordinator again"
            ) from error
        log.info("journal copied before its tables change %s", fields(path=path))

    @property
    def empty(self) -> bool:
        """Whether it has no event."""
        self.flush()
        return not self._read("SELECT 1 FROM events WHERE length(body) > 0 LIMIT 1")

    def watch(self, watcher: Watcher) -> None:
        """Call it before each append from now on: what it tells is written with the events, or not at all."""
        self._watchers.append(watcher)

    def append(self, stream: str, *events: msgspec.Struct) -> None:
        """Write `events` to `stream`, all or none, before returning. Raises Unavailable, for example when the disk is full."""
        rows = _rows(stream, events)
        waiting = len(self._tell_soon)
        self._watched(stream, events)
        try:
            self._insert([*self._soon, *rows])
        except BaseException:
            del self._tell_soon[waiting:]  # of what has not happened
            raise

    def append_soon(self, stream: str, *events: msgspec.Struct) -> None:
        """Write `events` to `stream` with the next `flush`: before that, nothing that follows from them may leave this process.

        One transaction for all events of a moment costs a tenth of one for each.
        """
        rows = _rows(stream, events)
        self._watched(stream, events)
        self._soon += rows

    def tell_soon(self, event: msgspec.Struct) -> None:
        """Write what is told with the next `flush`, or with the events that are about to be appended."""
        self._tell_soon.append((codec.pack(event),))

    def flush(self) -> None:
        """Write the waiting events. Raises Unavailable; then they still wait."""
        if self._unsafe is not None:
            raise self._unsafe
        if self._soon:
            self._insert(self._soon)
        elif self._tell_soon:
            self._write_told()

    def _watched(self, stream: str, events: Sequence[msgspec.Struct]) -> None:
        for watcher in self._watchers:
            watcher(stream, events)

    def _insert(self, rows: list[tuple[str, bytes]]) -> None:
        """Write these rows, which include all waiting ones, and what is to be told, if there is room for that as well."""

        def work() -> None:
            self._db.executemany("INSERT INTO events (stream, body) VALUES (?, ?)", rows)

        if not self._tell_soon or not self._write_told(work):
            self._write(work)
        self._soon = []

    def _write_told(self, work: Callable[[], object] = lambda: None) -> bool:
        """Write what is to be told, in one transaction with `work`; whether that was possible.

        What is told changes nothing: where there is no room, the newest of it waits, nobody fails, and the reserve is not for it.
        """

        def both() -> None:
            work()
            self._db.executemany("INSERT INTO told (body) VALUES (?)", self._tell_soon)
            self._db.execute("DELETE FROM told WHERE number <= (SELECT max(number) FROM told) - ?", (TOLD_KEPT,))

        try:
            self._once(both)
        except sqlite3.OperationalError as error:
            if not self._untold:
                log.warning("events are not told of %s", fields(path=self._path, reason=str(error)))
            self._untold = True
            del self._tell_soon[:-TOLD_WAITING]
            return False
        self._tell_soon, self._untold = [], False
        self._ballast.take()
        return True

    def replay(self, stream: str, kind: type[T]) -> Iterator[T]:
        """The events of `stream` in order, as `kind` (a tagged union of structs). Raises BadMessage, and Unavailable if the file is damaged."""
        self.flush()
        for (body,) in self._read(
            "SELECT body FROM events WHERE stream = ? AND length(body) > 0 ORDER BY seq", (stream,)
        ):
            try:
                yield codec.unpack(body, kind)
            except BadMessage as error:
                raise BadMessage(
                    f"the journal {self._path} has an event of {stream} that this potluck cannot read ({error.message}): install the potluck "
                    "that wrote it again, or put a backup of the journal in its place"
                ) from error

    @contextmanager
    def applying(self, stream: str) -> Iterator[None]:
        """For the block that applies the events of `stream`: raises Unavailable where they do not fit together."""
        try:
            yield
        except (LookupError, AttributeError, TypeError) as error:
            log.exception("events do not fit together %s", fields(stream=stream, path=self._path))
            raise Unavailable(
                f"the events of {stream} in the journal {self._path} do not fit together ({error!r}): some are lost, or are of a newer potluck; "
                "put a backup of the journal in its place, or install the potluck that wrote it again"
            ) from error

    def streams(self, prefix: str) -> list[str]:
        """The names of streams that begin with `prefix`, oldest first."""
        self.flush()
        rows = self._read(
            "SELECT stream FROM events WHERE substr(stream, 1, ?) = ? AND length(body) > 0 GROUP BY stream ORDER BY min(seq)",
            (len(prefix), prefix),
        )
        return [stream for (stream,) in rows]

    async def follow(self, place: Position | None = None, limit: int = 1000) -> tuple[list[Entry], Position]:
        """The next `limit` events after a place (None: from the beginning), in order, and the place after them. Of a stream that began again,
        it returns the present events. It returns only events that survive a power cut.

        Raises NotFound where an event in between was deleted: begin again, without old events. Raises Unavailable like `sync`.
        """
        await self.sync()
        if place is None:
            ((newest,),) = self._read("SELECT coalesce(max(seq), 0) FROM events")
            place = Position(0, newest)
        if place.covers < self._forgotten:
            raise NotFound(
                f"events up to {self._forgotten} were deleted from the journal: follow it from the beginning again"
            )
        rows = self._read(
            "SELECT seq, stream, begins, body FROM events WHERE seq > ? ORDER BY seq LIMIT ?", (place.number, limit)
        )
        found = [Entry(number, stream, bool(begins), body) for number, stream, begins, body in rows]
        number = found[-1].number if found else place.number
        return found, Position(number, max(place.covers, number))

    async def told(self, after: int, limit: int) -> Told:
        """The next `limit` things told behind the number `after`. Only what a power cut does not undo. Raises Unavailable as `sync`."""
        await self.sync()
        # Two looks at the ends: asked for both at once, SQLite reads the whole table.
        ((oldest, newest),) = self._read(
            "SELECT (SELECT coalesce(min(number), 0) FROM told), (SELECT coalesce(max(number), 0) FROM told)"
        )
        rows = self._read("SELECT number, body FROM told WHERE number > ? ORDER BY number LIMIT ?", (after, limit))
        return Told(rows, oldest, newest)

    def snapshot(self, stream: str, events: Iterable[msgspec.Struct]) -> None:
        """Begin a stream again with fewer events for the same state (no events: the stream is gone); deletes the events before."""
        self.flush()
        rows = _rows(stream, events) or [(stream, b"")]

        def work() -> None:
            first, *rest = rows
            begin = self._db.execute("INSERT INTO events (stream, body, begins) VALUES (?, ?, 1)", first).lastrowid
            self._db.executemany("INSERT INTO events (stream, body) VALUES (?, ?)", rest)
            self._db.execute("DELETE FROM events WHERE stream = ? AND seq < ?", (stream, begin))

        self._write(work)
        if rows[0][1] == b"":
            self._forget_gone()

    def _forget_gone(self) -> None:
        """Forget the oldest of the removed streams."""
        gone = self._db.execute(
            "SELECT seq FROM events WHERE length(body) = 0 ORDER BY seq DESC LIMIT 1 OFFSET ?", (GONE_KEPT,)
        )
        if (last := gone.fetchone()) is None:
            return

        def work() -> None:
            self._db.execute("DELETE FROM events WHERE length(body) = 0 AND seq <= ?", last)
            self._db.execute("UPDATE facts SET value = ? WHERE key = 'forgotten'", last)

        self._write(work)
        (self._forgotten,) = last

    async def sync(self) -> None:
        """Return when everything appended until now is on the disk: not even a power cut undoes it.

        Concurrent callers share one fsync(2), which runs outside the loop; where nothing is new, there is none. Raises Unavailable.
        """
        self.flush()
        if self._syncing_next is None and self._unsynced:
            self._syncing_next = asyncio.create_task(self._sync(self._syncing), name="journal-sync")
        # If nothing is new, what came before may still be on its way to the disk.
        if (syncing := self._syncing_next or self._syncing) is not None:
            await asyncio.shield(syncing)

    async def _sync(self, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        self._syncing, self._syncing_next = self._syncing_next, None
        self._unsynced = False
        try:
            await asyncio.to_thread(_sync_file, self._path.with_name(f"{self._path.name}-wal"))
        except OSError as error:
            # The kernel reports the error only once: events written before may have a hole (fsync(2), "EIO").
            self._unsafe = Unavailable(
                f"the journal {self._path} may not be on the disk ({error.strerror}): check the disk, and start the coordinator again"
            )
            raise self._unsafe from error

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._db.close()

    def _read(self, sql: str, parameters: Sequence[object] = ()) -> list[Any]:
        """The rows. Raises Unavailable if the file is damaged."""
        try:
            return self._db.execute(sql, parameters).fetchall()
        except sqlite3.DatabaseError as error:
            raise _cannot_read(self._path, error) from error

    def _write(self, work: Callable[[], object]) -> None:
        """Do all of `work` or none of it; where the disk is full, try once more without the ballast. Raises Unavailable."""
        try:
            try:
                self._once(work)
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_FULL or not self._ballast.drop():
                    raise
                log.warning("journal uses its reserved room: the disk is full %s", fields(path=self._path))
                self._once(work)
        except sqlite3.OperationalError as error:
            raise Unavailable(
                f"the journal {self._path} cannot be written ({error}): make room on its disk and start the coordinator again; "
                "jobs go on where they were"
            ) from error
        self._ballast.take()

    def _once(self, work: Callable[[], object]) -> None:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            with self._db:
                work()
        except sqlite3.DatabaseError as error:
            if _is_damage(error):
                raise _damaged(self._path, error) from error
            raise
        self._unsynced = True


def _ballast_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.ballast")


def _copy_of(path: Path, version: int) -> Path:
    """Where the copy of a journal of this version is kept."""
    return path.with_name(f"{path.name}.v{version}")


def _cannot_read(path: Path, error: sqlite3.Error | OSError) -> PotluckError:
    """The error to raise instead."""
    if isinstance(error, OSError):
        return Unavailable(f"the journal {path} cannot be read: {error.strerror}")
    code = _code(error)
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return Conflict(f"the journal {path} is in use ({error}): does another coordinator run?")
    if code == sqlite3.SQLITE_FULL:
        return Unavailable(
            f"the journal {path} cannot be read ({error}): make room on its disk and start the coordinator again"
        )
    if _is_damage(error):
        return _damaged(path, error)
    return Unavailable(f"the journal {path} cannot be read: {error}")


def _code(error: sqlite3.Error) -> int:
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF  # above that, SQLite says more of the same


def _is_damage(error: sqlite3.Error) -> bool:
    return _code(error) in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)


def _damaged(path: Path, error: sqlite3.Error) -> Unavailable:
    return Unavailable(
        f"the journal {path} is damaged, or is no journal ({error}): put a backup of it in its place, or move it and {path.name}-wal away; "
        "then the cluster begins with nothing"
    )


def _sync_file(path: Path) -> None:
    """Make a file's data, and its name in the folder, survive a power cut."""
    for one in (path, path.parent):
        handle = os.open(one, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _rows(stream: str, events: Iterable[msgspec.Struct]) -> list[tuple[str, bytes]]:
    return [(stream, codec.pack(event)) for event in events]


class _Ballast:
    """A file beside the journal that is deleted when the disk is full, so that the journal can still be written."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._here = False
        self._tried_at = -RETAKE_SECONDS
        self.take()

    def drop(self) -> bool:
        """Delete it; returns whether it existed."""
        if self._path is None:
            return False
        dropped, self._here = self._here, False
        self._path.unlink(missing_ok=True)
        self._tried_at = time.monotonic()
        return dropped

    def take(self) -> None:
        """Make it, or make it again, if there is room."""
        if self._path is None or self._here or time.monotonic() - self._tried_at < RETAKE_SECONDS:
            return
        self._tried_at = time.monotonic()
        try:
            if self._path.exists() and self._path.stat().st_size == BALLAST_BYTES:
                self._here = True
            elif shutil.disk_usage(self._path.parent).free > 2 * BALLAST_BYTES:
                with self._path.open("wb") as file:
                    file.write(bytes(BALLAST_BYTES))
                self._here = True
        except OSError as error:
            log.debug("no room kept for the journal %s", fields(reason=error))
