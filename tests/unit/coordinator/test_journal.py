"""The journal: appended events are there after a crash, once and in order; each opening is a new epoch."""

import asyncio
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest

from coordinator import journal as module
from coordinator.journal import Journal, Position
from coordinator.plans.events import AnyEvent, AttemptEnded, JobStarted
from potluck.errors import BadMessage, Conflict, NotFound, Unavailable
from potluck.wire import codec


def test_events_come_back_in_order_and_by_stream(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.append("job/1", JobStarted(at=1.0), AttemptEnded(at=2.0, attempt_id="a", reason="r"))
    journal.append("job/2", JobStarted(at=3.0))
    journal.close()
    again = Journal(tmp_path / "j")
    assert list(again.replay("job/1", AnyEvent)) == [  # type: ignore[arg-type]
        JobStarted(at=1.0),
        AttemptEnded(at=2.0, attempt_id="a", reason="r"),
    ]
    assert again.streams("job/") == ["job/1", "job/2"]
    again.close()


def test_each_opening_raises_the_epoch(tmp_path: Path) -> None:
    epochs = []
    for _ in range(3):
        journal = Journal(tmp_path / "j")
        epochs.append(journal.epoch)
        journal.close()
    assert epochs == [1, 2, 3]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    with pytest.raises(Conflict, match="another coordinator"):
        Journal(tmp_path / "j")
    journal.close()


def test_a_full_disk_is_said_and_loses_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.append("job/1", JobStarted(at=1.0))
    pages = journal._db.execute("PRAGMA page_count").fetchone()[0]
    journal._db.execute(f"PRAGMA max_page_count = {pages + 1}")  # for SQLite, this is the same as a full disk
    with pytest.raises(Unavailable, match=r"full.*make room"):
        journal.append("job/1", *(AttemptEnded(at=2.0, attempt_id="a", reason="r" * 4096) for _ in range(9)))
    assert len(list(journal.replay("job/1", AnyEvent))) == 1  # type: ignore[arg-type]
    journal._db.execute(f"PRAGMA max_page_count = {pages + 99}")
    journal.append("job/1", JobStarted(at=3.0))
    assert [event.at for event in journal.replay("job/1", AnyEvent)] == [1.0, 3.0]  # type: ignore[arg-type]
    journal.close()


def test_what_is_written_soon_is_written_with_the_next_in_the_order_of_the_calls(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")

    def on_disk() -> list[float]:
        kept = journal._db.execute("SELECT body FROM events ORDER BY seq").fetchall()
        return [codec.unpack(body, JobStarted).at for (body,) in kept]

    for at in (1.0, 2.0):
        journal.append_soon("job/1", JobStarted(at=at))
    assert on_disk() == []
    journal.append("job/2", JobStarted(at=3.0))
    assert on_disk() == [1.0, 2.0, 3.0]
    journal.append_soon("job/1", JobStarted(at=4.0))
    journal.flush()
    journal.append_soon("job/1", JobStarted(at=5.0))
    assert on_disk() == [1.0, 2.0, 3.0, 4.0]
    assert [event.at for event in journal.replay("job/1", AnyEvent)] == [1.0, 2.0, 4.0, 5.0]  # type: ignore[arg-type]
    journal.append_soon("job/1", JobStarted(at=6.0))
    journal.close()
    again = Journal(tmp_path / "j")
    assert [event.at for event in again.replay("job/1", AnyEvent)] == [1.0, 2.0, 4.0, 5.0, 6.0]  # type: ignore[arg-type]
    again.close()


def test_what_could_not_be_written_soon_still_waits(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.append("job/1", JobStarted(at=1.0))
    pages = journal._db.execute("PRAGMA page_count").fetchone()[0]
    journal._db.execute(f"PRAGMA max_page_count = {pages + 1}")
    journal.append_soon("job/1", *(AttemptEnded(at=2.0, attempt_id="a", reason="r" * 4096) for _ in range(9)))
    with pytest.raises(Unavailable, match="full"):
        journal.flush()
    with pytest.raises(Unavailable, match="full"):
        journal.append("job/2", JobStarted(at=3.0))
    journal._db.execute(f"PRAGMA max_page_count = {pages + 99}")
    journal.flush()
    assert len(list(journal.replay("job/1", AnyEvent))) == 10  # type: ignore[arg-type]
    assert journal.streams("job/") == ["job/1"], "whoever wrote the other was told that it was not written"
    journal.close()


def test_a_snapshot_replaces_a_stream(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.append("job/1", JobStarted(at=1.0), JobStarted(at=2.0))
    journal.snapshot("job/1", [JobStarted(at=3.0)])
    assert [event.at for event in journal.replay("job/1", AnyEvent)] == [3.0]  # type: ignore[arg-type]
    journal.snapshot("job/1", [])
    assert journal.streams("job/") == []
    journal.close()


def test_a_disk_that_is_really_full_leaves_room_for_what_happens_then(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small file system")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(tmp_path)], check=False).returncode:
        pytest.skip("may not mount here")
    try:
        journal = Journal(tmp_path / "journal")
        (tmp_path / "others").write_bytes(bytes(shutil.disk_usage(tmp_path).free))
        assert shutil.disk_usage(tmp_path).free == 0
        for at in range(200):
            journal.append("full", JobStarted(at=at))
        assert [event.at for event in journal.replay("full", AnyEvent)] == list(range(200))  # type: ignore[arg-type]
        journal.close()
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_a_journal_has_an_id_and_a_beginning_and_knows_whether_anything_is_in_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    known = journal.cluster_id, journal.founded
    assert journal.empty
    assert journal.founded > 0
    journal.append("job/1", JobStarted(at=1.0))
    assert not journal.empty
    journal.close()
    again = Journal(tmp_path / "j")
    assert (again.cluster_id, again.founded) == known
    again.close()
    other = Journal(tmp_path / "other")
    assert other.cluster_id != known[0]
    other.close()


def test_a_journal_from_before_there_were_beginnings_is_the_oldest(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.append("job/1", JobStarted(at=1.0))
    journal.close()
    with sqlite3.connect(tmp_path / "j") as database:
        database.execute("DELETE FROM facts WHERE key IN ('founded', 'cluster')")
    database.close()
    again = Journal(tmp_path / "j")
    assert again.founded == 0
    again.close()


async def followed(
    journal: Journal, streams: dict[str, list[bytes]], place: Position | None, limit: int = 1000
) -> Position:
    """`streams` after a follower has read `limit` more events, and its new place."""
    entries, after = await journal.follow(place, limit)
    last = place.number if place else 0
    for entry in entries:
        assert entry.number > last
        last = entry.number
        if entry.begins:
            streams.pop(entry.stream, None)
        if entry.body:
            streams.setdefault(entry.stream, []).append(entry.body)
    return after


async def caught_up(
    journal: Journal, streams: dict[str, list[bytes]], place: Position | None, limit: int = 1000
) -> Position:
    while (after := await followed(journal, streams, place, limit)) != place:
        place = after
    return after


def replayed(journal: Journal) -> dict[str, list[bytes]]:
    return {
        stream: [codec.pack(event) for event in journal.replay(stream, AnyEvent)]  # type: ignore[arg-type, var-annotated]
        for stream in journal.streams("")
    }


@pytest.mark.parametrize("seed", range(6))
async def test_whoever_follows_has_what_is_replayed_however_seldom_they_look(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda handle: None)
    journal, chance = Journal(tmp_path / "j"), random.Random(seed)
    streams: dict[str, list[bytes]] = {}
    place: Position | None = None
    highest = 0
    for number in range(400):
        stream = f"job/{chance.randrange(8)}"
        match chance.randrange(6):
            case 0:
                journal.snapshot(stream, [JobStarted(at=float(number))] * chance.randrange(3))
            case 1:
                place = await followed(journal, streams, place, limit=chance.randrange(1, 20))
            case 2:
                journal.append_soon(stream, JobStarted(at=float(number)))
            case 3 if chance.random() < 0.2:
                journal.close()
                journal = Journal(tmp_path / "j")
            case _:
                journal.append(stream, JobStarted(at=float(number)))
        newest = (await journal.follow(None, 1))[1].covers
        assert newest >= highest, "numbers are never used again"
        highest = newest
    await caught_up(journal, streams, place)
    assert streams == replayed(journal)
    journal.close()


async def test_whoever_is_too_far_behind_is_told_to_begin_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.journal.GONE_KEPT", 3)
    journal = Journal(tmp_path / "j")
    streams: dict[str, list[bytes]] = {}
    for number in range(10):
        journal.append(f"job/{number}", JobStarted(at=1.0))
    for number in range(5):
        journal.append("long", JobStarted(at=float(number)))
    place = await caught_up(journal, streams, None)
    for number in range(9):
        journal.snapshot(f"job/{number}", [])
    with pytest.raises(NotFound, match="from the beginning again"):
        await journal.follow(place)
    for limit in (1000, 2):  # in one page, and in many: a follower that began after the deletion goes on
        streams.clear()
        await caught_up(journal, streams, None, limit)
        assert streams == replayed(journal)
        assert sorted(streams) == ["job/9", "long"]
    journal.close()
    again = Journal(tmp_path / "j")
    with pytest.raises(NotFound):
        await again.follow(place)
    again.close()


async def test_a_journal_of_before_there_were_numbers_for_good_is_read(tmp_path: Path) -> None:
    old = sqlite3.connect(tmp_path / "j")
    old.executescript(
        "CREATE TABLE events (seq INTEGER PRIMARY KEY, stream TEXT NOT NULL, body BLOB NOT NULL);"
        "CREATE INDEX events_by_stream ON events (stream, seq);"
        "CREATE TABLE facts (key TEXT PRIMARY KEY, value INTEGER NOT NULL);"
        "INSERT INTO facts VALUES ('epoch', 1795982386), ('cluster', 7), ('founded', 5);"
    )
    rows = [("job/1", codec.pack(JobStarted(at=float(at)))) for at in range(5)]
    old.executemany("INSERT INTO events (stream, body) VALUES (?, ?)", rows)
    old.execute("DELETE FROM events WHERE seq = 2")
    old.commit()
    old.close()
    for opened in (1, 2):
        journal = Journal(tmp_path / "j")
        assert [event.at for event in journal.replay("job/1", AnyEvent)] == [0.0, 2.0, 3.0, 4.0]  # type: ignore[arg-type]
        assert (journal.epoch, journal.founded, journal.cluster_id) == (1795982386 + opened, 5, f"{7:016x}")
        assert [entry.number for entry in (await journal.follow())[0]] == [1, 3, 4, 5]
        journal.close()
    copy = sqlite3.connect(tmp_path / "j.v0")
    assert copy.execute("SELECT seq FROM events").fetchall() == [(1,), (3,), (4,), (5,)]
    copy.close()


def version_of(path: Path) -> int:
    db = sqlite3.connect(path)
    (found,) = db.execute("PRAGMA user_version").fetchone()
    db.close()
    return int(found)


def test_an_older_journal_is_copied_before_it_is_migrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "j")
    journal.append("job/1", JobStarted(at=1.0))
    journal.close()
    ours = version_of(tmp_path / "j")
    assert ours == len(module._MIGRATIONS) == 1
    assert [path.name for path in tmp_path.glob("j.v*")] == [], "a new journal has nothing to copy"

    monkeypatch.setattr(
        module, "_MIGRATIONS", (*module._MIGRATIONS, lambda db: db.execute("CREATE TABLE more (number INTEGER)"))
    )
    newer = Journal(tmp_path / "j")
    assert newer._db.execute("SELECT count(*) FROM more").fetchone() == (0,)
    assert list(newer.replay("job/1", AnyEvent)) == [JobStarted(at=1.0)]  # type: ignore[arg-type]
    newer.append("job/1", JobStarted(at=2.0))
    newer.close()
    assert version_of(tmp_path / "j") == ours + 1
    assert version_of(tmp_path / f"j.v{ours}") == ours
    assert not list(tmp_path.glob("*.partial*"))

    monkeypatch.undo()
    with pytest.raises(Unavailable, match=rf"version {ours + 1}, but this potluck knows .* put j\.v{ours}"):
        Journal(tmp_path / "j")
    # what the sentence says to do works
    shutil.copy(tmp_path / f"j.v{ours}", tmp_path / "j")
    (tmp_path / "j-wal").unlink(missing_ok=True)
    back = Journal(tmp_path / "j")
    assert list(back.replay("job/1", AnyEvent)) == [JobStarted(at=1.0)]  # type: ignore[arg-type]
    back.close()


def test_without_room_for_its_copy_a_journal_is_not_migrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "j")
    journal.append("job/1", JobStarted(at=1.0))
    journal.close()
    monkeypatch.setattr(module, "_MIGRATIONS", (*module._MIGRATIONS, lambda db: db.execute("DELETE FROM events")))
    connect = sqlite3.connect

    def small(path: Path, **options: Any) -> sqlite3.Connection:
        made = connect(path, **options)
        if path.name.endswith(".partial"):
            made.execute("PRAGMA max_page_count = 1")
        return made

    monkeypatch.setattr("sqlite3.connect", small)
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(Unavailable, match=r"copied to j\.v1, which failed .*full.*nothing was changed; make room"):
        Journal(tmp_path / "j")
    assert {path.name for path in tmp_path.iterdir()} == before
    monkeypatch.setattr("sqlite3.connect", connect)
    (tmp_path / "j.v1").mkdir()  # whatever that is, it is not ours
    with pytest.raises(Unavailable, match=r"copied to j\.v1, which failed \(Is a directory\)"):
        Journal(tmp_path / "j")
    monkeypatch.undo()
    again = Journal(tmp_path / "j")
    assert list(again.replay("job/1", AnyEvent)) == [JobStarted(at=1.0)]  # type: ignore[arg-type]
    again.close()


def test_the_copy_of_a_journal_is_for_its_user_alone(tmp_path: Path) -> None:
    Journal(tmp_path / "j").close()
    db = sqlite3.connect(tmp_path / "j")
    db.execute("PRAGMA user_version = 0")
    db.close()
    Journal(tmp_path / "j").close()
    assert stat.S_IMODE((tmp_path / "j.v0").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("copies", "said"),
    [
        ([], r"there is no copy from before the upgrade in"),
        (["j.v0"], r"or put j\.v0, the copy"),
        (["j.v0", "j.v1", "j.v2"], r"or put j\.v1, the copy"),
    ],
)
def test_only_a_copy_that_is_there_is_named(tmp_path: Path, copies: list[str], said: str) -> None:
    Journal(tmp_path / "j").close()
    db = sqlite3.connect(tmp_path / "j")
    db.execute("PRAGMA user_version = 3")
    db.close()
    for name in copies:
        (tmp_path / name).touch()
    with pytest.raises(Unavailable, match=said):
        Journal(tmp_path / "j")


def test_a_journal_is_opened_with_the_room_that_was_kept_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Journal(tmp_path / "j").close()
    ballast = tmp_path / "j.ballast"
    run = module._run

    def full(db: sqlite3.Connection, script: str) -> None:
        if ballast.exists() or never:
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        run(db, script)

    never = False
    monkeypatch.setattr(module, "_run", full)
    monkeypatch.setattr(module._Ballast, "take", lambda self: None)
    assert ballast.exists()
    journal = Journal(tmp_path / "j")
    assert journal.epoch == 2
    journal.close()
    never = True
    with pytest.raises(Unavailable, match=r"full\): make room on its disk and start the coordinator again"):
        Journal(tmp_path / "j")


def test_a_damaged_journal_is_said_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("something else\n" * 1000)
    journal = Journal(tmp_path / "j")
    journal.append("job/1", *(JobStarted(at=float(at)) for at in range(2000)))
    journal.close()
    data = bytearray((tmp_path / "j").read_bytes())
    data[8192:] = os.urandom(len(data) - 8192)
    (tmp_path / "j").write_bytes(data)
    with pytest.raises(Unavailable, match=r"damaged, or is no journal.*put a backup of it in its place"):
        Journal(tmp_path / "text")
    assert (tmp_path / "text").read_text().startswith("something else")
    with pytest.raises(Unavailable, match="damaged"):
        list(Journal(tmp_path / "j").replay("job/1", AnyEvent))  # type: ignore[arg-type]


def test_an_event_of_a_newer_potluck_is_named(tmp_path: Path) -> None:
    class Shiny(msgspec.Struct, tag=True):
        at: float

    journal = Journal(tmp_path / "j")
    journal.append("registry", Shiny(at=1.0))
    with pytest.raises(BadMessage, match=r"an event of registry that this potluck cannot read.*Shiny.*install"):
        list(journal.replay("registry", AnyEvent))  # type: ignore[arg-type]
    journal.close()


def test_a_migration_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "j")
    journal.append("job/1", JobStarted(at=1.0))
    journal.close()

    def half(db: sqlite3.Connection) -> None:
        db.execute("DELETE FROM events")
        db.execute("this is not SQL")

    monkeypatch.setattr(module, "_MIGRATIONS", (*module._MIGRATIONS, half))
    with pytest.raises(Unavailable, match="cannot be read"):
        Journal(tmp_path / "j")
    monkeypatch.undo()
    again = Journal(tmp_path / "j")
    assert list(again.replay("job/1", AnyEvent)) == [JobStarted(at=1.0)]  # type: ignore[arg-type]
    again.close()


async def test_nothing_is_synced_where_nothing_was_written_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, synced = Journal(tmp_path / "j"), list[int]()
    fsync, begun, release = os.fsync, threading.Event(), threading.Event()

    def counted(handle: int) -> None:
        begun.set()
        release.wait(10)
        fsync(handle)
        synced.append(os.fstat(handle).st_ino)

    monkeypatch.setattr("os.fsync", counted)
    wal = (tmp_path / "j-wal").stat().st_ino
    await journal.sync()
    assert synced == [], "opening it has synced what that wrote"
    journal.append("job/1", JobStarted(at=1.0))
    first = asyncio.create_task(journal.sync())
    await asyncio.to_thread(begun.wait, 10)
    second = asyncio.create_task(journal.sync())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not second.done(), "nothing is new, but the event is not on the disk yet"
    release.set()
    await asyncio.gather(first, second)
    await journal.follow()
    assert synced.count(wal) == 1
    journal.tell_soon(JobStarted(at=2.0))
    await journal.sync()
    assert synced.count(wal) == 2
    journal.snapshot("job/1", [])
    await journal.sync()
    assert synced.count(wal) == 3
    journal.close()


async def test_what_is_synced_is_on_the_disk_and_callers_share_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, synced = Journal(tmp_path / "j"), list[int]()
    fsync, release = os.fsync, threading.Event()

    def counted(handle: int) -> None:
        release.wait(10)
        synced.append(os.fstat(handle).st_ino)
        fsync(handle)

    monkeypatch.setattr("os.fsync", counted)
    journal.append_soon("job/1", JobStarted(at=1.0))
    first = asyncio.create_task(journal.sync())
    await asyncio.sleep(0)
    others = [asyncio.create_task(journal.sync()) for _ in range(20)]
    await asyncio.sleep(0)
    assert not first.done()
    release.set()
    await asyncio.gather(first, *others)
    assert synced.count((tmp_path / "j-wal").stat().st_ino) <= 2, (
        "one under way when they asked, and one that began after"
    )
    assert len(list(journal.replay("job/1", AnyEvent))) == 1  # type: ignore[arg-type]

    def fails(handle: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.fsync", fails)
    journal.append("job/1", JobStarted(at=2.0))
    with pytest.raises(Unavailable, match="Input/output error"):
        await journal.sync()
    monkeypatch.undo()
    for _ in range(2):
        with pytest.raises(Unavailable, match="start the coordinator again"):
            await journal.sync()  # the kernel reports it only once
    with pytest.raises(Unavailable, match="start the coordinator again"):
        journal.flush()
    with pytest.raises(Unavailable):
        journal.close()
