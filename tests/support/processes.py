"""Looks at processes that may end meanwhile."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil


def engines(node_pid: int) -> dict[str, psutil.Process]:
    """A node's engines by the names of their slots, `work` and `serve`.

    A node has other children too, such as the measurement of its speed. Any child may end while we look.
    """
    found = {}
    for child in psutil.Process(node_pid).children():
        try:
            command = child.cmdline()
        except psutil.NoSuchProcess:
            # ZombieProcess too, a subclass: the process ended, but its parent does not know yet.
            continue
        if "node.engine" in command:
            scratch = command[command.index("node.engine") + 3]
            found[Path(scratch).name] = child
    return found


def still_running(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Processes that have not ended; zombies count as ended."""
    return [one for one in processes if _runs(one)]


def commands(processes: Iterable[psutil.Process]) -> Counter[tuple[str, ...]]:
    """How many of these run each command, without numbers in it: a port may change after a restart. Ended processes are left out."""
    found: Counter[tuple[str, ...]] = Counter()
    for process in still_running(processes):
        try:
            found[tuple(word for word in process.cmdline() if not word.isdecimal())] += 1
        except psutil.NoSuchProcess:
            continue
    return found


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it ended just now
        return False


@contextlib.contextmanager
def throttled(process: psutil.Process, share: float, period_seconds: float = 0.1) -> Iterator[None]:
    """In each period, the process runs only for this share, as on a busy machine."""
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
