"""A state folder has one user; its lock says who, and ends with the process."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from potluck import sole_use as sole_use_module
from potluck.cli import here
from potluck.errors import Conflict, InvalidSettings
from potluck.sole_use import clock_text, lock_of, sole_use, user_of, users_here

HOLD = "import sys, time; from pathlib import Path; from potluck.sole_use import sole_use\nwith sole_use(Path(sys.argv[1]), 'node', 'lab'): print(flush=True); time.sleep(60)"


def test_a_lock_says_whose_it_is_and_ends_with_its_process(tmp_path: Path) -> None:
    folder = tmp_path / "node"
    folder.mkdir()
    assert user_of(folder, "node") is None
    began = time.time()
    with subprocess.Popen((sys.executable, "-c", HOLD, str(folder)), stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        user = user_of(folder, "node")
        assert user is not None
        assert (user.what, user.cluster, user.pid) == ("node", "lab", other.pid)
        assert abs(user.since - began) < 30
        assert str(user) == f"node (pid {other.pid}, cluster 'lab', since {clock_text(user.since)})"
        assert here.users(tmp_path) == [user]
        with (
            pytest.raises(Conflict, match=rf"in use by another node \(pid {other.pid}, .*--state-dir"),
            sole_use(folder, "node", "x"),
        ):
            pass
        other.kill()
    with sole_use(folder, "coordinator", "lab"):  # another kind, in the same folder
        pass
    assert user_of(folder, "node") is None, "what a process left that was killed is no trouble"
    with sole_use(folder, "node", "lab"):
        assert user_of(folder, "node") is not None
    assert user_of(folder, "node") is None


def test_a_lock_without_a_name_is_still_one(tmp_path: Path) -> None:
    with sole_use(tmp_path, "node", "lab"):
        lock_of(tmp_path, "node").write_text("")  # it has just been locked
        user = user_of(tmp_path, "node")
        assert user is not None
        assert user.pid == 0


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="choose one with --state-dir"), sole_use(tmp_path / "none", "node", "x"):
        pass


def test_a_user_on_another_machine_is_said_to_be_there(tmp_path: Path) -> None:
    lock_of(tmp_path, "node").touch()
    with sole_use(tmp_path, "node", "lab"):
        lock_of(tmp_path, "node").write_text(f'{{"what": "node", "pid": {os.getpid()}, "host": "attic"}}')
        user = user_of(tmp_path, "node")
        assert user is not None
        assert user.elsewhere
        assert str(user) == f"node (on attic, pid {os.getpid()})"


def test_what_is_told_of_the_broker_is_read_with_the_lock(tmp_path: Path) -> None:
    with sole_use(tmp_path, "node", "lab") as tell:
        for broker in ("127.0.0.1:18830", "10.0.0.1:1883", ""):  # the shorter text leaves nothing of the longer one
            tell(broker)
            user = user_of(tmp_path, "node")
            assert user is not None
            assert (user.broker, user.cluster, user.folder) == (broker, "lab", str(tmp_path))


def test_users_are_seen_in_whatever_folder(tmp_path: Path) -> None:
    folder = tmp_path / "of" / "my own"
    folder.mkdir(parents=True)
    mine = [user for user in users_here() if user.folder == str(folder)]
    assert mine == []
    with subprocess.Popen((sys.executable, "-c", HOLD, str(folder)), stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        os.kill(other.pid, signal.SIGSTOP)  # a hanging process still has the lock
        (user,) = [user for user in users_here() if user.folder == str(folder)]
        assert (user.what, user.cluster, user.pid) == ("node", "lab", other.pid)
        other.kill()
    assert [user for user in users_here() if user.folder == str(folder)] == []


def test_without_a_list_of_locks_nobody_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sole_use_module, "LOCKS", tmp_path / "none")
    with sole_use(tmp_path, "node", "lab"):
        assert users_here() == []


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with (
        pytest.raises(InvalidSettings, match="No space left on device: make room on its disk"),
        sole_use(tmp_path, "up", "c"),
    ):
        pass
