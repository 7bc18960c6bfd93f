"""The threads that read what the parent says: one at a time, so that frames are seen in order, and always one, so that they are seen at once."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence

from node.engine import frames
from node.engine.runtimes import Work

Receive = Callable[[], Sequence[frames.ToEngine]]
"""The frames that come next; none at the end, and from then on."""
Take = Callable[[frames.ToEngine], Work | None]
"""Do about a frame what can be done at once; what is to be computed is returned."""


class Readers:
    """Leaders and followers (Schmidt et al., 2000): who has read something to compute computes it, and the next one reads on.

    So nothing is handed from thread to thread on its way to an answer. `count`: one more than may compute at the same time.
    """

    def __init__(self, receive: Receive, take: Take, count: int) -> None:
        self._receive = receive
        self._take = take
        self._count = count
        self._reading = threading.Lock()
        self._works: deque[Work] = deque()
        self._ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def run(self) -> None:
        """Until the end, whatever is computed then. Raises what reading, taking or computing raised."""
        for number in range(self._count):
            threading.Thread(target=self._run, name=f"reader {number}", daemon=True).start()
        failure = self._ended.get()
        if failure is not None:
            raise failure

    def _run(self) -> None:
        try:
            while (work := self._read()) is not None:
                work()
        except BaseException as error:  # noqa: BLE001 - `run` raises it
            self._ended.put(error)
        else:
            self._ended.put(None)

    def _read(self) -> Work | None:
        """Take frames until there is something to compute, with all that came together: the last may cancel the first. None at the end."""
        with self._reading:
            while not self._works:
                found = self._receive()
                if not found:
                    return None
                self._works.extend(work for frame in found if (work := self._take(frame)) is not None)
            return self._works.popleft()
