"""Work that is done in turn: one piece after the other, in order of arrival."""

from __future__ import annotations

import threading

from node.engine.runtimes import Work
from potluck.errors import Overloaded


class Turns:
    """Has no thread. A thread that brings work while no other thread works does all work, until none is left."""

    def __init__(self, limit: int) -> None:
        """`limit`: how many pieces may wait."""
        self._limit = limit
        self._lock = threading.Lock()
        self._waiting: dict[int, Work] = {}
        self._under_way = False

    def add(self, number: int, work: Work) -> Work | None:
        """The work that the caller must do; None: another thread does it. Raises Overloaded."""
        with self._lock:
            if len(self._waiting) >= self._limit:
                raise Overloaded(f"{self._limit} batches wait for this engine", retry_after_seconds=1.0)
            self._waiting[number] = work
            if self._under_way:
                return None
            self._under_way = True
        return self._do_all

    def withdraw(self, number: int) -> bool:
        """Skip a piece, unless its turn has come. Returns whether it was skipped."""
        with self._lock:
            return self._waiting.pop(number, None) is not None

    def _do_all(self) -> None:
        while (work := self._next()) is not None:
            work()

    def _next(self) -> Work | None:
        with self._lock:
            for number in self._waiting:
                return self._waiting.pop(number)
            self._under_way = False
            return None
