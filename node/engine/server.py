"""What an engine does about each frame, and on which thread.

- Readers read frames (`readers`) at all times: a cancellation, a pause or a batch is seen when it comes.
- The runtimes schedule batches (`runtimes`). TensorFlow and LiteRT each compute one batch after the other, on the thread that
  read the first of them. Both may compute at the same time.
- Long work (tasks, loads, applying steps, forgetting jobs) is done one by one on the tasks' thread, in the order of the frames.
- Only TensorFlow runs tasks, and tasks share it with inference. Tasks give way at the gate: `Pause` shuts it, and a task stands
  still at its next step or batch, until `Resume`.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from node.engine import frames, runtimes
from node.engine.answering import answer, failed
from node.engine.array_runtimes import TensorFlow
from node.engine.runtimes import Runtime, Send, Work
from potluck.errors import Cancelled, Overloaded, PotluckError

if TYPE_CHECKING:
    from node.engine.tasks import Tasks

TASKS_LIMIT = 64


class Server:
    """Takes frames, and sends answers. `tasks` is None without TensorFlow: then there are only replicas."""

    def __init__(self, send: Send, known: Sequence[Runtime], tasks: Tasks | None) -> None:
        self._send = send
        self._runtimes = known
        self._holding: dict[str, Runtime] = {}
        """The runtime of each replica."""
        self._tasks = tasks
        self._cancels: dict[int, threading.Event] = {}
        self._queue: queue.Queue[Work | None] = queue.Queue(TASKS_LIMIT)
        threading.Thread(target=self._work, name="tasks", daemon=True).start()

    def close(self) -> None:
        """Let the tasks' thread end after its last work. (An engine's process ends without this.)"""
        self._queue.put(None)

    def take(self, frame: frames.ToEngine) -> Work | None:
        """Returns at once, with the work for the calling thread. Other work is done already, or another thread does it."""
        match frame:
            case frames.RunBatch():
                return self._batch(frame)
            case frames.CancelBatch():
                if any(runtime.cancel(frame.number) for runtime in self._runtimes):
                    self._send(failed(frame.number, Cancelled("nobody waits for this batch any more")))
            case frames.Pause():
                self._let_work(False)
            case frames.Resume():
                self._let_work(True)
            case frames.RunTask():
                self._cancels[frame.number] = threading.Event()
                self._later(self._run, frame)
            case frames.CancelTask():
                for cancel in list(self._cancels.values()):
                    cancel.set()
            case frames.ApplyStep():
                self._later(self._apply_step, frame)
            case frames.DropJob():
                self._later(self._forget, frame)
            case frames.LoadReplica():
                self._later(self._load, frame)
            case frames.UnloadReplica():
                self._later(self._unload, frame)
        return None

    def _batch(self, frame: frames.RunBatch) -> Work | None:
        runtime = self._holding.get(frame.replica_id)
        try:
            if runtime is None:
                raise runtimes.not_loaded(frame.replica_id)
            return runtime.take(frame, self._send)
        except PotluckError as error:
            self._send(failed(frame.number, error))
            return None

    def _later(self, make: Callable[[Any], frames.Frame | None], frame: frames.Frame) -> None:
        try:
            self._queue.put_nowait(lambda: answer(self._send, frame.number, lambda: make(frame)))
        except queue.Full:
            self._cancels.pop(frame.number, None)
            error = Overloaded(f"{TASKS_LIMIT} tasks wait for this engine", retry_after_seconds=1.0)
            self._send(failed(frame.number, error))

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            work()
            if self._tasks is not None:
                self._tasks.train_ahead(until=lambda: not self._queue.empty())

    def _run(self, frame: frames.RunTask) -> frames.Frame:
        def progress(done: int, metrics: dict[str, float]) -> None:
            self._send(frames.TaskProgressed(number=frame.number, done=done, metrics=metrics))

        cancelled = self._cancels[frame.number]
        try:
            result = self._need_tasks().run(frame.job_id, frame.task, frame.files, cancelled, progress)
        finally:
            del self._cancels[frame.number]
        return frames.TaskDone(number=frame.number, result=result)

    def _apply_step(self, frame: frames.ApplyStep) -> frames.Frame:
        made = self._need_tasks().apply_step(Path(frame.weights), Path(frame.update))
        return frames.StepApplied(number=frame.number, weights=made)

    def _forget(self, frame: frames.DropJob) -> None:
        if self._tasks is not None:
            self._tasks.forget(frame.job_id)

    def _load(self, frame: frames.LoadReplica) -> frames.Frame:
        runtime = runtimes.serving(self._runtimes, frame.format)
        signature, resident, warm_rows = runtime.load(frame)
        self._holding[frame.replica_id] = runtime
        return frames.ReplicaLoaded(
            number=frame.number,
            signature=signature,
            resident_bytes=resident,
            warm_rows=warm_rows,
            runtime=runtime.name,
        )

    def _unload(self, frame: frames.UnloadReplica) -> frames.Frame:
        runtime = self._holding.pop(frame.replica_id, None)
        if runtime is not None:
            runtime.unload(frame.replica_id)
        return frames.Done(number=frame.number)

    def _let_work(self, wanted: bool) -> None:
        if self._tasks is not None:
            self._tasks.gate.let(wanted)

    def _need_tasks(self) -> Tasks:
        if self._tasks is None:
            raise runtimes.missing(TensorFlow.title, TensorFlow.extra)
        return self._tasks
