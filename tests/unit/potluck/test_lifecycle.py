"""How a daemon starts, ends, and speaks to systemd's journal."""

from __future__ import annotations

import ast
import asyncio
import faulthandler
import gc
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from potluck import lifecycle, logs
from potluck.errors import CannotListen, Conflict, InvalidSettings, Unavailable, expected, from_code
from potluck.settings import CoordinatorSettings
from support.eventually import eventually

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(logs, "configure", lambda level: None)
    monkeypatch.setattr(faulthandler, "enable", lambda: None)  # pytest has its own
    hangup = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, hangup)
    gc.unfreeze()


def test_what_a_daemon_has_imported_is_not_looked_at_by_each_collection() -> None:
    frozen: list[int] = []

    async def serve(settings: CoordinatorSettings) -> None:
        frozen.append(gc.get_freeze_count())

    lifecycle.run_daemon("test", CoordinatorSettings, serve)
    assert frozen[0] > 1000


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Unavailable("no broker"), 4),
        (Conflict("another node"), 1),
        (InvalidSettings("wrong"), 2),
        (CannotListen("no such address"), 5),
    ],
)
def test_an_expected_error_in_a_group_of_tasks_is_one_line_and_an_exit_code(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    async def fail() -> None:
        raise error

    async def serve(settings: CoordinatorSettings) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fail())

    with pytest.raises(SystemExit) as ended:  # and not a group that contains it
        lifecycle.run_daemon("test", CoordinatorSettings, serve)
    assert ended.value.code == code
    assert capsys.readouterr().err == f"test: {error}\n"


def test_a_defect_ends_a_daemon_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    async def serve(settings: CoordinatorSettings) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(asyncio.to_thread(int, "no number"))

    with pytest.raises(SystemExit) as ended:
        lifecycle.run_daemon("test", CoordinatorSettings, serve)
    assert ended.value.code == 1
    assert "ended by a defect" in caplog.text
    assert "ValueError: invalid literal" in caplog.text


def test_an_error_is_expected_where_nothing_else_is_with_it() -> None:
    one, two = Unavailable("one"), Conflict("two")
    assert expected(one) is one
    assert expected(ExceptionGroup("", [ExceptionGroup("", [one]), two])) is one
    assert expected(BaseExceptionGroup("", [one, KeyboardInterrupt()])) is None
    assert expected(ValueError()) is None


def test_an_error_from_the_wire_is_of_the_class_that_gave_its_code_the_name() -> None:
    assert type(from_code("invalid_settings", "")) is InvalidSettings


def test_nothing_is_caught_in_groups_by_except_star() -> None:
    """Before Python 3.11.4, an error raised in it (SystemExit too) comes out in a group; Debian 12 has 3.11.2."""
    sources = [path for name in ("potluck", "node", "coordinator") for path in (ROOT / name).rglob("*.py")]
    assert sources
    starred = [
        path for path in sources for found in ast.walk(ast.parse(path.read_text())) if type(found) is ast.TryStar
    ]
    assert starred == []


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a daemon with a watchdog, which is ready and reports often, tells systemd."""
    lines: list[str] = []
    monkeypatch.setattr(lifecycle, "notify", lambda state: lines.extend(state.splitlines()))
    monkeypatch.setattr(lifecycle, "REPORT_SECONDS", 0.01)
    monkeypatch.setattr(lifecycle, "LATE_SECONDS", 0.2)
    monkeypatch.setattr(lifecycle, "_watched", True)
    monkeypatch.setattr(lifecycle, "_ready", True)
    return lines


async def test_only_a_daemon_that_is_well_feeds_the_watchdog(told: list[str], caplog: pytest.LogCaptureFixture) -> None:
    wrong = ""
    asked: list[str] = []

    def unwell() -> str:
        asked.append(wrong)
        return wrong

    report = asyncio.create_task(lifecycle.report(lambda: ("state", ""), unwell))
    await eventually(lambda: told.count("WATCHDOG=1") > 1)
    wrong, fed = "the bus hangs", told.count("WATCHDOG=1")
    await eventually(lambda: asked.count(wrong) > 3)
    assert told.count("WATCHDOG=1") == fed
    assert caplog.text.count("the bus hangs") == 1
    wrong = ""
    await eventually(lambda: told.count("WATCHDOG=1") > fed)
    report.cancel()


async def test_a_loop_that_is_late_again_does_not_feed_the_watchdog(
    told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle.log, "error", lambda form, facts: told.append(facts))
    monkeypatch.setattr(lifecycle.log, "warning", lambda form, facts: told.append(facts))
    wrong = ""
    report = asyncio.create_task(lifecycle.report(lambda: ("state", ""), lambda: wrong))
    await eventually(lambda: "WATCHDOG=1" in told)
    wrong = "nobody watches an engine"  # who watches has been standing still too: that says nothing
    turns = []
    for _ in range(2):
        before = len(told)
        time.sleep(0.3)  # noqa: ASYNC251 - the loop hangs
        await eventually(lambda before=before: len(told) > before, every=0)  # type: ignore[misc]
        turns.append(told[before:])
    assert turns[0][0].startswith("late_seconds=0.")
    assert turns[1][0].startswith("reason='the event loop was 0.")
    assert [turn[1:] for turn in turns] == [["WATCHDOG=1"], []], "once late is not dead"
    wrong = ""
    await eventually(lambda: told[-1] == "WATCHDOG=1")
    report.cancel()


async def test_until_it_is_ready_a_daemon_asks_for_more_time(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "_ready", False)
    report = asyncio.create_task(lifecycle.report(lambda: ("state", ""), lambda: ""))
    await eventually(lambda: told.count("EXTEND_TIMEOUT_USEC=8000000") > 1)
    lifecycle.ready()
    lifecycle.ready()
    asked, fed = told.count("EXTEND_TIMEOUT_USEC=8000000"), told.count("WATCHDOG=1")
    await eventually(lambda: told.count("WATCHDOG=1") > fed + 1)
    assert told.count("EXTEND_TIMEOUT_USEC=8000000") == asked
    assert told.count("READY=1") == 1
    report.cancel()


LOGGING = """
import logging
from potluck import logs
logs.configure("DEBUG")
log = logging.getLogger("test")
log.debug("fine")
log.info("told")
log.warning("odd")
try:
    int("x")
except ValueError:
    log.exception("wrong")
logs.say(logging.ERROR, "for people")
"""


@pytest.mark.parametrize("journal", [True, False])
def test_lines_have_priorities_where_standard_error_is_the_journals(tmp_path: Path, journal: bool) -> None:
    with (tmp_path / "err").open("w+") as file:
        found = os.fstat(file.fileno())
        # A unit's children inherit the variable, wherever their own standard error goes.
        stream = f"{found.st_dev}:{found.st_ino if journal else found.st_ino + 1}"
        subprocess.run(
            [sys.executable, "-c", LOGGING],
            env=os.environ | {"JOURNAL_STREAM": stream},
            stderr=file,
            check=True,
            timeout=60,
        )
    lines = (tmp_path / "err").read_text().splitlines()
    if not journal:
        assert not any(line.startswith("<") for line in lines)
        assert lines[-1] == "for people"
        return
    assert [line[:3] for line in lines[:3]] == ["<7>", "<6>", "<4>"]
    assert {line[:3] for line in lines[3:]} == {"<3>"}, "also the lines of a traceback"
    assert lines[1] == f"<6>{logging.getLevelName(logging.INFO):7} test told"
    assert lines[-1] == "<3>for people"


def test_a_daemon_takes_as_many_files_as_it_may() -> None:
    code = (
        "import resource\nfrom potluck import lifecycle\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 300))\n"
        "print(lifecycle.raise_file_limit(), resource.getrlimit(resource.RLIMIT_NOFILE), lifecycle.raise_file_limit())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "300 (300, 300) 300\n"


def test_lines_of_a_kind_are_counted_where_there_are_many() -> None:
    now = [0.0]
    seldom = logs.SeldomFilter(count=2, seconds=10.0, clock=lambda: now[0])

    def said(text: str) -> str | None:
        record = logging.LogRecord("n", logging.WARNING, "", 0, text, ("v",), None)
        return record.getMessage() if seldom.filter(record) else None

    assert [said("one %s\nmore") for _ in range(5)] == ["one v\nmore"] * 2 + [None] * 3
    assert said("two %s") == "two v"
    now[0] = 10.0
    assert said("one %s") == "one v (3 more of these were left out)"
    assert said("one %s") == "one v"
    assert said("one %s") is None
