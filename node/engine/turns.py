"""Work that is done in turn: one piece after the other, in the order in which it came."""

from __future__ import annotations

import threading

from node.engine.runtimes import Work
from potluck.errors import Overloaded


class Turns:
    """Has no thread of its own: whoever brings work when there is none does all of it, until none is left."""

    def __init__(self, limit: int) -> None:
        """`limit`: pieces that may wait."""
        self._limit = limit
        self._lock = threading.Lock()
        self._waiting: dict[int, Work] = {}
        self._under_way = False

    def add(self, number: int, work: Work) -> Work | None:
        """What the caller is to do; None where another thread is at it. Raises Overloaded."""
        with self._lock:
            if len(self._waiting) >= self._limit:
                raise Overloaded(f"{self._limit} batches wait for this engine", retry_after_seconds=1.0)
            self._waiting[number] = work
            if self._under_way:
                return None
            self._under_way = True
        return self._do_all

    def withdraw(self, number: int) -> bool:
        """Leave a piece out, unless its turn has come; whether it was left out."""
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
