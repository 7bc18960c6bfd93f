"""A gate where tasks stand still, between two steps or batches, while inference on this node must keep its objective."""

from __future__ import annotations

import threading
from collections.abc import Callable

CHECK_SECONDS = 0.05


class Gate:
    """Open at first. One thread waits; others open and shut it."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()

    @property
    def shut(self) -> bool:
        return not self._open.is_set()

    def let(self, through: bool) -> None:
        """Open it, or shut it."""
        (self._open.set if through else self._open.clear)()

    def wait(self, until: Callable[[], bool]) -> None:
        """Return when the gate is open, or soon after `until()` is true."""
        while not self._open.wait(CHECK_SECONDS):
            if until():
                return
