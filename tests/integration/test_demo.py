"""`potluck demo` trains, deploys and asks. Also after Ctrl-C it leaves nothing behind: no process, no folder, no open port."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from potluck.lifecycle import die_with_parent
from support.processes import still_running

pytestmark = [pytest.mark.tensorflow, pytest.mark.timeout(300)]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where the demo keeps its temporary folders; empty again when it is over."""
    yield tmp_path
    assert not list(tmp_path.iterdir())


def interruptible() -> None:
    """Do not ignore SIGINT: a background process of a shell does, and Python keeps that; in a terminal it is not ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(folder: Path) -> subprocess.Popen[str]:
    dies_with_us = die_with_parent()

    def prepare() -> None:
        interruptible()
        if dies_with_us is not None:
            dies_with_us()

    return subprocess.Popen(
        [sys.executable, "-m", "potluck.cli.main", "demo"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"TMPDIR": str(folder), "COLUMNS": "100"}, preexec_fn=prepare,
    )  # fmt: skip


def test_the_demo_does_the_main_job(folder: Path) -> None:
    demo = start(folder)
    said, _ = demo.communicate(timeout=280)
    assert demo.returncode == 0, said
    assert "SIGKILL to node node-3" in said
    accuracy = re.search(r"359 items.*?accuracy (\d\.\d+)", said, re.DOTALL)
    assert accuracy is not None
    assert float(accuracy[1]) >= 0.97
    assert said.count("1 of 1 right") + said.count("10 of 10 right") >= 2
    assert said.rstrip().endswith("removed.")


@pytest.mark.parametrize(("number", "seconds"), [(signal.SIGINT, 0.5), (signal.SIGINT, 10.0), (signal.SIGTERM, 10.0)])
def test_an_interrupted_demo_leaves_nothing(folder: Path, number: signal.Signals, seconds: float) -> None:
    demo = start(folder)
    assert demo.stdout is not None
    said = demo.stdout.readline() + demo.stdout.readline() + demo.stdout.readline()  # it has begun
    deadline = time.monotonic() + seconds
    seen: dict[int, psutil.Process] = {}
    process = psutil.Process(demo.pid)
    while time.monotonic() < deadline:  # interrupt it at some point, and note what it has started by then
        seen |= {child.pid: child for child in process.children(recursive=True)}
        time.sleep(0.1)
    assert demo.poll() is None
    demo.send_signal(number)
    rest, _ = demo.communicate(timeout=60)
    said += rest
    assert demo.returncode == 130, said
    assert "Interrupted" in said
    assert still_running(seen.values()) == []
