"""The engine's process: `python -m node.engine FD THREADS SCRATCH MEMORY [ALLOWED CODE...]`, started by `node.engine.process` alone."""

from __future__ import annotations

import gc
import mmap
import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from node.engine import formats, frames, memory
from node.engine.memory import shortage
from node.engine.replicas import LoadedReplicas
from node.engine.wording import one_line
from potluck import __version__
from potluck.blobs.store import no_room
from potluck.errors import BadMessage, Cancelled, EngineFailed, InvalidModel, Overloaded, PotluckError, TimedOut
from potluck.wire.failures import error_info
from potluck.wire.messages import BlobRef, Tensor

if TYPE_CHECKING:
    from node.engine.tasks import Tasks

HEARTBEAT_SECONDS = 1.0
QUEUE_LIMIT = 64
RECEIVE_BYTES = 1 << 16


class Channel:
    """The socket to the parent; any thread may send."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        self._splitter = frames.FrameSplitter()
        self._frames: deque[frames.ToEngine] = deque()
        self._cancelled: set[int] = set()

    def send(self, frame: frames.Frame) -> None:
        """Raises TooLarge before anything is sent, and OSError when the parent is gone."""
        data = frames.encode(frame)
        with self._lock:
            self._sock.sendall(data)

    def receive(self) -> frames.ToEngine | None:
        """The next frame; None when the parent has closed its end."""
        while not self._frames:
            data = self._sock.recv(max(RECEIVE_BYTES, self._splitter.missing))
            if not data:
                return None
            self._take(data)
        return self._frames.popleft()

    def cancelled(self, number: int) -> bool:
        """Whether the parent has said that it need not be answered. It may have said so while the one before was computed."""
        try:
            while data := self._sock.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT):
                self._take(data)
        except BlockingIOError:
            pass  # nothing more has come
        found = number in self._cancelled
        if self._cancelled:  # questions come in the order of their numbers: earlier ones were answered
            self._cancelled = {later for later in self._cancelled if later > number}
        return found

    def _take(self, data: bytes) -> None:
        for body in self._splitter.feed(data):
            try:
                frame = frames.to_engine(body)
            except BadMessage as error:  # the question fails, and not the engine with all it holds
                self.send(_failed(frames.number_of(body), error))
                continue
            if isinstance(frame, frames.CancelBatch):
                self._cancelled.add(frame.number)
            else:
                self._frames.append(frame)


class Server:
    """Answers frames: inference on the main thread, where nothing waits for it; what takes long one by one on another.

    `tasks` is None where there is no TensorFlow: then it has replicas alone.
    """

    def __init__(self, channel: Channel, replicas: LoadedReplicas, tasks: Tasks | None) -> None:
        self._channel = channel
        self._replicas = replicas
        self._tasks = tasks
        self._cancels: dict[int, threading.Event] = {}
        self._queue: queue.Queue[Callable[[], None]] = queue.Queue(QUEUE_LIMIT)
        threading.Thread(target=self._work, name="tasks", daemon=True).start()

    def serve(self) -> None:
        """Until the parent closes its end."""
        while (frame := self._channel.receive()) is not None:
            match frame:
                case frames.RunBatch():
                    self._answer(self._infer, frame)
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

    def _later(self, work: Callable[[Any], frames.Frame | None], frame: frames.Frame) -> None:
        try:
            self._queue.put_nowait(lambda: self._answer(work, frame))
        except queue.Full:
            self._cancels.pop(frame.number, None)
            error = Overloaded(f"{QUEUE_LIMIT} tasks wait for this engine", retry_after_seconds=1.0)
            self._channel.send(_failed(frame.number, error))

    def _answer(self, work: Callable[[Any], frames.Frame | None], frame: frames.Frame) -> None:
        """Whatever the user's model or data raises goes to the user, and the engine goes on."""
        number = frame.number
        try:
            with no_room():
                answer = work(frame)
            if answer is not None:
                self._channel.send(answer)
            return
        except ConnectionError:
            return  # the parent is gone, and the main thread sees that too
        except PotluckError as error:
            failure = _failed(number, error)
        except OSError as error:
            failure = _failed(number, EngineFailed(f"the engine could not read or write a file: {error}"))
        except Exception as error:  # noqa: BLE001 - the engine's boundary: see the docstring
            short = shortage(error)
            if short is None:
                traceback.print_exc()
            failure = _failed(number, short or InvalidModel(f"{type(error).__name__}: {one_line(error, 600)}"))
        self._channel.send(failure)

    def _run(self, frame: frames.RunTask) -> frames.Frame:
        def progress(done: int, metrics: dict[str, float]) -> None:
            self._channel.send(frames.TaskProgressed(number=frame.number, done=done, metrics=metrics))

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
        signature, resident, warm_rows = self._replicas.load(
            frame.replica_id, frame.format, Path(frame.path), frame.warm_rows, frame.warm_seconds, frame.pixel_scale
        )
        return frames.ReplicaLoaded(
            number=frame.number, signature=signature, resident_bytes=resident, warm_rows=warm_rows
        )

    def _unload(self, frame: frames.UnloadReplica) -> frames.Frame:
        self._replicas.unload(frame.replica_id)
        return frames.Done(number=frame.number)

    def _infer(self, frame: frames.RunBatch) -> frames.Frame:
        if self._channel.cancelled(frame.number):
            raise Cancelled("nobody waits for this batch any more")
        if frame.expires and time.time() > frame.expires:
            raise TimedOut("the batch came to its turn when its time was up")
        started = time.perf_counter()
        requests = frame.requests
        if frame.files:
            requests = tuple([tuple([_mapped(tensor, frame.files) for tensor in request]) for request in requests])
        outcomes = self._replicas.infer(frame.replica_id, requests)
        return frames.BatchRun(number=frame.number, outcomes=outcomes, seconds=time.perf_counter() - started)

    def _work(self) -> None:
        while True:
            self._queue.get()()
            if self._tasks is not None:
                self._tasks.train_ahead(until=lambda: not self._queue.empty())

    def _let_work(self, wanted: bool) -> None:
        if self._tasks is not None:
            self._tasks.gate.let(wanted)

    def _need_tasks(self) -> Tasks:
        if self._tasks is None:
            raise formats.missing("TensorFlow", "engine")
        return self._tasks


def _mapped(tensor: Tensor, files: Mapping[str, str]) -> Tensor:
    """The tensor with its blob's file as memory: it is not copied on its way to the model."""
    ref = tensor.data
    if not isinstance(ref, BlobRef) or ref.sha256 not in files:
        return tensor
    with Path(files[ref.sha256]).open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) if ref.size else b""
    return replace(tensor, data=data)


def _failed(number: int, error: PotluckError) -> frames.Failed:
    return frames.Failed(number=number, error=error_info(error))


def _beat(channel: Channel) -> None:
    while True:
        time.sleep(HEARTBEAT_SECONDS)
        try:
            channel.send(frames.Heartbeat())
        except OSError:
            return  # the parent is gone, and the main thread sees that too


@contextmanager
def left_out(*packages: str) -> Iterator[None]:
    """Let imports of these packages fail meanwhile.

    Keras imports them at its own start for what an engine never does, and where they are installed they take longer than a third
    of it (1.6 of 4.2 s).
    """
    hidden = [package for package in packages if package not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None is how Python is told so
    try:
        yield
    finally:
        for package in hidden:
            del sys.modules[package]


def main() -> None:
    descriptor, threads, scratch, allowed = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[5:]
    memory.limit_bytes = int(sys.argv[4])
    channel = Channel(socket.socket(fileno=descriptor))
    threading.Thread(target=_beat, args=(channel,), name="heartbeat", daemon=True).start()
    runtimes: dict[str, str] = {"potluck": __version__}
    gpus: tuple[str, ...] = ()
    tasks = None
    if formats.has_tensorflow():
        # Imported only where it is, and that takes seconds.
        with left_out("matplotlib", "pandas", "sklearn"):
            from node.engine import code, keras_models
            from node.engine.tasks import Tasks

        versions, gpus = keras_models.prepare(threads)
        runtimes |= versions
        code.allow(allowed)
        tasks = Tasks(scratch, threads)
    # AutoGraph imports the code that it writes into our scratch folder: once each, so none of it is worth keeping compiled.
    sys.dont_write_bytecode = True
    if formats.has_litert():
        runtimes["litert"] = formats.litert_version()
    if memory.limit_bytes and not gpus:  # for those, drivers reserve much address space that is no memory
        memory.hold_to_limit(threads)
    replicas = LoadedReplicas(lambda model_format, path: formats.load(model_format, path, scratch, threads))
    server = Server(channel, replicas, tasks)
    # A full collection over all that TensorFlow made takes longer than a hundred inferences: leave that out from now on.
    gc.collect()
    gc.freeze()
    try:
        channel.send(frames.Started(runtimes=runtimes, gpus=gpus))
        server.serve()
    except ConnectionError:
        pass  # the parent is gone
    sys.stderr.flush()
    os._exit(0)  # without waiting for threads of TensorFlow or for a task that nobody wants any more


if __name__ == "__main__":
    main()
