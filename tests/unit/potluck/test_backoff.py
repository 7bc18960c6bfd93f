"""A daemon that crashes again and again waits longer each time; one that lived for a while does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from potluck import backoff, daemons, lifecycle


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [1000.0]
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    monkeypatch.setattr(backoff, "time", SimpleNamespace(monotonic=lambda: now[0]))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)}
    yield now
    for number, handler in handlers.items():
        signal.signal(number, handler)


def lives(clock: list[float], *seconds: float) -> list[float]:
    """The pauses before these lives, and before the one after them."""
    pauses = []
    for life in (*seconds, 0.0):
        pauses.append(backoff.pause_seconds(backoff.crashes()))
        clock[0] += pauses[-1] + life
    return pauses


def test_the_pause_grows_to_a_minute(clock: list[float]) -> None:
    assert lives(clock, *[0.5] * 9) == [0, 0, 2, 4, 8, 16, 32, 60, 60, 60]


def test_a_daemon_that_lived_for_a_minute_is_back_at_once(clock: list[float]) -> None:
    assert lives(clock, 1, 1, 1, 61, 1, 1) == [0, 0, 2, 4, 0, 0, 2]


def test_who_ends_in_order_has_not_crashed(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemons, "check", lambda name: None)
    monkeypatch.setattr(daemons.importlib, "import_module", lambda name: SimpleNamespace(main=lambda: None))
    monkeypatch.setattr(lifecycle, "pause_after_crashes", lambda *told: pytest.fail(f"waits: {told}"))
    for _ in range(4):
        daemons.start("node")


def test_what_cannot_be_read_or_written_holds_nobody_up(
    clock: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / backoff.FILE).write_text("half a li")
    assert lives(clock, 1, 1) == [0, 0, 2]
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "none"))
    assert lives(clock, 1, 1, 1) == [0, 0, 0, 0]
    monkeypatch.delenv("RUNTIME_DIRECTORY")
    assert lives(clock, 1, 1, 1) == [0, 0, 0, 0], "outside of a unit nothing is counted"


def test_a_daemon_waits_before_anything_else_and_says_why(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []
    monkeypatch.setattr(lifecycle, "notify", done.append)
    monkeypatch.setattr(lifecycle, "time", SimpleNamespace(sleep=done.append))
    monkeypatch.setattr(daemons, "check", lambda name: done.append("checked"))
    monkeypatch.setattr(daemons.importlib, "import_module", lambda name: pytest.fail("stop here"))
    for _ in range(2):
        backoff.crashes()
    with pytest.raises(pytest.fail.Exception):
        daemons.start("node")
    status = "STATUS=waits 2 s before it starts: it has ended 2 times in a row soon after its start"
    assert done == [f"{status}\nEXTEND_TIMEOUT_USEC=92000000", 2.0, "checked"]


IMPORTS_FOR_LONG = """
import importlib, sys, time
from potluck import daemons

def import_module(name):
    print("imports", file=sys.stderr, flush=True)
    time.sleep(60)

daemons.check = lambda name: None
importlib.import_module = import_module
daemons.start("node")
"""


@pytest.mark.parametrize(("lives", "words"), [(0, "imports"), (7, "waits 60 s before it starts")])
def test_a_stop_before_the_daemon_runs_is_in_order_and_a_reload_is_nothing(
    tmp_path: Path, lives: int, words: str
) -> None:
    file = tmp_path / backoff.FILE
    file.write_text(f"{lives} {time.monotonic()}")
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORTS_FOR_LONG],
        env=os.environ | {"RUNTIME_DIRECTORY": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stderr is not None
            assert words in process.stderr.readline()
            assert file.read_text().startswith(f"{lives + 1} ")
            process.send_signal(signal.SIGHUP)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0, "SIGHUP comes first, and would have ended it"
        finally:
            process.kill()
    assert not file.exists()
