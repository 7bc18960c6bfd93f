"""The engine's process: `python -m node.engine FD THREADS SCRATCH`, started by `node.engine.process` alone."""

from __future__ import annotations

import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from node.engine import frames
from potluck import codec
from potluck.errors import InvalidModel, PotluckError
from potluck.messages import ErrorInfo

HEARTBEAT_SECONDS = 1.0


class Channel:
    """The socket to the parent; any thread may send."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        self._buffer = bytearray()

    def send(self, frame: frames.Frame) -> None:
        data = frames.encode(frame)
        with self._lock:
            self._sock.sendall(data)

    def receive(self) -> frames.Frame | None:
        """The next frame; None when the parent has closed its end."""
        head = self._read(4)
        body = self._read(frames.LENGTH.unpack(head)[0]) if head else b""
        return codec.unpack(body, frames.ToEngine) if body else None  # type: ignore[arg-type]

    def _read(self, count: int) -> bytes:
        while len(self._buffer) < count:
            data = self._sock.recv(max(65536, count - len(self._buffer)))
            if not data:
                return b""
            self._buffer += data
        found = bytes(self._buffer[:count])
        del self._buffer[:count]
        return found


class Server:
    """Answers frames: inference on the main thread, where nothing waits for it; tasks one after the other on another."""

    def __init__(self, channel: Channel, scratch: Path) -> None:
        # TensorFlow is imported with these, and takes seconds.
        from node.engine.replicas import Replicas
        from node.engine.tasks import Tasks

        self._channel = channel
        self._replicas = Replicas(scratch)
        self._tasks = Tasks(scratch)
        self._queue: queue.Queue[Callable[[], None]] = queue.Queue(16)
        threading.Thread(target=self._work, name="tasks", daemon=True).start()

    def serve(self) -> None:
        """Until the parent closes its end."""
        while (frame := self._channel.receive()) is not None:
            match frame:
                case frames.Infer():
                    self._answer(frame.number, self._infer, frame)
                case frames.RunTask():
                    self._tasks.cancelled.clear()
                    self._queue.put(lambda frame=frame: self._answer(frame.number, self._run, frame))  # type: ignore[misc]
                case frames.CancelTask():
                    self._tasks.cancelled.set()
                case frames.ForgetJob():
                    self._queue.put(lambda job_id=frame.job_id: self._tasks.forget(job_id))  # type: ignore[misc]
                case frames.LoadReplica():
                    self._answer(frame.number, self._load, frame)
                case frames.UnloadReplica():
                    self._replicas.unload(frame.replica_id)
                    self._channel.send(frames.Done(number=frame.number))
                case _:
                    raise ValueError(f"unexpected frame {type(frame).__name__}")

    def _answer(self, number: int, work: Callable[..., frames.Frame], frame: frames.Frame) -> None:
        """Whatever the user's model or data raises goes to the user, and the engine goes on."""
        try:
            answer = work(frame)
        except PotluckError as error:
            answer = _failed(number, error)
        except MemoryError:
            answer = _failed(number, InvalidModel("this node has not enough memory for the model and its data"))
        except Exception as error:  # noqa: BLE001 - the engine's boundary: see the docstring
            traceback.print_exc()
            answer = _failed(number, InvalidModel(f"{type(error).__name__}: {_short(str(error))}"))
        self._channel.send(answer)

    def _run(self, frame: frames.RunTask) -> frames.Frame:
        def progress(done: int, metrics: dict[str, float]) -> None:
            self._channel.send(frames.TaskProgressed(number=frame.number, done=done, metrics=metrics))

        result = self._tasks.run(frame.job_id, frame.task, frame.files, progress)
        return frames.TaskDone(number=frame.number, result=result)

    def _load(self, frame: frames.LoadReplica) -> frames.Frame:
        signature, resident = self._replicas.load(frame.replica_id, Path(frame.path))
        return frames.ReplicaLoaded(number=frame.number, signature=signature, resident_bytes=resident)

    def _infer(self, frame: frames.Infer) -> frames.Frame:
        started = time.perf_counter()
        outcomes = self._replicas.infer(frame.replica_id, frame.requests)
        return frames.Inferred(number=frame.number, outcomes=outcomes, seconds=time.perf_counter() - started)

    def _work(self) -> None:
        while True:
            self._queue.get()()


def _failed(number: int, error: PotluckError) -> frames.Failed:
    return frames.Failed(
        number=number, error=ErrorInfo(code=error.code, message=error.message, retryable=error.retryable)
    )


def _short(text: str, limit: int = 600) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    joined = " ".join(lines)
    return joined if len(joined) <= limit else f"{joined[:limit]}..."


def _beat(channel: Channel) -> None:
    while True:
        time.sleep(HEARTBEAT_SECONDS)
        try:
            channel.send(frames.Heartbeat())
        except OSError:
            return  # the parent is gone, and the main thread sees that too


def main() -> None:
    descriptor, threads, scratch = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    channel = Channel(socket.socket(fileno=descriptor))
    threading.Thread(target=_beat, args=(channel,), name="heartbeat", daemon=True).start()
    from node.engine import runtime

    runtimes, gpus = runtime.prepare(threads)
    server = Server(channel, scratch)
    channel.send(frames.Started(runtimes=runtimes, gpus=gpus))
    try:
        server.serve()
    except (ConnectionError, BrokenPipeError):
        return  # the parent is gone


if __name__ == "__main__":
    main()
