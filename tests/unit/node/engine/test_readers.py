"""Somebody reads whatever is computed, frames are taken in order, and the end is the end."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence

import pytest

from node.engine import frames
from node.engine.readers import Readers
from node.engine.runtimes import Work

WAIT_SECONDS = 20


class Bench:
    """Readers of a queue. A batch is computed until it is let go; whatever else comes is taken at once."""

    def __init__(self, count: int) -> None:
        self._coming: queue.SimpleQueue[Sequence[frames.ToEngine]] = queue.SimpleQueue()
        self.taken: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.computed: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.let_go = {number: threading.Event() for number in range(10)}
        self.failure: BaseException | None = None
        self._readers = Readers(self._receive, self._take, count)
        self._main = threading.Thread(target=self._run)
        self._main.start()

    def say(self, *asked: frames.ToEngine) -> None:
        for frame in asked:
            self._coming.put([frame])

    def say_together(self, *asked: frames.ToEngine) -> None:
        self._coming.put(asked)

    def next_taken(self) -> int:
        return self.taken.get(timeout=WAIT_SECONDS)

    def next_computed(self) -> int:
        return self.computed.get(timeout=WAIT_SECONDS)

    def end(self) -> None:
        self.say_together()
        self.join()

    def join(self) -> None:
        self._main.join(WAIT_SECONDS)
        assert not self._main.is_alive()

    def _run(self) -> None:
        try:
            self._readers.run()
        except OSError as error:
            self.failure = error

    def _receive(self) -> Sequence[frames.ToEngine]:
        found = self._coming.get(timeout=WAIT_SECONDS)
        if not found:
            self._coming.put(found)  # from then on
        return found

    def _take(self, frame: frames.ToEngine) -> Work | None:
        self.taken.put(frame.number)
        if not isinstance(frame, frames.RunBatch):
            return None

        def compute() -> None:
            assert self.let_go[frame.number].wait(WAIT_SECONDS)
            if frame.replica_id == "gone":
                raise OSError("the parent is gone")
            self.computed.put(frame.number)

        return compute


def batch(number: int, replica_id: str = "r") -> frames.RunBatch:
    return frames.RunBatch(number=number, replica_id=replica_id, requests=())


def cancel(number: int) -> frames.CancelBatch:
    return frames.CancelBatch(number=number)


def test_frames_are_read_in_order_while_a_batch_is_computed() -> None:
    bench = Bench(count=2)
    bench.say(batch(1), *(cancel(number) for number in range(2, 8)))
    assert [bench.next_taken() for _ in range(7)] == [1, 2, 3, 4, 5, 6, 7]
    assert bench.computed.empty()
    bench.let_go[1].set()
    assert bench.next_computed() == 1
    bench.end()
    assert bench.failure is None


def test_as_many_compute_at_the_same_time_as_there_are_threads_for() -> None:
    bench = Bench(count=3)
    bench.say(batch(1), batch(2), cancel(3))
    assert [bench.next_taken() for _ in range(3)] == [1, 2, 3]
    bench.let_go[2].set()
    assert bench.next_computed() == 2
    bench.let_go[1].set()
    assert bench.next_computed() == 1
    bench.say(batch(4))
    bench.let_go[4].set()
    assert bench.next_computed() == 4
    bench.end()


def test_what_came_together_is_taken_before_any_of_it_is_computed() -> None:
    bench = Bench(count=3)
    for number in (1, 2):
        bench.let_go[number].set()
    bench.say_together(batch(1), batch(2), cancel(3))
    assert [bench.next_taken() for _ in range(3)] == [1, 2, 3]
    assert {bench.next_computed(), bench.next_computed()} == {1, 2}
    bench.end()


def test_the_end_does_not_wait_for_what_is_computed() -> None:
    bench = Bench(count=2)
    bench.say(batch(1))
    assert bench.next_taken() == 1
    bench.end()
    assert bench.computed.empty()
    bench.let_go[1].set()
    assert bench.next_computed() == 1


def test_what_a_thread_cannot_go_on_for_ends_all() -> None:
    bench = Bench(count=2)
    bench.say(batch(1, "gone"))
    bench.let_go[1].set()
    bench.join()
    with pytest.raises(OSError, match="the parent is gone"):
        raise bench.failure or AssertionError
    bench.say_together()
