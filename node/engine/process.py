"""The engine as its node sees it: a child process that is started, asked, watched, and stopped."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import re
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from node.engine import frames
from potluck import errors
from potluck.errors import BadMessage, EngineFailed
from potluck.lifecycle import die_with_parent
from potluck.messages import AnyTask, AnyTaskResult, BlobRef, ModelFormat, RequestOutcome, Signature, Tensor

log = logging.getLogger(__name__)

OnProgress = Callable[[int, dict[str, float]], None]
STDERR_LINES = 12
_CHATTER = re.compile(
    r"^[IW]\d{4} |All log messages before absl|To enable the following instructions|oneDNN custom operations"
)
"""What TensorFlow says at its start, always."""
SOCKET_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class EngineInfo:
    runtimes: dict[str, str]
    gpus: tuple[str, ...]


class Engine:
    """One child process. Made anew after each death: an object is started once.

    `quick_kernels`: with TensorFlow's oneDNN kernels. On CPUs without AVX-512 it leaves them out unless asked: convolutions take
    half the time with them, and round otherwise than those that jobs promise to repeat to the bit.
    """

    def __init__(
        self,
        scratch: Path,
        *,
        threads: int,
        start_seconds: float,
        silence_seconds: float,
        allow_code: Sequence[str] = (),
        quick_kernels: bool = False,
    ) -> None:
        self._scratch = scratch
        self._quick_kernels = quick_kernels
        self._allow_code = allow_code
        self._threads = threads
        self._start_seconds = start_seconds
        self._silence_seconds = silence_seconds
        self._process: asyncio.subprocess.Process | None = None
        self._link: _Link | None = None
        self._numbers = itertools.count(1)
        self._batches: dict[str, int] = {}
        """Numbers of the inferences under way, by the ids of their batches."""
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES)
        self._dead: asyncio.Future[EngineFailed] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def alive(self) -> bool:
        return self._link is not None and self._dead is not None and not self._dead.done()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def start(self) -> EngineInfo:
        """Raises EngineFailed, with the child's last words, when it does not come up within `start_seconds`."""
        try:
            return await self._start()
        except OSError as error:
            raise EngineFailed(f"the engine did not start: {error}") from error
        except BaseException:
            await self.stop(grace_seconds=0)
            raise

    async def _start(self) -> EngineInfo:
        self._scratch.mkdir(parents=True, exist_ok=True)
        loop = asyncio.get_running_loop()
        self._dead = loop.create_future()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        for sock in (ours, theirs):
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
        threads = self._threads or len(os.sched_getaffinity(0))
        environment = os.environ | {
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "KERAS_BACKEND": "tensorflow",
            "OMP_NUM_THREADS": str(threads),
            "PYTHONUNBUFFERED": "1",
            # AutoGraph writes files there, and an engine that is killed does not remove them: the scratch folder goes with us.
            "TMPDIR": str(self._scratch),
        }
        if self._quick_kernels:
            environment.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
        try:
            # -P: a folder named `keras` where the daemon was started is not Keras.
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "node.engine", str(theirs.fileno()), str(threads), str(self._scratch), *self._allow_code,
                pass_fds=(theirs.fileno(),), stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE, env=environment, start_new_session=True, preexec_fn=die_with_parent(),
            )  # fmt: skip
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        started: asyncio.Future[EngineInfo] = loop.create_future()
        _, self._link = await loop.create_connection(lambda: _Link(started), sock=ours)
        self._tasks = [
            asyncio.create_task(self._read_stderr(), name="engine stderr"),
            asyncio.create_task(self._watch(), name="engine watch"),
        ]
        either: list[asyncio.Future[Any]] = [started, self._dead]
        done, _ = await asyncio.wait(either, timeout=self._start_seconds, return_when=asyncio.FIRST_COMPLETED)
        if started.done():
            return started.result()
        reason = "it ended" if done else f"it was not ready within {self._start_seconds:g} s"
        raise EngineFailed(f"the engine did not start: {reason}{self._last_words()}")

    async def wait_dead(self) -> EngineFailed:
        """Why it died, once it has."""
        assert self._dead is not None
        return await asyncio.shield(self._dead)

    async def run_task(
        self, job_id: str, task: AnyTask, files: dict[str, Path], on_progress: OnProgress
    ) -> AnyTaskResult:
        """Run one task; its result's blobs are files `scratch/<sha256>`. Raises what the engine reports, or EngineFailed."""
        paths = {sha256: str(path) for sha256, path in files.items()}
        frame = frames.RunTask(number=next(self._numbers), job_id=job_id, task=task, files=paths)
        try:
            answer = await self._ask(frame, on_progress)
        except asyncio.CancelledError:
            await self.cancel_task()  # nobody waits for it any more
            raise
        assert isinstance(answer, frames.TaskDone)
        return answer.result

    async def apply_step(self, weights: Path, update: Path) -> BlobRef:
        """The file (`scratch/<sha256>`) of the weights that an update makes of others. Raises InvalidModel, EngineFailed."""
        frame = frames.ApplyStep(number=next(self._numbers), weights=str(weights), update=str(update))
        answer = await self._ask(frame)
        assert isinstance(answer, frames.StepApplied)
        return answer.weights

    async def cancel_task(self) -> None:
        """Stop the present task at its next step: `run_task` raises Cancelled."""
        if self.alive:
            self._send(frames.CancelTask())

    def pause(self) -> None:
        """Let tasks stand still from their next step or batch on."""
        if self.alive:
            self._send(frames.Pause())

    def resume(self) -> None:
        """Let them go on."""
        if self.alive:
            self._send(frames.Resume())

    async def load_model(
        self,
        replica_id: str,
        path: Path,
        model_format: ModelFormat = "keras",
        warm_rows: int = 64,
        warm_seconds: float = 20.0,
        pixel_scale: float = 1.0,
    ) -> tuple[Signature, int, int]:
        """Its signature, the memory that it took, and up to how many rows it was warmed up. Raises InvalidModel, EngineFailed."""
        frame = frames.LoadReplica(
            number=next(self._numbers),
            replica_id=replica_id,
            path=str(path),
            format=model_format,
            warm_rows=warm_rows,
            warm_seconds=warm_seconds,
            pixel_scale=pixel_scale,
        )
        answer = await self._ask(frame)
        assert isinstance(answer, frames.ReplicaLoaded)
        return answer.signature, answer.resident_bytes, answer.warm_rows

    async def unload_model(self, replica_id: str) -> None:
        await self._ask(frames.UnloadReplica(number=next(self._numbers), replica_id=replica_id))

    async def infer(
        self,
        replica_id: str,
        requests: Sequence[Sequence[Tensor]],
        files: Mapping[str, Path] = {},
        *,
        batch_id: str = "",
        expires: float = 0.0,
    ) -> tuple[list[RequestOutcome], float]:
        """One outcome for each request, and the engine's seconds. `files`: of the blobs among the tensors, by SHA-256.

        Raises TimedOut when it would begin after `expires`, and Cancelled.
        """
        number = self._batches[batch_id] = next(self._numbers)
        frame = frames.Infer(
            number=number,
            replica_id=replica_id,
            requests=tuple([tuple(request) for request in requests]),
            expires=expires,
            files={sha256: str(path) for sha256, path in files.items()},
        )
        try:
            answer = await self._ask(frame)
        finally:
            self._batches.pop(batch_id, None)
        assert isinstance(answer, frames.Inferred)
        return list(answer.outcomes), answer.seconds

    def cancel_inference(self, batch_id: str) -> None:
        """Leave this batch out, if it has not begun: `infer` raises Cancelled then."""
        number = self._batches.get(batch_id)
        if number is not None and self.alive:
            self._send(frames.CancelInfer(number=number))

    async def forget_job(self, job_id: str) -> None:
        if self.alive:
            self._send(frames.ForgetJob(job_id=job_id))

    async def stop(self, grace_seconds: float = 2.0) -> None:
        """End the child: closing its socket asks it to go, SIGKILL makes it. Whoever waits for an answer gets EngineFailed."""
        if self._link is not None:
            self._link.close()
        if self._process is not None:
            try:
                async with asyncio.timeout(grace_seconds):
                    await self._process.wait()
            except TimeoutError:
                self._kill()
                await self._process.wait()
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        await asyncio.gather(*(t for t in self._tasks if t is not asyncio.current_task()), return_exceptions=True)
        self._end(EngineFailed("the engine was stopped"))

    async def _ask(self, frame: frames.Frame, on_progress: OnProgress | None = None) -> frames.Frame:
        if not self.alive or self._link is None:
            raise EngineFailed("the engine is not running")
        waiter = self._link.expect(frame.number, on_progress)
        try:
            self._send(frame)
            answer = await waiter
        finally:
            self._link.forget(frame.number)
        if isinstance(answer, frames.Failed):
            info = answer.error
            raise errors.from_code(info.code, info.message, info.retry_after_seconds)
        return answer

    def _send(self, frame: frames.Frame) -> None:
        assert self._link is not None
        self._link.send(frames.encode(frame))

    async def _read_stderr(self) -> None:
        assert self._process is not None
        assert self._process.stderr is not None
        while chunk := await self._process.stderr.read(4096):
            for line in chunk.decode(errors="replace").splitlines():
                if line.strip():
                    if not _CHATTER.search(line):
                        self._stderr.append(line)
                    log.debug("engine: %s", line)

    async def _watch(self) -> None:
        """Wait for its end, and bring that about when it is silent for too long."""
        assert self._process is not None
        assert self._dead is not None
        assert self._link is not None
        loop = asyncio.get_running_loop()
        ended = asyncio.create_task(self._process.wait(), name="engine end")
        silent = False
        limit = self._start_seconds
        try:
            while not ended.done():
                await asyncio.wait({ended}, timeout=1.0)
                if self._link.started.done():
                    limit = self._silence_seconds
                if not ended.done() and loop.time() - self._link.heard_at > limit:
                    silent = True
                    self._kill()
                    await ended
        finally:
            ended.cancel()
        reason = f"was silent for {limit:g} s and was killed" if silent else _how(self._process.returncode)
        await asyncio.wait({self._tasks[0]}, timeout=1.0)  # its last words
        failure = EngineFailed(f"the engine {reason}{self._last_words()}")
        self._end(failure)

    def _end(self, failure: EngineFailed) -> None:
        """From now on it is dead, for this reason unless there was one before."""
        if self._dead is not None and not self._dead.done():
            self._dead.set_result(failure)
        if self._link is not None:
            self._link.fail(failure)
            self._link.close()

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGKILL)

    def _last_words(self) -> str:
        return f"; its last words: {' | '.join(list(self._stderr)[-3:])}" if self._stderr else ""


class _Link(asyncio.Protocol):
    """The socket to the child: cuts the stream into frames and hands them to who waits."""

    def __init__(self, started: asyncio.Future[EngineInfo]) -> None:
        self.started = started
        self.heard_at = asyncio.get_running_loop().time()
        self._transport: asyncio.Transport | None = None
        self._splitter = frames.Splitter()
        self._waiting: dict[int, tuple[asyncio.Future[frames.Frame], OnProgress | None]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self.heard_at = asyncio.get_running_loop().time()
        try:
            for body in self._splitter.feed(data):
                self._dispatch(frames.from_engine(body))
        except BadMessage as error:
            self.fail(EngineFailed(f"the engine sent what cannot be read: {error.message}"))
            self.close()

    def _dispatch(self, frame: frames.FromEngine) -> None:
        match frame:
            case frames.Heartbeat():
                return
            case frames.Started():
                if not self.started.done():
                    self.started.set_result(EngineInfo(frame.runtimes, frame.gpus))
                return
            case _:
                pass
        waiter, on_progress = self._waiting.get(frame.number, (None, None))
        if isinstance(frame, frames.TaskProgressed):
            if on_progress is not None:
                on_progress(frame.done, frame.metrics)
        elif waiter is not None and not waiter.done():
            waiter.set_result(frame)

    def expect(self, number: int, on_progress: OnProgress | None) -> asyncio.Future[frames.Frame]:
        waiter: asyncio.Future[frames.Frame] = asyncio.get_running_loop().create_future()
        self._waiting[number] = (waiter, on_progress)
        return waiter

    def forget(self, number: int) -> None:
        self._waiting.pop(number, None)

    def fail(self, error: EngineFailed) -> None:
        for waiter, _ in self._waiting.values():
            if not waiter.done():
                waiter.set_exception(error)

    def send(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def _how(returncode: int | None) -> str:
    if returncode is not None and returncode < 0:
        name = signal.Signals(-returncode).name
        return f"was ended by {name}" + (", as Linux does when memory runs out" if name == "SIGKILL" else "")
    return f"ended with status {returncode}"
