"""Processes that tests look at while they may end."""

from __future__ import annotations

from collections.abc import Iterable
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
