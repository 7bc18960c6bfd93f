"""The threads that read frames from the parent. One reads at a time, so frames are seen in order; one always reads, so at once."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence

from node.engine import frames
from node.engine.runtimes import Work

Receive = Callable[[], Sequence[frames.ToEngine]]
"""Returns the next frames; none at the end, and ever after."""
Take = Callable[[frames.ToEngine], Work | None]
"""Does what can be done about a frame at once. Returns the rest: what is to be computed."""


class Readers:
    """Leaders and followers (Schmidt et al., 2000): a thread that reads work computes it, and the next thread reads on.

    So no work is passed from thread to thread. `count`: one more than may compute at the same time.
    """

    def __init__(self, receive: Receive, take: Take, count: int) -> None:
        self._receive = receive
        self._take = take
        self._count = count
        self._reading = threading.Lock()
        self._works: deque[Work] = deque()
        self._ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def run(self) -> None:
        """Run until the end, even if work is still computed. Raises what reading, taking or computing raised."""
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
        """Take frames until there is work. Frames that came together are all taken: the last may cancel the first. None: the end."""
        with self._reading:
            while not self._works:
                found = self._receive()
                if not found:
                    return None
                self._works.extend(work for frame in found if (work := self._take(frame)) is not None)
            return self._works.popleft()
