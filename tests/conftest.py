"""For every test: it fails when it leaves a thread or a child process behind."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import settings

from support.processes import commands

# As at users, who do not set it: with it, pytest rewrites each test file in each worker at each run, and each daemon and command
# compiles all of potluck at its start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

settings.register_profile("potluck", deadline=None)  # an example's time only shows how busy the machine is
settings.load_profile("potluck")

_SHARED_THREADS = ("asyncio_", "ThreadPoolExecutor", "pydevd", "tqdm", "tf_")
"""Threads of pools that live as long as their loop or process: they hold no work of a test."""
_GRACE_SECONDS = 3.0


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out tests/systemd unless it is named, as `make test-systemd` does: it boots machines, and measures how long that takes."""
    if collection_path == Path(__file__).with_name("systemd"):
        return None if any("systemd" in Path(argument).parts for argument in config.args) else True
    return None


def pytest_collection_finish() -> None:
    """Leave what was imported out of full collections of garbage: there are many in a run, and each would look at all of it."""
    gc.freeze()


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """Restore the log level: the command line, when a test calls it in this process, lets only errors through."""
    logger = logging.getLogger("potluck")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    """Fails a test after which a thread or a child process is left that was not there before."""
    # Direct children: a cluster that several tests share starts engines of its own when it needs them. Those with the
    # command of one that was there before take its place: daemons of such a cluster that were killed and started again.
    there_before = psutil.Process().children()
    children_before = commands(there_before)
    threads_before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + _GRACE_SECONDS
    while True:
        threads = [
            thread.name
            for thread in threading.enumerate()
            if thread not in threads_before and not thread.name.startswith(_SHARED_THREADS)
        ]
        # By who they are, and not by their commands alone: `ip netns exec` becomes the command that it was given.
        new = (child for child in psutil.Process().children() if child not in there_before)
        children = commands(new) - (children_before - commands(there_before))
        if not threads and not children:
            return
        if time.monotonic() > deadline:
            pytest.fail(f"left behind: threads {threads}, processes {[' '.join(command) for command in children]}")
        time.sleep(0.02)
