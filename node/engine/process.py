"""The engine as its node sees it: a child process that is started, asked, watched, and stopped."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import os
import re
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil

from node.engine import frames
from node.engine.link import EngineLink, OnProgress
from node.engine.progress import Progress, read
from node.engine.watch import Limits, Verdict, Watch, out_of_memory
from node.sandbox.policy import Confinement
from potluck.errors import EngineFailed, ModelCrashed, OutOfMemory, PotluckError
from potluck.lifecycle import die_with_parent
from potluck.wire.failures import as_error
from potluck.wire.reports import RequestOutcome
from potluck.wire.tasks import AnyTask, AnyTaskResult
from potluck.wire.values import BlobRef, ModelFormat, Signature, Tensor

log = logging.getLogger(__name__)

STDERR_LINES = 12
_CHATTER = re.compile(
    r"^[IW]\d{4} |All log messages before absl|To enable the following instructions|oneDNN custom operations"
)
"""Lines that TensorFlow always prints at its start."""
SOCKET_BUFFER_BYTES = 1 << 20
FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals from outside: from a person, or from Linux when the machine's memory runs out. No model is to blame."""


@dataclass(frozen=True)
class EngineInfo:
    runtimes: dict[str, str]
    gpus: tuple[str, ...]
    sandbox: tuple[str, ...] = ()
    """What it is kept from: of `files`, `network` and `calls`."""
    unconfined: tuple[str, ...] = ()
    """What it is not kept from although that was asked for, with the reasons."""


class Engine:
    """One child process. An object is started once: after the process ends, a new object is made.

    `quick_kernels`: use TensorFlow's oneDNN kernels. On CPUs without AVX-512, TensorFlow uses them only if asked. Convolutions take
    half the time with them, but round differently from the kernels with which jobs promise to repeat results to the bit.
    `confinement`: what it may reach besides its own code and `scratch`.
    """

    def __init__(
        self,
        scratch: Path,
        *,
        threads: int,
        limits: Limits,
        allow_code: Sequence[str] = (),
        quick_kernels: bool = False,
        confinement: Confinement = Confinement(),  # noqa: B008 - frozen
    ) -> None:
        self._scratch = scratch
        self._confinement = confinement
        self._quick_kernels = quick_kernels
        self._allow_code = allow_code
        self._threads = threads
        self._limits = limits
        self._watch = Watch(limits)
        self._process: asyncio.subprocess.Process | None = None
        self._link: EngineLink | None = None
        self._numbers = itertools.count(1)
        self._batches: dict[str, int] = {}
        """Frame numbers of the batches under way, by batch id."""
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES)
        self._dead: asyncio.Future[PotluckError] | None = None
        self._suspects: frozenset[str] = frozenset()
        self._looked_at = math.inf
        """When the watch last looked, on the loop's clock; infinite when there is nothing left to look at."""
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def alive(self) -> bool:
        return self._link is not None and self._dead is not None and not self._dead.done()

    @property
    def unwatched_seconds(self) -> float:
        """How long nobody has looked whether this engine makes progress; 0 for one that has ended or is being ended."""
        return max(0.0, asyncio.get_running_loop().time() - self._looked_at)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def start(self) -> EngineInfo:
        """Raises EngineFailed, with the child's last output, if it ends before it is up, or makes no progress."""
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
            # AutoGraph writes files there, and a killed engine does not remove them. We remove the scratch folder.
            "TMPDIR": str(self._scratch),
        }
        if self._quick_kernels:
            environment.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
        try:
            # -P: do not import a folder named `keras` from where the daemon was started.
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "node.engine", str(theirs.fileno()), str(threads), str(self._scratch),
                str(self._limits.memory_bytes), msgspec.json.encode(self._confinement).decode(), *self._allow_code,
                pass_fds=(theirs.fileno(),), stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE, env=environment, start_new_session=True, preexec_fn=die_with_parent(),
            )  # fmt: skip
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        _, self._link = await loop.create_connection(lambda: EngineLink(self._watch.heard), sock=ours)
        self._tasks = [
            asyncio.create_task(self._read_stderr(), name="engine stderr"),
            asyncio.create_task(self._keep_watch(), name="engine watch"),
        ]
        started = self._link.started
        either: list[asyncio.Future[Any]] = [started, self._dead]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if started.done():
            told = started.result()
            return EngineInfo(told.runtimes, told.gpus, told.sandbox, told.unconfined)
        reason = self._dead.result().message.removeprefix("the engine ")
        raise EngineFailed(f"the engine did not start: it {reason}")

    async def wait_dead(self) -> PotluckError:
        """Why it died, once it has: EngineFailed, or OutOfMemory."""
        assert self._dead is not None
        return await asyncio.shield(self._dead)

    def blame(self, replica_id: str) -> PotluckError:
        """The error for a replica that was loaded when the engine died. It says whether the replica caused that."""
        assert self._dead is not None
        failure = self._dead.result()
        if replica_id not in self._suspects:
            return EngineFailed(f"another model's doing: {failure.message}" if self._suspects else failure.message)
        return failure if isinstance(failure, OutOfMemory) else ModelCrashed(failure.message)

    async def stuck(self, limit_seconds: float, bound_seconds: float) -> None:
        """Return when the engine made no progress for `limit_seconds`, or after `bound_seconds` or twice its starting time,
        whichever is more."""
        if self.pid is None:
            return
        loop = asyncio.get_running_loop()
        progress = Progress(limit_seconds)
        end = loop.time() + max(bound_seconds, 2 * self._watch.start_seconds)
        while not progress.stuck and loop.time() < end:
            progress.look(loop.time(), read(self.pid))
            await asyncio.sleep(min(1.0, limit_seconds / 4))

    async def run_task(
        self, job_id: str, task: AnyTask, files: dict[str, Path], on_progress: OnProgress
    ) -> AnyTaskResult:
        """Run one task; its result's blobs are files `scratch/<sha256>`. Raises what the engine reports, or EngineFailed."""
        paths = {sha256: str(path) for sha256, path in files.items()}
        frame = frames.RunTask(number=next(self._numbers), job_id=job_id, task=task, files=paths)
        try:
            answer = await self._ask(frame, on_progress)
        except asyncio.CancelledError:
            await self.cancel_task()  # the caller does not wait any more
            raise
        assert isinstance(answer, frames.TaskDone)
        return answer.result

    async def apply_step(self, weights: Path, update: Path) -> BlobRef:
        """Apply an update to weights. Returns the file of the result (`scratch/<sha256>`). Raises InvalidModel, EngineFailed."""
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
            self._watch.paused = True
            self._send(frames.Pause())

    def resume(self) -> None:
        """Let them go on."""
        if self.alive:
            self._watch.paused = False
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
        """Load a replica. Returns its signature, the memory that it took, and up to how many rows it was warmed up.

        Raises InvalidModel, EngineFailed, ModelCrashed, OutOfMemory.
        """
        frame = frames.LoadReplica(
            number=next(self._numbers),
            replica_id=replica_id,
            path=str(path),
            format=model_format,
            warm_rows=warm_rows,
            warm_seconds=warm_seconds,
            pixel_scale=pixel_scale,
        )
        answer = await self._ask_of(replica_id, frame)
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
        """One outcome for each request, and the engine's seconds. `files`: paths of the blobs among the tensors, by SHA-256.

        Raises TimedOut if it would begin after `expires`, Cancelled, and ModelCrashed if the batch ends the engine.
        """
        number = self._batches[batch_id] = next(self._numbers)
        frame = frames.RunBatch(
            number=number,
            replica_id=replica_id,
            requests=tuple([tuple(request) for request in requests]),
            expires=expires,
            files={sha256: str(path) for sha256, path in files.items()},
        )
        try:
            answer = await self._ask_of(replica_id, frame)
        finally:
            self._batches.pop(batch_id, None)
        assert isinstance(answer, frames.BatchRun)
        return list(answer.outcomes), answer.seconds

    def cancel_inference(self, batch_id: str) -> None:
        """Skip this batch if it has not begun; `infer` then raises Cancelled."""
        number = self._batches.get(batch_id)
        if number is not None and self.alive:
            self._send(frames.CancelBatch(number=number))

    async def forget_job(self, job_id: str) -> None:
        if self.alive:
            self._send(frames.DropJob(job_id=job_id))

    async def stop(self, grace_seconds: float = 2.0) -> None:
        """End the child: first close its socket, then send SIGKILL. Callers that wait for an answer get EngineFailed."""
        if self._link is not None:
            self._link.close()
        if self._process is not None:
            try:
                async with asyncio.timeout(grace_seconds):
                    await self._process.wait()
            except TimeoutError:
                self._kill()
                await self._process.wait()
        self._looked_at = math.inf
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
            self._watch.asked(frame)
            answer = await waiter
        finally:
            self._link.forget(frame.number)
        if isinstance(answer, frames.Failed):
            raise as_error(answer.error)
        return answer

    async def _ask_of(self, replica_id: str, frame: frames.Frame) -> frames.Frame:
        """`_ask` about a replica. If the engine dies meanwhile, the error says whether the replica caused it."""
        try:
            return await self._ask(frame)
        except PotluckError as error:
            if self._dead is not None and self._dead.done() and error is self._dead.result():
                raise self.blame(replica_id) from error
            raise

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

    async def _keep_watch(self) -> None:
        """Wait for the process to end. Kill it if it is stuck or takes too much memory."""
        assert self._process is not None
        process, loop = self._process, asyncio.get_running_loop()
        ended = asyncio.create_task(process.wait(), name="engine end")
        verdict: Verdict | None = None
        try:
            while not ended.done():
                self._looked_at = loop.time()
                await asyncio.wait({ended}, timeout=self._limits.look_seconds)
                if not ended.done():
                    resident = _resident_bytes(process.pid)
                    verdict = self._watch.look(loop.time(), time.time(), lambda: read(process.pid), resident)
                    if verdict is not None:
                        self._looked_at = math.inf
                        self._kill()
                        await ended
            self._looked_at = math.inf
        finally:
            ended.cancel()
        await asyncio.wait({self._tasks[0]}, timeout=1.0)  # its last output
        if verdict is not None:
            words = "" if isinstance(verdict.error, OutOfMemory) else self._last_words()
            self._end(type(verdict.error)(verdict.error.message + words), verdict.suspects)
            return
        suspects = self._watch.suspects() if -(process.returncode or 0) not in FROM_OUTSIDE else frozenset[str]()
        if self._limits.memory_bytes and any("bad_alloc" in line for line in self._stderr):
            self._end(out_of_memory(self._limits.memory_bytes), suspects)
        else:
            self._end(EngineFailed(f"the engine {_how(process.returncode)}{self._last_words()}"), suspects)

    def _end(self, failure: PotluckError, suspects: frozenset[str] = frozenset()) -> None:
        """Count the engine as dead from now on. The first reason is kept."""
        if self._dead is not None and not self._dead.done():
            self._suspects = suspects
            self._dead.set_result(failure)
        if self._link is not None:
            self._link.fail(failure)
            self._link.close()

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGKILL)

    def _last_words(self) -> str:
        return f"; its last words: {' | '.join(list(self._stderr)[-3:])}" if self._stderr else ""


def _how(returncode: int | None) -> str:
    if returncode is not None and returncode < 0:
        name = signal.Signals(-returncode).name
        return f"was ended by {name}" + (", as Linux does when memory runs out" if name == "SIGKILL" else "")
    return f"ended with status {returncode}"


def _resident_bytes(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:  # it has ended, or ends
        return 0
