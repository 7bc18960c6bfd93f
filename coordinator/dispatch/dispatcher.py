"""Performs the decisions of jobs' plans: journals events, leases shards, collects results, tells clients.

Level-triggered: whenever something changed, and at every tick, each active job plans again from its state. A decision that
comes twice is performed once; what was lost on the way (a message, a node, this process) is asked for again.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import replace as replace_view
from typing import Any

from msgspec.structs import replace

from coordinator.dispatch.announcer import PROGRESS_SECONDS, Announcer
from coordinator.dispatch.collecting import Collector
from coordinator.dispatch.jobstore import JobStore, meant
from coordinator.dispatch.judging import Judge
from coordinator.dispatch.leases import Held, Leases
from coordinator.dispatch.packed import Packed
from coordinator.journal import FATAL
from coordinator.plans.checking import bounded_error, bounded_renewal
from coordinator.plans.decisions import Choose, CloseEpoch, CloseRound, CloseSync, Complete, Decision, Lease, Withdraw
from coordinator.plans.events import (
    AnyEvent,
    AttemptEnded,
    AttemptFinished,
    AttemptLeased,
    EpochEnded,
    JobFinished,
    JobStarted,
    OfTraining,
    RoundClosed,
    StopAsked,
)
from coordinator.plans.job import EndlessChoices, Job, settled
from coordinator.plans.placement import ClusterView
from coordinator.plans.training import privacy, scores
from coordinator.registry import Registry
from coordinator.serving.serving import Serving
from potluck.errors import Cancelled, Conflict, DiskFull, PotluckError, Unavailable
from potluck.logs import fields
from potluck.settings import CoordinatorSettings
from potluck.surviving import surviving
from potluck.wire.failures import error_info
from potluck.wire.jobs import AnyJobSpec, Deploy, Train
from potluck.wire.questions import JobChanged, JobEnded
from potluck.wire.reports import LeaseRefused, LeaseRenewed, LeaseTaken, ShardFailed, ShardFinished
from potluck.wire.tasks import AnyTaskResult
from potluck.wire.values import BlobRef, ErrorInfo, Message

log = logging.getLogger(__name__)

ALSO_LIMIT = 8
"""Most other attempts that a renewal may name: a node never holds more."""
REST_FACTOR = 10.0
REST_LIMIT_SECONDS = 0.02
"""After planning, it rests this many times as long as the plans took, up to the limit: a plan's cost depends on the number of nodes, not
on how much happened."""
ENDLESS_LIMIT = 10
"""How often a plan of a job may continue to choose before the job fails."""
ROOM_SECONDS = 5.0
"""How long an action waits before it is tried again, after our disk had no room for it."""


@dataclass(frozen=True)
class _NoRoom:
    """An action that had no room on our disk: when to try it again, and the reason."""

    until: float
    reason: str


class Dispatcher:
    """All jobs of the coordinator. `run` must be running for anything to happen."""

    def __init__(
        self,
        *,
        announcer: Announcer,
        registry: Registry,
        serving: Serving,
        jobs: JobStore,
        leases: Leases,
        collector: Collector,
        packed: Packed,
        settings: CoordinatorSettings,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._announcer = announcer
        self._registry = registry
        self._serving = serving
        self._store = jobs
        self._leases = leases
        self._collector = collector
        self._packed = packed
        self._settings = settings
        self._clock = clock
        self._judge = Judge(leases, collector, announcer, clock)
        self._actions: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._no_room: dict[tuple[str, str], _NoRoom] = {}
        """Actions that wait for room, by job and action."""
        self._dirty: dict[str, None] = {}
        """Jobs with changes since they were last planned."""
        self._offered = False
        """Whether there may be a free slot for any job."""
        self._planning_seconds = self._rest_seconds = 0.0
        self._endless: Counter[str] = Counter()
        """How often in a row each job's plan continued to choose."""
        self._wake = asyncio.Event()
        self._tasks: asyncio.TaskGroup | None = None

    # --- what clients ask ---------------------------------------------------------------------------------------------

    def submit(self, spec: AnyJobSpec, request_id: str, owner: str = "") -> Job:
        """A new job, or the job that this request made before. `owner` as in JobSubmitted. Raises NotFound, InvalidRequest."""
        known = self._store.by_request(request_id)
        if known is not None:
            return known
        try:
            submitted = self._store.resolve(spec, request_id, uuid.uuid4().hex[:12], self._clock())
        except PotluckError:
            self._packed.refused(spec)
            raise
        job = self._store.add(replace(submitted, owner=owner) if owner else submitted)
        self._packed.asked(spec)
        log.info("job submitted %s", fields(job=job.job_id, kind=job.kind))
        self._changed(job)
        return job

    def cancel(self, job_id: str) -> Job:
        """End a job, unless it has ended. Raises NotFound."""
        job = self.job(job_id)
        if job.active:
            self._finish(job, "cancelled", error=error_info(Cancelled(f"job {job.job_id} was cancelled")))
            if (deploying := self._actions.get((job.job_id, "deploy"))) is not None:
                deploying.cancel()
            if job.deploying:
                self._serving.give_up(job.deploying)
        return job

    def stop(self, job_id: str) -> Job:
        """End a training job after the current epoch. Raises NotFound, and Conflict for another kind of job."""
        job = self.job(job_id)
        if not isinstance(job.submitted.spec, Train):
            raise Conflict(
                f"job {job.job_id} is of kind {job.kind!r}: only training can end early; `potluck cancel` ends other jobs"
            )
        if job.active:
            self._record(job, StopAsked(at=self._clock()))
            self._changed(job)
        return job

    def job(self, job_id: str) -> Job:
        """A job by its id, or by a beginning that only its id has. Raises NotFound, and InvalidRequest where several ids begin so."""
        return self._store.jobs[meant(job_id, self._store.jobs)]

    def described(self, job: Job) -> JobChanged:
        return self._announcer.described(job, self._clock())

    def ended(self, job: Job) -> JobEnded | None:
        """The result of a job that has ended, with us as a holder of its blobs."""
        return self._announcer.ended(job)

    @property
    def shortage(self) -> str:
        """Why jobs wait for room on our disk; "" where none does."""
        return next((found.reason for found in self._no_room.values()), "")

    def all_described(self, after: str) -> Iterator[JobChanged]:
        """Jobs that came after the job with this id, oldest first; all jobs if it is unknown."""
        jobs = self._store.jobs
        known = after in jobs
        for job_id, job in jobs.items():
            if not known:
                yield self.described(job)
            known = known and job_id != after

    def republish(self) -> None:
        """Publish all retained states again: after a reconnect, the broker may have lost them."""
        self._announcer.tell_all(self._clock())

    # --- what nodes say -----------------------------------------------------------------------------------------------

    def on_node_message(self, node_id: str, message: Message) -> None:
        """Handle a node's events about shards; ignore others."""
        match message:
            case LeaseTaken():
                if (held := self._heard(node_id, message.attempt_id)) is not None:
                    held.taken = True
                    self._leases.accepted(node_id)
            case LeaseRenewed():
                if (held := self._heard(node_id, message.attempt_id)) is not None:
                    said = bounded_renewal(held.body.task, message)
                    held.done, held.metrics, held.stage = said.done, said.metrics, said.stage
                    self._announcer.changed(held.job_id)
                for attempt_id in (message.attempt_id, *message.also[:ALSO_LIMIT]):
                    if (held := self._heard(node_id, attempt_id)) is not None:
                        held.taken = True
                    elif attempt_id not in self._leases and not self._leases.behind:
                        # We gave it up (or restarted without it): the node must not work for nothing.
                        self._leases.withdraw(node_id, attempt_id, "unknown")
            case LeaseRefused():
                if self._heard(node_id, message.attempt_id) is not None:
                    # This is not the shard's fault: it goes to another node, and does not count as a failure.
                    self._leases.refused(node_id, self._clock())
                    self._end_attempt(message.attempt_id, f"refused: {message.error.message[:200]}", None)
            case ShardFailed():
                held = self._heard(node_id, message.attempt_id)
                if held is not None or not self._leases.behind:
                    self._leases.acknowledge(node_id, message.attempt_id)
                if held is not None and not held.collecting:
                    error = bounded_error(message.error)
                    self._end_attempt(message.attempt_id, "the node reported an error", error)
            case ShardFinished():
                held = self._heard(node_id, message.attempt_id)
                if held is None:
                    if not self._leases.behind:
                        self._leases.acknowledge(node_id, message.attempt_id)
                elif not held.collecting:
                    self._on_result(held, message)
            case _:
                pass

    def node_joined(self) -> None:
        self._offer()

    def node_lost(self, node_id: str, reason: str) -> None:
        """Take back at once what the node held under lease."""
        for attempt_id in self._leases.of_node(node_id):
            self._end_attempt(attempt_id, f"node {node_id} was lost: {reason}", None)

    # --- the loop -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Plan and act until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            self._resume()
            ticked_at = 0.0
            while True:
                try:
                    async with asyncio.timeout(min(PROGRESS_SECONDS, self._settings.resend_seconds) / 2):
                        await self._wake.wait()
                except TimeoutError:
                    pass  # time for a tick
                await asyncio.sleep(self._rest_seconds)  # events that come meanwhile are planned together
                self._wake.clear()
                now = self._clock()
                if now - ticked_at >= self._settings.resend_seconds / 2:
                    ticked_at = now
                    with surviving("leases", fatal=FATAL):
                        self._tick(now)
                self._plan_due()
                with surviving("news of jobs", fatal=FATAL):
                    self._announcer.tell_due(now)
                self._store.flush()

    def _plan_due(self) -> None:
        """Plan the jobs that changed; if there are free slots, plan all jobs in turn until the slots are taken.

        The job that got nothing for the longest time comes first: otherwise the oldest jobs would take every free slot.
        """
        self._planning_seconds = 0.0
        due, offered = self._dirty, self._offered
        self._dirty, self._offered = {}, False
        found = [job for job_id in (self._store.active if offered else due) if (job := self._store.jobs.get(job_id))]
        for job in sorted(found, key=lambda job: job.leased_at):
            if job.job_id in due or self._leases.free(self._clock()):
                self._dirty.pop(job.job_id, None)
                self._plan(job)
        self._rest_seconds = min(REST_LIMIT_SECONDS, REST_FACTOR * self._planning_seconds)

    def _resume(self) -> None:
        """Continue the jobs that the journal has as running; nodes that still work on them go on."""
        now = self._clock()
        for job_id in self._store.active:
            job = self._store.jobs[job_id]
            for attempt in job.attempts.values():
                self._leases.hold(job, attempt, now)
            log.info("job resumed %s", fields(job=job_id, kind=job.kind, attempts=len(job.attempts)))
            self._changed(job)

    def _tick(self, now: float) -> None:
        for attempt_id, held in self._leases.expired(now):
            reason = f"nothing was heard of it for {now - held.heard_at:.0f} s"
            self._leases.withdraw(held.node_id, attempt_id, reason)
            self._end_attempt(attempt_id, reason, None)
        self._leases.send_due(now)
        self._packed.tick()
        self._store.pin_rounds()
        self._dirty.update(dict.fromkeys(self._store.active))

    def _plan(self, job: Job) -> None:
        # A defect in one job's plan or state must not stop other jobs, nor the coordinator at its next start.
        try:
            self._plan_guarded(job)
        except PotluckError as error:
            self._finish(job, "failed", error=error_info(error))
        except Exception as error:
            log.exception("planning failed %s", fields(job=job.job_id))
            if job.active:
                self._finish(job, "failed", error=ErrorInfo(code="internal", message=f"planning failed: {error!r}"))

    def _plan_guarded(self, job: Job) -> None:
        if not job.active:
            return
        error = job.error(self._settings.attempts_limit, self._leases.view(self._clock()))
        if error is not None:
            self._finish(job, "failed", error=error)
            return
        if isinstance(job.submitted.spec, Deploy) and job.strategy is None:
            self._act(job.job_id, "deploy", self._deploy(job, job.submitted.spec))
            return
        began = time.perf_counter()
        decisions = self._decisions(job)
        self._planning_seconds += time.perf_counter() - began
        for decision in decisions:
            self._perform(job, decision)

    def _decisions(self, job: Job) -> list[Decision]:
        """The job's plan; if one node makes planning fail, the plan without that node."""
        view = self._leases.view(self._clock())
        try:
            return settled(job, view, lambda event: self._record(job, event))
        except EndlessChoices as error:  # no node's fault; choices stay, so the next plan may finish
            self._endless[job.job_id] += 1
            if self._endless[job.job_id] >= ENDLESS_LIMIT:
                raise
            log.warning("planning continues to choose, and is tried again %s", fields(job=job.job_id, reason=error))
            return []
        except PotluckError:
            raise
        except Exception as error:
            for node in view.nodes:
                others = replace_view(view, nodes=tuple(other for other in view.nodes if other is not node))
                with suppress(Exception):
                    decisions, choices = _tried(job, others)
                    for event in choices:
                        self._record(job, event)
                    log.exception("planning failed with a node %s", fields(job=job.job_id, node=node.node_id))
                    self._leases.quarantine(node.node_id, f"planning failed with it: {repr(error)[:200]}")
                    return decisions
            raise

    def _perform(self, job: Job, decision: Decision) -> None:
        now = self._clock()
        match decision:
            case Lease():
                attempt_id = uuid.uuid4().hex[:16]
                self._record(
                    job,
                    AttemptLeased(
                        at=now,
                        attempt_id=attempt_id,
                        shard_id=decision.shard_id,
                        node_id=decision.node_id,
                        task=decision.task,
                    ),
                )
                self._leases.send(self._leases.hold(job, job.attempts[attempt_id], now), now)
            case Withdraw():
                if (held := self._leases.get(decision.attempt_id)) is not None:
                    self._leases.withdraw(held.node_id, decision.attempt_id, decision.reason)
                self._end_attempt(decision.attempt_id, decision.reason, None)
            case Choose():
                raise AssertionError("choices are recorded before their plan is performed")
            case CloseRound():
                self._act(job.job_id, f"round {decision.round}", self._close_round(job, decision))
            case CloseSync():
                self._close_sync(job, decision)
            case CloseEpoch():
                epoch = decision.epoch
                self._record(job, EpochEnded(at=now, epoch=decision.epoch))
                log.info(
                    "epoch ended %s",
                    fields(
                        job=job.job_id,
                        epoch=epoch.epoch,
                        rounds=epoch.rounds,
                        computing=round(epoch.computing, 3),
                        **epoch.metrics,
                    ),
                )
                self._changed(job)
            case Complete() if (job.job_id, "deploy") not in self._actions:  # otherwise it is past that
                self._act(job.job_id, "complete", self._complete(job))

    # --- actions: what takes time ---------------------------------------------------------------------------------------

    def _act(self, job_id: str, name: str, action: Coroutine[Any, Any, None]) -> None:
        """Start an action of a job, unless the same action is running."""
        key = (job_id, name)
        if key in self._actions or self._tasks is None or self._waits_for_room(key):
            action.close()
            return
        task = self._tasks.create_task(self._guard(job_id, name, action), name=f"{job_id} {name}")
        self._actions[key] = task
        task.add_done_callback(lambda _: self._actions.pop(key, None))

    async def _guard(self, job_id: str, name: str, action: Coroutine[Any, Any, None]) -> None:
        if (job := self._store.jobs.get(job_id)) is None:
            action.close()
            return
        try:
            await action
            self._found_room(job_id)
        except PotluckError as error:
            if not job.active:
                return
            if isinstance(error, DiskFull) and name != "deploy":  # that is about the nodes' disks
                self._wait_for_room(job, name, error)
            else:
                self._finish(job, "failed", error=error_info(error))
        except Exception as error:  # noqa: BLE001 - the same boundary as in _plan: one job's defect stays its own
            self._broke(job, name, error)

    def _broke(self, job: Job, what: str, error: Exception) -> None:
        log.exception("action failed %s", fields(job=job.job_id, action=what))
        if job.active:
            self._finish(job, "failed", error=ErrorInfo(code="internal", message=f"internal error: {error!r}"))

    def _wait_for_room(self, job: Job, name: str, error: DiskFull) -> None:
        """A full disk is no job's fault: the job keeps what it has, and its next plan asks for the same again."""
        if not any(job_id == job.job_id for job_id, _ in self._no_room):
            log.warning("job waits for room %s", fields(job=job.job_id, reason=error.message))
        self._no_room[job.job_id, name] = _NoRoom(self._clock() + ROOM_SECONDS, error.message)
        self._announcer.doing(job.job_id, f"waits for room at the coordinator: {error.message}")

    def _waits_for_room(self, key: tuple[str, str]) -> bool:
        found = self._no_room.get(key)
        return found is not None and self._clock() < found.until

    def _found_room(self, job_id: str) -> None:
        left = {key: found for key, found in self._no_room.items() if key[0] != job_id}
        if len(left) < len(self._no_room):
            self._no_room = left
            log.info("job goes on, there is room %s", fields(job=job_id))
            self._announcer.doing(job_id, "")

    def _on_result(self, held: Held, message: ShardFinished) -> None:
        """Take a result that is what was asked for: at once, if it has no blobs to fetch."""
        job = self._store.jobs[held.job_id]
        try:
            if (refusal := self._judge.refusal(held, message.result)) is not None:
                self._end_attempt(message.attempt_id, "its result is not used", refusal)
            elif self._collector.at_hand(message.result):
                self._take(job, held, message.attempt_id, message.result)
            else:
                self._act(job.job_id, f"collect {message.attempt_id}", self._collect(job, held, message))
        except Exception as error:  # noqa: BLE001 - the same boundary as in _plan: one job's defect stays its own
            self._broke(job, "a result", error)

    async def _collect(self, job: Job, held: Held, message: ShardFinished) -> None:
        attempt_id = message.attempt_id
        if attempt_id not in self._leases:
            return
        held.collecting = True
        training, attempt = job.training, job.attempts.get(attempt_id)
        result: AnyTaskResult = message.result
        try:
            if attempt is None or training is None or training.wants(attempt):
                result = await self._collector.collect(result)
        except Unavailable as error:
            held.collecting = False
            self._end_attempt(attempt_id, f"its result could not be fetched: {error.message}", None)
            return
        except DiskFull:
            held.collecting = False  # its node keeps the result, and offers it again until we have taken it
            held.no_room = True
            raise
        except PotluckError as error:
            held.collecting = False
            self._end_attempt(attempt_id, "its result cannot be used", error_info(error))
            return
        self._take(job, held, attempt_id, result)

    def _take(self, job: Job, held: Held, attempt_id: str, result: AnyTaskResult) -> None:
        if attempt_id in self._leases:
            self._record(job, AttemptFinished(at=self._clock(), attempt_id=attempt_id, result=result))
            self._drop(attempt_id)
        self._leases.acknowledge(held.node_id, attempt_id)
        self._changed(job)

    async def _close_round(self, job: Job, decision: CloseRound) -> None:
        spec, training = job.submitted.spec, job.training
        if job.ended is not None:
            return
        assert isinstance(spec, Train)
        assert training is not None
        if spec.privacy is not None and spec.privacy.noise_multiplier:
            await asyncio.to_thread(privacy.load)  # in the loop, it would keep all other answers waiting
        closed = await self._collector.close_round(decision, spec, self._clock)
        if job.active:  # do not await anything before it is recorded: its blobs are pinned only until here
            used = training.used_up()
            self._record(job, closed)
            self._store.pin_rounds()
            await self._store.sync()  # otherwise a power cut could undo the record, but not the deletions
            self._collector.drop_round(decision, used, closed, self._store.kept())
            outer = {"outer_learning_rate": closed.learning_rate, "outer_momentum": round(closed.momentum, 3)}
            rejected = ",".join(closed.rejected) or None
            log.info(
                "round closed %s",
                fields(
                    job=job.job_id,
                    round=closed.round,
                    samples=closed.samples,
                    rejected=rejected,
                    **outer,
                    **closed.metrics,
                ),
            )
            self._changed(job)

    async def _drop_used(self, used: Sequence[BlobRef]) -> None:
        await self._store.sync()
        self._collector.drop(used, self._store.kept())

    def _close_sync(self, job: Job, decision: CloseSync) -> None:
        assert job.training is not None
        used = job.training.used_up()
        closed = RoundClosed(
            at=self._clock(),
            round=decision.round,
            weights=decision.weights,
            optimizer=decision.optimizer,
            samples=decision.samples,
            metrics=decision.metrics,
        )
        self._record(job, closed)
        self._store.pin_rounds()
        self._act(job.job_id, f"drop of round {decision.round}", self._drop_used(used))
        log.info(
            "round closed %s", fields(job=job.job_id, round=closed.round, samples=closed.samples, **closed.metrics)
        )
        self._changed(job)

    async def _deploy(self, job: Job, spec: Deploy, **parts: Any) -> None:
        if job.state == "queued":
            self._record(job, JobStarted(at=self._clock()))
            self._changed(job)
        job.deploying = spec.model
        name = await self._serving.deploy(spec, lambda stage: self._announcer.doing(job.job_id, stage))
        if job.active:
            self._finish(job, "succeeded", deployment=name, **parts)

    async def _complete(self, job: Job) -> None:
        if job.ended is not None:
            return
        parts = await self._collector.result(job)
        spec = job.submitted.spec
        if not job.active:
            return
        if isinstance(spec, Train) and spec.register is not None and isinstance(parts.get("model"), BlobRef):
            info = self._registry.add_model(
                spec.register,
                parts["model"],
                signature=parts.pop("signature", None),
                image=job.image or job.submitted.image,
                classes=parts.get("classes", ()),
                rate=job.dataset.format.rate if job.dataset else 0,
                metrics=_metrics_of(job, parts.get("best_epoch", 0)),
                source=f"job {job.job_id}",
                job_id=job.job_id,
                now=self._clock(),
            )
            parts["registered"] = f"{info.name}:{info.version}"
        if isinstance(spec, Deploy):
            self._register_quantized(job, spec, parts)
            as_it_is = replace(spec, model=parts["registered"], quantize="none", calibration=None, evaluation=None)
            self._act(job.job_id, "deploy", self._deploy(job, as_it_is, **parts))
            return
        parts.pop("signature", None)
        self._finish(job, "succeeded", **parts)

    def _register_quantized(self, job: Job, spec: Deploy, parts: dict[str, Any]) -> None:
        """Register the converted model as a version of its own name; its metrics tell what the conversion has changed."""
        original = self._registry.model(spec.model)
        info = self._registry.add_model(
            f"{original.name}-{spec.quantize}",
            parts["model"],
            format="tflite",
            image=job.image or original.image,
            classes=original.classes,
            rate=original.rate,
            metrics=scores.changes(parts["before"].metrics, parts["evaluation"].metrics),
            source=f"{spec.model}, {spec.quantize}",
            job_id=job.job_id,
            now=self._clock(),
        )
        parts["registered"] = f"{info.name}:{info.version}"

    # --- bookkeeping ----------------------------------------------------------------------------------------------------

    def _finish(self, job: Job, state: Any, **parts: Any) -> None:
        """End a job: journal it, withdraw its leases, tell everybody."""
        if not job.active:
            return
        now = self._clock()
        result = JobEnded(
            job_id=job.job_id,
            kind=job.kind,
            state=state,
            created_at=job.submitted.at,
            started_at=job.started_at,
            ended_at=now,
            history=job.history.told(),
            rounds=tuple(job.history.rounds),
            checkpoint=job.training.checkpoint() if job.training is not None else None,
            image=job.image,
            **parts,
        )
        for attempt_id in list(job.attempts):
            held = self._leases.get(attempt_id)
            if held is not None:
                self._leases.withdraw(held.node_id, attempt_id, f"the job has {state}")
                self._drop(attempt_id)
        final = self.described(job).progress
        self._record(job, JobFinished(at=now, result=result))
        self._leases.forget(job)
        self._no_room = {key: found for key, found in self._no_room.items() if key[0] != job.job_id}
        self._judge.forget(job.job_id)
        self._endless.pop(job.job_id, None)
        for forgotten in self._store.ended(job, final):
            self._announcer.forget(forgotten)
        self._packed.ended(job.submitted.spec)
        reason = result.error.message if result.error else None
        log.info("job ended %s", fields(job=job.job_id, state=state, error=reason))
        self._announcer.tell(job, now)
        self._offer()

    def _record(self, job: Job, event: AnyEvent) -> None:
        self._store.record(job, event)

    def _heard(self, node_id: str, attempt_id: str) -> Held | None:
        return self._leases.heard(node_id, attempt_id, self._clock())

    def _end_attempt(self, attempt_id: str, reason: str, error: ErrorInfo | None) -> None:
        held = self._leases.get(attempt_id)
        if held is None:
            return
        job = self._store.jobs[held.job_id]
        log.info(
            "attempt ended %s",
            fields(job=job.job_id, attempt=attempt_id, node=held.node_id, reason=error.message if error else reason),
        )
        self._record(job, AttemptEnded(at=self._clock(), attempt_id=attempt_id, reason=reason, error=error))
        self._drop(attempt_id)
        self._changed(job)

    def _drop(self, attempt_id: str) -> None:
        self._leases.drop(attempt_id)
        self._offer()

    def _offer(self) -> None:
        """There is a free slot or a new node, for any job."""
        self._offered = True
        self._wake.set()

    def _changed(self, job: Job) -> None:
        if job.active:
            self._dirty[job.job_id] = None
        self._announcer.changed(job.job_id)
        self._wake.set()


def _tried(job: Job, view: ClusterView) -> tuple[list[Decision], list[OfTraining]]:
    """(decisions, choices that they rest on) of a plan for this view, without changing the job."""
    trial, choices = copy.deepcopy(job), list[OfTraining]()

    def choose(event: OfTraining) -> None:
        trial.apply(event)
        choices.append(event)

    return settled(trial, view, choose), choices


def _metrics_of(job: Job, best_epoch: int) -> dict[str, float]:
    """The metrics of the epoch that a training job's model is from: the best one where a metric was monitored, else the last."""
    found = [epoch for epoch in job.history.epochs if epoch.epoch == best_epoch] or job.history.epochs[-1:]
    return dict(found[0].metrics) if found else {}
