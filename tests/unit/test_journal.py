"""The journal: what is appended is there after a crash, once, in order; and each opening is a new epoch."""

import os
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pytest

from coordinator.journal import Journal
from coordinator.plans.job import AnyEvent, AttemptEnded, JobStarted
from potluck.errors import Conflict, Unavailable
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
    for least, expected in ((100, 100), (50, 101)):
        journal = Journal(tmp_path / "j", least_epoch=least)
        assert journal.epoch == expected
        journal.close()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    with pytest.raises(Conflict, match="another coordinator"):
        Journal(tmp_path / "j")
    journal.close()


def test_a_full_disk_is_said_and_loses_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.append("job/1", JobStarted(at=1.0))
    pages = journal._db.execute("PRAGMA page_count").fetchone()[0]
    journal._db.execute(f"PRAGMA max_page_count = {pages + 1}")  # SQLite says the same of that as of a full disk
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


def test_rewriting_replaces_a_stream(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.append("job/1", JobStarted(at=1.0), JobStarted(at=2.0))
    journal.rewrite("job/1", [JobStarted(at=3.0)])
    assert [event.at for event in journal.replay("job/1", AnyEvent)] == [3.0]  # type: ignore[arg-type]
    journal.rewrite("job/1", [])
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
