"""Runs leased shards on the work engine: fetches their blobs, runs the task, and keeps the result's blobs for others."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from msgspec.structs import replace

from node.engine.process import Engine
from node.finishing import seconds_left
from node.own_data import OwnData
from node.slot import EngineSlot
from potluck.blobs.download import Downloader
from potluck.blobs.store import BlobStore, is_sha256, no_room
from potluck.errors import Cancelled, InvalidModel, NotAllowed, PotluckError, TooLarge, Unavailable
from potluck.logs import fields
from potluck.surviving import as_defect, outlived
from potluck.wire import codec
from potluck.wire.commands import LeaseShard
from potluck.wire.failures import error_info
from potluck.wire.refs import blob_refs
from potluck.wire.reports import ShardFailed, ShardFinished
from potluck.wire.tasks import (
    AnyTask,
    AnyTaskResult,
    ConvertResult,
    ConvertTask,
    EvaluateResult,
    ExportResult,
    PredictResult,
    PredictTask,
    SyncResult,
    SyncTask,
    TrainResult,
    WarmUpTask,
)
from potluck.wire.values import INLINE_LIMIT_BYTES, BlobRef, Step, Tensor

log = logging.getLogger(__name__)

INLINE_RESULT_BYTES = 128 * 1024
RESULT_LIMIT_BYTES = INLINE_LIMIT_BYTES - 4096
FETCHES_AT_ONCE = 4
STOP_SECONDS = 10.0
"""How long an engine may make no progress after it was told to stop a withdrawn task; then it is killed."""
STOP_BOUND_SECONDS = 60.0
"""How long it may take in all while it makes progress: it may trace or compile, and a new engine would have to do that again."""

T = TypeVar("T")

OnProgress = Callable[[str, int, dict[str, float]], None]
OnStage = Callable[[str, str], None]
OnOutcome = Callable[[ShardFinished | ShardFailed], None]
OnStored = Callable[[tuple[str, ...]], None]


@dataclass
class _Attempt:
    """The running attempt. `engine` is set while it computes there."""

    lease: LeaseShard
    withdrawn: asyncio.Event = field(default_factory=asyncio.Event)
    engine: Engine | None = None
    task: asyncio.Task[None] | None = None
    forbidden: PotluckError | None = None
    """Why this node stops it, though the coordinator has not withdrawn it."""
    since: float = 0.0
    """Since when it computes, on the monotonic clock."""
    done: int = 0
    """What its progress said last."""


class Executor:
    """Runs one shard at a time, and fetches the next one's blobs meanwhile. Gets `Run`, `Prefetch` and `Stop`."""

    def __init__(
        self,
        *,
        store: BlobStore,
        downloader: Downloader,
        own_data: OwnData,
        slot: EngineSlot,
        scratch: Path,
        urls: Callable[[], tuple[str, ...]],
        on_progress: OnProgress,
        on_stage: OnStage,
        on_outcome: OnOutcome,
        on_stored: OnStored,
        sandboxed: bool = False,
        closed: bool = False,
    ) -> None:
        """`sandboxed`: engines are kept from the machine, so what they say of files is not believed. `closed`: as part of a closed
        cluster, this node does nothing that is not protected.
        """
        self._store = store
        self._sandboxed = sandboxed
        self._closed = closed
        self._downloader = downloader
        self._own_data = own_data
        self._slot = slot
        self._scratch = scratch
        self._urls = urls
        self._on_progress = on_progress
        self._on_stage = on_stage
        self._on_outcome = on_outcome
        self._on_stored = on_stored
        self._tasks: asyncio.TaskGroup | None = None
        self._grouped = ""
        """The job for which the engine is a member of a group."""
        self._last_job = ""
        """The job of the attempt before. A new job's first attempt has more to load, and reports that."""
        self._running: _Attempt | None = None
        self._paused = False
        self._prefetches: dict[str, asyncio.Task[None]] = {}
        # Two limits, so that the running shard never waits for prefetches from slow holders.
        self._fetching = asyncio.Semaphore(FETCHES_AT_ONCE)
        self._prefetching = asyncio.Semaphore(FETCHES_AT_ONCE)

    async def run(self) -> None:
        """Work until cancelled; nothing else here works without this."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            await asyncio.get_running_loop().create_future()

    def prefetch(self, lease: LeaseShard) -> None:
        """Fetch the blobs of a lease that waits."""
        assert self._tasks is not None
        task = self._tasks.create_task(self._prefetch(lease), name=f"prefetch {lease.attempt_id}")
        self._prefetches[lease.attempt_id] = task
        task.add_done_callback(self._prefetched)

    def give_up(self, attempt_id: str) -> None:
        """The lease was withdrawn before it ran: stop fetching its blobs."""
        if (prefetch := self._prefetches.pop(attempt_id, None)) is not None:
            prefetch.cancel()

    def start(self, lease: LeaseShard) -> None:
        """Work on this lease; reports to `on_outcome` in any case."""
        assert self._tasks is not None
        attempt = self._running = _Attempt(lease)
        attempt.task = self._tasks.create_task(self._work(attempt), name=f"attempt {lease.attempt_id}")

    def stop(self, attempt_id: str) -> None:
        """Stop this attempt at its next step, if it is running."""
        assert self._tasks is not None
        self.give_up(attempt_id)
        attempt = self._running
        if attempt is not None and attempt.lease.attempt_id == attempt_id:
            attempt.withdrawn.set()
            self._tasks.create_task(outlived(self._stop(attempt), "stop of an attempt"), name=f"stop {attempt_id}")

    def recheck(self) -> None:
        """The settings of this node's data have changed: stop an attempt that they no longer allow."""
        attempt = self._running
        if attempt is None or attempt.task is None or attempt.task.done():
            return
        try:
            self._own_data.check(attempt.lease.task)
        except PotluckError as error:
            attempt.forbidden = error
            self.stop(attempt.lease.attempt_id)

    @property
    def computing(self) -> bool:
        """Whether the engine works on a task, which could give way."""
        attempt = self._running
        return attempt is not None and attempt.engine is not None

    @property
    def seconds_left(self) -> float:
        """How long the present attempt will still take; 0: there is none. Infinite if that is not known."""
        attempt = self._running
        if attempt is None or attempt.task is None or attempt.task.done():
            return 0.0
        seconds = time.monotonic() - attempt.since if attempt.engine is not None else 0.0
        return seconds_left(attempt.lease.task, attempt.done, seconds)

    def give_way(self, wanted: bool) -> None:
        """Pause tasks at their next step or batch, or let them go on."""
        self._paused = wanted
        if (engine := self._slot.engine) is not None:
            (engine.pause if wanted else engine.resume)()

    def forget(self, job_id: str) -> None:
        """The job has ended: the engine may drop what it keeps for the job."""
        assert self._tasks is not None
        if (engine := self._slot.engine) is not None:
            self._tasks.create_task(outlived(engine.forget_job(job_id), "end of a job"), name=f"forget {job_id}")
        if job_id == self._grouped:  # its engine listens on the whole network, and cannot join another group
            self._grouped = ""
            self._tasks.create_task(outlived(self._slot.retire(), "end of a group"), name=f"end the group of {job_id}")

    async def _work(self, attempt: _Attempt) -> None:
        lease = attempt.lease
        attempt_id = lease.attempt_id
        outcome: ShardFinished | ShardFailed
        try:
            with self._own_data.using(lease.task) as (task, own_files):
                if own_files:
                    await asyncio.to_thread(self._own_data.check_files, lease.task, own_files)
                result = await self._compute(attempt, task, own_files)
            self._own_data.check(lease.task)  # its settings may have changed meanwhile
            outcome = await self._report(attempt_id, result)
        except Exception as error:  # noqa: BLE001 - a defect that one job meets must not end the node with all it holds
            failure = attempt.forbidden or as_defect(error, "a shard")
            where = fields(job=lease.job_id, attempt=attempt_id, code=failure.code, reason=failure.message)
            log.info("shard failed %s", where)
            outcome = ShardFailed(attempt_id=attempt_id, error=error_info(failure))
        self._on_outcome(outcome)

    async def _compute(self, attempt: _Attempt, task: AnyTask, own_files: dict[str, Path]) -> AnyTaskResult:
        lease = attempt.lease
        if self._closed and isinstance(lease.task, SyncTask) and len(lease.task.members) > 1:
            raise NotAllowed(
                "nodes of a closed cluster do not train synchronously together, because TensorFlow would send the weights between them "
                "unprotected: train with the strategy 'local' or 'auto'"
            )
        refs = self._needed(lease.task)
        for ref in refs:
            self._store.pin(ref.sha256)
        missing = sum(ref.size for ref in {ref.sha256: ref for ref in refs}.values() if not self._store.has(ref.sha256))
        started = time.perf_counter()
        members = lease.task.members if isinstance(lease.task, SyncTask) and lease.task.begins else ()
        group = members if len(members) > 1 or self._grouped else ()
        first, self._last_job = lease.job_id != self._last_job, lease.job_id
        fetched = not missing

        def stage() -> None:
            """Report what the attempt waits for: a job's first attempt has to load everything, and an engine's start takes time."""
            if self._slot.engine is None:
                self._on_stage(lease.attempt_id, f"starting engine ({_runtime(lease.task)})")
            elif first:
                doing = "loading the model" if fetched else f"fetching {missing / 1e6:.1f} MB"
                self._on_stage(lease.attempt_id, doing)

        stage()
        # The first start takes seconds; blobs are fetched meanwhile.
        starting = None if group else asyncio.create_task(self._slot.get(), name="engine start")
        if starting is not None:
            starting.add_done_callback(lambda _: stage())
        try:
            files = await _unless(attempt.withdrawn, self._fetch(refs, self._fetching))
            fetch_seconds, fetched = time.perf_counter() - started, True
            if starting is None:
                # TensorFlow accepts a group's members only at its start. They meet over the network, which no other
                # engine may use in a sandbox.
                await self._slot.renew(connected=self._sandboxed and len(group) > 1)
                stage()
                self._grouped = lease.job_id if len(group) > 1 else ""
            else:
                await _unless(attempt.withdrawn, starting)

            def progress(done: int, metrics: dict[str, float]) -> None:
                attempt.done = done
                self._on_progress(lease.attempt_id, done, metrics)

            async def run(engine: Engine) -> AnyTaskResult:
                if attempt.withdrawn.is_set():
                    raise Cancelled("the attempt was withdrawn")
                attempt.engine, attempt.since = engine, time.monotonic()
                stage()
                if self._paused:  # it may have started since the pause began
                    engine.pause()
                try:
                    await self._complete(engine, task, files)
                    return await engine.run_task(lease.job_id, task, files | own_files, progress)
                finally:
                    attempt.engine = None

            result = await self._slot.use(run)
            return replace(result, fetched_bytes=missing, fetch_seconds=fetch_seconds)
        finally:
            if starting is not None:
                starting.cancel()  # cancels the waiting, not the start: the next attempt needs an engine too
                await asyncio.gather(starting, return_exceptions=True)
            for ref in refs:
                self._store.unpin(ref.sha256)
            weights, step = _way(lease.task)
            if weights is not None and step is not None and self._store.has(weights.sha256):
                self._store.delete(step.base.sha256)  # nobody needs the weights before this round any more

    def _needed(self, task: AnyTask) -> list[BlobRef]:
        """The blobs that must be here. Of the two ways to a round's weights, it takes the one that needs fewer bytes."""
        weights, step = _way(task)
        if weights is None or step is None:
            return list(blob_refs(task))
        short = self._store.has(step.base.sha256) and not self._store.has(weights.sha256)
        left_out = {weights.sha256} if short else {step.base.sha256, step.update.sha256}
        return [ref for ref in blob_refs(task) if ref.sha256 not in left_out]

    async def _complete(self, engine: Engine, task: AnyTask, files: dict[str, Path]) -> None:
        """Make the round's weights from those before, if they were not fetched; if that fails, fetch them."""
        weights, step = _way(task)
        if weights is None or step is None or weights.sha256 in files:
            return
        try:
            made = await engine.apply_step(files[step.base.sha256], files[step.update.sha256])
            reason = "" if made.sha256 == weights.sha256 else "it gives other bytes"
        except InvalidModel as error:
            reason = error.message
        if reason:
            log.warning("step does not give the weights: fetching them %s", fields(reason=reason))
            files |= await self._fetch([weights], self._fetching)
            return
        await self._adopt(made)
        files[weights.sha256] = self._store.path(weights.sha256)
        self._on_stored((weights.sha256,))

    async def _fetch(self, refs: list[BlobRef], places: asyncio.Semaphore) -> dict[str, Path]:
        """Files of all blobs; tells the coordinator which blobs are new here."""
        distinct = {ref.sha256: ref for ref in refs}
        missing = tuple(sha256 for sha256 in distinct if not self._store.has(sha256))

        async def one(ref: BlobRef) -> Path:
            async with places:
                return await self._downloader.fetch(ref)

        fetches = {sha256: asyncio.create_task(one(ref), name=f"fetch {sha256}") for sha256, ref in distinct.items()}
        try:
            if fetches:
                await asyncio.wait(fetches.values(), return_when=asyncio.FIRST_EXCEPTION)
            files = {sha256: fetch.result() for sha256, fetch in fetches.items() if fetch.done()}
        except OSError as error:
            raise _disk_trouble(error) from error
        finally:
            for fetch in fetches.values():
                fetch.cancel()
            await asyncio.gather(*fetches.values(), return_exceptions=True)
        if missing:
            self._on_stored(missing)
        return files

    async def _prefetch(self, lease: LeaseShard) -> None:
        try:
            await self._fetch(self._needed(lease.task), self._prefetching)
        except Exception as error:  # noqa: BLE001 - the attempt itself will meet the same trouble, and report it
            reason = as_defect(error, "fetching ahead").message
            log.info("prefetch failed %s", fields(attempt=lease.attempt_id, reason=reason))

    def _prefetched(self, task: asyncio.Task[None]) -> None:
        self._prefetches = {key: other for key, other in self._prefetches.items() if other is not task}

    async def _report(self, attempt_id: str, result: AnyTaskResult) -> ShardFinished:
        """The result, with its blobs in our store and us as their holder; small predictions stay inline. Raises TooLarge."""
        try:
            if isinstance(result, TrainResult):
                made = not self._store.has(result.base.sha256)  # in the first round, it has the model's own weights
                base = await self._adopt(result.base)
                result = replace(result, base=base, update=await self._adopt(result.update))
                if made:
                    self._on_stored((base.sha256,))
            elif isinstance(result, SyncResult):
                if result.weights is not None and result.optimizer is not None:
                    kept, state = await self._adopt(result.weights), await self._adopt(result.optimizer)
                    step = result.step
                    if step is not None:
                        step = replace(step, update=await self._adopt(step.update))
                    result = replace(result, weights=kept, optimizer=state, step=step)
                    self._on_stored((kept.sha256, state.sha256))
            elif isinstance(result, ExportResult | ConvertResult):
                result = replace(result, model=await self._adopt(result.model))
            elif isinstance(result, PredictResult):
                message = ShardFinished(attempt_id=attempt_id, result=result)
                if len(codec.pack(message)) > INLINE_RESULT_BYTES:
                    result = replace(result, outputs=tuple([await self._as_blob(tensor) for tensor in result.outputs]))
        except OSError as error:
            raise _disk_trouble(error) from error
        message = ShardFinished(attempt_id=attempt_id, result=result)
        size = len(codec.pack(message))
        if size > RESULT_LIMIT_BYTES and isinstance(result, EvaluateResult) and result.confusion:
            # With many hundred classes. The metrics matter more, and every shard leaves the matrix out.
            log.warning("confusion matrix left out %s", fields(attempt=attempt_id, classes=len(result.confusion)))
            message = ShardFinished(attempt_id=attempt_id, result=replace(result, confusion=()))
            size = len(codec.pack(message))
        if size > RESULT_LIMIT_BYTES:
            raise TooLarge(f"the shard's result is {size} bytes; at most {RESULT_LIMIT_BYTES} can be sent")
        return message

    async def _adopt(self, ref: BlobRef) -> BlobRef:
        """A blob that the engine wrote, or that was here before, with us as its holder. Raises CorruptBlob."""
        with no_room():
            kept = await asyncio.to_thread(self._from_engine, ref)
        return replace(kept, holders=self._urls())

    def _from_engine(self, ref: BlobRef) -> BlobRef:
        path = self._scratch / ref.sha256
        if not self._sandboxed:
            return self._store.verify(path, ref) if path.exists() else ref
        # A model may have taken over the engine, so its word for a hash does not count: the file is hashed as it is taken.
        if is_sha256(ref.sha256) and os.path.lexists(path):
            return self._store.take(path, ref.sha256)
        return ref

    async def _as_blob(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor.data, bytes):
            return tensor
        kept = await asyncio.to_thread(self._store.put_bytes, tensor.data)
        return replace(tensor, data=replace(kept, holders=self._urls()))

    async def _stop(self, attempt: _Attempt) -> None:
        engine, task = attempt.engine, attempt.task
        if engine is None or task is None:
            return  # it is fetching, or waits for the engine's start: both stop by themselves; or it is done
        if isinstance(attempt.lease.task, SyncTask):  # it may wait for a lost member, and a group is never formed again
            await engine.stop(grace_seconds=0)
            return
        await engine.cancel_task()
        stuck = asyncio.create_task(engine.stuck(STOP_SECONDS, STOP_BOUND_SECONDS), name="stuck")
        await asyncio.wait({task, stuck}, return_when=asyncio.FIRST_COMPLETED)
        stuck.cancel()
        if not task.done() and attempt.engine is engine:
            log.warning("engine did not stop its task in time, so it is ended %s", fields(pid=engine.pid))
            await engine.stop(grace_seconds=0)


async def _unless(withdrawn: asyncio.Event, work: Awaitable[T]) -> T:
    """The result of `work`; raises Cancelled at once when the attempt is withdrawn."""
    doing = asyncio.ensure_future(work)
    given_up = asyncio.create_task(withdrawn.wait(), name="withdrawn")
    both: set[asyncio.Future[Any]] = {doing, given_up}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise Cancelled("the attempt was withdrawn")
        return doing.result()
    finally:
        for one in both:
            one.cancel()
        await asyncio.wait(both)


def _way(task: AnyTask) -> tuple[BlobRef | None, Step | None]:
    """(the weights of a task, the step that leads to them), where the step's files differ from the weights' own file; else no step.

    A step that changes nothing leads to the file that it begins from. A step from zeros is the same file as its result.
    """
    if isinstance(task, PredictTask | SyncTask | ConvertTask | WarmUpTask):
        return None, None
    weights, step = task.weights, task.step
    if weights is None or step is None or weights.sha256 in (step.base.sha256, step.update.sha256):
        return weights, None
    return weights, step


def _runtime(task: AnyTask) -> str:
    return "LiteRT" if getattr(task, "model_format", "") == "tflite" else "TensorFlow"


def _disk_trouble(error: OSError) -> PotluckError:
    return Unavailable(f"this node's disk fails: {error}")
