"""What an engine does about frames, with runtimes that only play: one that computes on the reading thread, one with a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from node.engine import frames
from node.engine.answering import answer
from node.engine.gate import Gate
from node.engine.readers import Readers
from node.engine.runtimes import RuntimeInfo, Send, Work
from node.engine.server import TASKS_LIMIT, Server
from node.engine.turns import Turns
from potluck.errors import InvalidModel
from potluck.wire.tasks import EvaluateResult, EvaluateTask
from potluck.wire.values import BlobRef, DataFormat, ModelFormat, Signature

WAIT_SECONDS = 20
MODEL = BlobRef(sha256="0" * 64, size=1)
TASK = EvaluateTask(model=MODEL, weights=None, slices=(), format=DataFormat(kind="arrays"), image=None, batch_size=1)


class Blocking:
    """Computes one batch after the other, each until it is let go, as TensorFlow does. One of the replica `bad` is a defect."""

    name = "blocking"
    title = "Blocking"
    extra = "engine"
    formats: tuple[ModelFormat, ...] = ("keras",)

    def __init__(self, limit: int = 3) -> None:
        self.begun: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.let_go: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._turns = Turns(limit)

    def installed(self) -> bool:
        return True

    def start(self) -> RuntimeInfo:
        return RuntimeInfo({self.name: "1"})

    def load(self, asked: frames.LoadReplica) -> tuple[Signature, int, int]:
        return Signature(inputs=(), outputs=()), 0, 0

    def unload(self, replica_id: str) -> None:
        pass

    def take(self, batch: frames.RunBatch, send: Send) -> Work | None:
        return self._turns.add(batch.number, lambda: answer(send, batch.number, lambda: self._run(batch)))

    def cancel(self, number: int) -> bool:
        return self._turns.withdraw(number)

    def _run(self, batch: frames.RunBatch) -> frames.BatchRun:
        self.begun.put(batch.number)
        self.let_go.get(timeout=WAIT_SECONDS)
        if batch.replica_id == "bad":
            raise ZeroDivisionError("a defect")
        return frames.BatchRun(number=batch.number, outcomes=(), seconds=0.0)


class Together(Blocking):
    """Has as many batches under way as it is given, and answers the last one first: as a runtime does that schedules by itself."""

    name = "together"
    formats: tuple[ModelFormat, ...] = ("tflite",)

    def __init__(self) -> None:
        super().__init__()
        self._under_way: dict[int, Send] = {}

    def take(self, batch: frames.RunBatch, send: Send) -> Work | None:
        self._under_way[batch.number] = send
        self.begun.put(batch.number)
        return None

    def cancel(self, number: int) -> bool:
        return self._under_way.pop(number, None) is not None

    def answer_all(self) -> None:
        for number in sorted(self._under_way, reverse=True):
            self._under_way.pop(number)(frames.BatchRun(number=number, outcomes=(), seconds=0.0))


class PlayedTasks:
    """A task tells of a step, then stands at the gate, until it is cancelled."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.forgotten: queue.SimpleQueue[str] = queue.SimpleQueue()

    def run(self, job_id: str, task: Any, files: Any, cancelled: threading.Event, progress: Any) -> EvaluateResult:
        progress(1, {})
        self.gate.wait(cancelled.is_set)
        if cancelled.is_set():
            raise InvalidModel("cancelled")
        return EvaluateResult(count=1)

    def forget(self, job_id: str) -> None:
        self.forgotten.put(job_id)

    def train_ahead(self, until: Any) -> None:
        pass


class Bench:
    """A server with its readers, and a parent's end."""

    def __init__(self) -> None:
        self.blocking, self.together, self.tasks = Blocking(), Together(), PlayedTasks()
        self._asked: queue.SimpleQueue[Sequence[frames.ToEngine]] = queue.SimpleQueue()
        self._said: queue.SimpleQueue[frames.Frame] = queue.SimpleQueue()
        self._server = Server(self._said.put, (self.blocking, self.together), self.tasks)  # type: ignore[arg-type]
        self._main = threading.Thread(target=Readers(self._receive, self._server.take, count=3).run)
        self._main.start()
        for replica_id, model_format in (("r", "keras"), ("bad", "keras"), ("many", "tflite")):
            self.ask(frames.LoadReplica(number=1000, replica_id=replica_id, path="", format=model_format))  # type: ignore[arg-type]
            assert isinstance(self.hear(), frames.ReplicaLoaded)

    def ask(self, *asked: frames.ToEngine) -> None:
        """Together, as what waits in a socket is read."""
        self._asked.put(asked)

    def hear(self) -> frames.Frame:
        return self._said.get(timeout=WAIT_SECONDS)

    def heard(self) -> tuple[int, str]:
        """Number and error code of the next answer."""
        frame = self.hear()
        return frame.number, frame.error.code if isinstance(frame, frames.Failed) else ""

    @property
    def silent(self) -> bool:
        return self._said.empty()

    def close(self) -> None:
        self._asked.put(())
        self._main.join(WAIT_SECONDS)
        assert not self._main.is_alive()
        self._server.close()

    def _receive(self) -> Sequence[frames.ToEngine]:
        found = self._asked.get()
        if not found:
            self._asked.put(found)  # from then on
        return found


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def batch(number: int, replica_id: str = "r") -> frames.RunBatch:
    return frames.RunBatch(number=number, replica_id=replica_id, requests=())


def test_a_batch_that_is_cancelled_before_its_turn_is_answered_at_once_and_never_begins(bench: Bench) -> None:
    bench.ask(batch(1))
    bench.ask(batch(2), batch(3), frames.CancelBatch(number=2), frames.CancelBatch(number=77))
    assert bench.heard() == (2, "cancelled")
    assert bench.blocking.begun.get(timeout=WAIT_SECONDS) == 1
    bench.ask(frames.CancelBatch(number=1))  # too late: it is computed, and answered
    for _ in range(2):
        bench.blocking.let_go.put(None)
    assert [bench.heard(), bench.heard()] == [(1, ""), (3, "")]
    assert bench.blocking.begun.get(timeout=WAIT_SECONDS) == 3
    assert bench.blocking.begun.empty()
    assert bench.silent


def test_a_batch_whose_cancellation_came_with_it_never_begins(bench: Bench) -> None:
    bench.ask(batch(1), batch(2), frames.CancelBatch(number=1))
    assert bench.heard() == (1, "cancelled")
    bench.blocking.let_go.put(None)
    assert bench.heard() == (2, "")
    assert bench.blocking.begun.get(timeout=WAIT_SECONDS) == 2
    assert bench.blocking.begun.empty()


def test_runtimes_compute_side_by_side_and_answer_in_their_own_order(bench: Bench) -> None:
    bench.ask(batch(1))
    bench.ask(batch(2, "many"), batch(3, "many"), batch(4, "many"), frames.CancelBatch(number=3))
    assert bench.heard() == (3, "cancelled")
    bench.together.answer_all()
    assert [bench.heard(), bench.heard()] == [(4, ""), (2, "")]
    bench.blocking.let_go.put(None)
    assert bench.heard() == (1, "")


def test_no_more_wait_than_the_limit(bench: Bench) -> None:
    bench.ask(batch(1))
    assert bench.blocking.begun.get(timeout=WAIT_SECONDS) == 1
    bench.ask(*(batch(number) for number in range(2, 6)))  # three may wait
    assert bench.heard() == (5, "overloaded")
    bench.ask(batch(6, "many"))  # another runtime's
    assert bench.together.begun.get(timeout=WAIT_SECONDS) == 6
    for _ in range(4):
        bench.blocking.let_go.put(None)
    assert [bench.heard() for _ in range(4)] == [(number, "") for number in range(1, 5)]
    bench.together.answer_all()
    assert bench.heard() == (6, "")


def test_a_batch_that_raises_fails_alone(bench: Bench) -> None:
    bench.ask(batch(1, "bad"), batch(2), batch(3, "nowhere"))
    assert bench.heard() == (3, "not_found")
    for _ in range(2):
        bench.blocking.let_go.put(None)
    assert [bench.heard(), bench.heard()] == [(1, "invalid_model"), (2, "")]


def test_tasks_pause_go_on_and_end_while_a_batch_is_computed(bench: Bench) -> None:
    def task(number: int) -> frames.RunTask:
        return frames.RunTask(number=number, job_id="j", task=TASK, files={})

    bench.ask(batch(1))
    assert bench.blocking.begun.get(timeout=WAIT_SECONDS) == 1
    bench.ask(frames.Pause(), task(2))
    assert isinstance(bench.hear(), frames.TaskProgressed)
    assert bench.tasks.gate.shut
    bench.ask(frames.Resume())
    assert isinstance(bench.hear(), frames.TaskDone)
    bench.ask(frames.Pause(), task(3))
    assert isinstance(bench.hear(), frames.TaskProgressed)
    bench.ask(frames.CancelTask())
    assert bench.heard() == (3, "invalid_model")
    bench.ask(frames.DropJob(job_id="j"))
    assert bench.tasks.forgotten.get(timeout=WAIT_SECONDS) == "j"
    assert bench.silent
    bench.blocking.let_go.put(None)
    assert bench.heard() == (1, "")


def test_no_more_tasks_wait_than_their_limit(bench: Bench) -> None:
    tasks = [frames.RunTask(number=number, job_id="j", task=TASK, files={}) for number in range(1, TASKS_LIMIT + 3)]
    bench.ask(frames.Pause(), tasks[0])
    assert isinstance(bench.hear(), frames.TaskProgressed)
    bench.ask(*tasks[1:])
    assert bench.heard() == (TASKS_LIMIT + 2, "overloaded")
    bench.ask(frames.Resume())
    done = [number for number, _ in (bench.heard() for _ in range(2 * TASKS_LIMIT + 1))]
    assert sorted(set(done)) == list(range(1, TASKS_LIMIT + 2))


def test_a_format_without_a_runtime_is_refused(bench: Bench) -> None:
    bench.ask(frames.LoadReplica(number=5, replica_id="s", path="", format="savedmodel"))
    assert bench.heard() == (5, "unavailable")
    bench.ask(frames.UnloadReplica(number=6, replica_id="r"), frames.UnloadReplica(number=7, replica_id="r"))
    assert [bench.heard(), bench.heard()] == [(6, ""), (7, "")]
    bench.ask(batch(8))
    assert bench.heard() == (8, "not_found")
