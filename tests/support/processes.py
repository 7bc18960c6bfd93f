"""Processes that tests look at while they may end."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil


def engines(node_pid: int) -> dict[str, psutil.Process]:
    """A node's engines by the names of their slots, `work` and `serve`.

    A node has other children, too, such as the measurement of its speed: any child may end while we look.
    """
    found = {}
    for child in psutil.Process(node_pid).children():
        try:
            command = child.cmdline()
        except psutil.NoSuchProcess:  # and ZombieProcess, which is one: it ended, and its parent has not heard so yet
            continue
        if "node.engine" in command:
            scratch = command[command.index("node.engine") + 3]
            found[Path(scratch).name] = child
    return found


def still_running(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that neither ended nor wait as zombies for their parent."""
    return [one for one in processes if _runs(one)]


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # between the two
        return False


@contextlib.contextmanager
def throttled(process: psutil.Process, share: float, period_seconds: float = 0.1) -> Iterator[None]:
    """The process runs for this share of each period only, as beside others on a busy machine."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(period_seconds * share):
            process.send_signal(signal.SIGSTOP)
            over.wait(period_seconds * (1 - share))
            process.send_signal(signal.SIGCONT)

    thread = threading.Thread(target=work, name="throttle")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
