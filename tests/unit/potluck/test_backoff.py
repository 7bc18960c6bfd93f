"""A daemon that crashes again and again waits longer each time; one that lived for a while does not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from potluck import backoff, daemons, lifecycle


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    monkeypatch.setattr(backoff, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


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
