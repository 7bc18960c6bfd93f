"""Jobs as pure transitions: events change the state; `plan` reads the state and decides what to do next.

Every event is journaled before its effects happen. Replaying a job's events gives its state back, and planning again from
there repeats the effects that a killed coordinator did not reach. So nothing else needs to be remembered.
Pure: no clock, no randomness, no input or output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from msgspec import json
from msgspec.structs import replace

from coordinator.plans.decisions import Choose, Decision
from coordinator.plans.events import (
    AnyEvent,
    AttemptEnded,
    AttemptFinished,
    AttemptLeased,
    EpochEnded,
    JobFinished,
    JobStarted,
    JobSubmitted,
    MeasureAgain,
    OfTraining,
    RoundBroken,
    RoundClosed,
    RoundPlanned,
    StoodStill,
    StopAsked,
    StrategyChosen,
)
from coordinator.plans.placement import ClusterView, NodeView
from potluck.errors import (
    CodeNotAllowed,
    EngineFailed,
    InvalidData,
    InvalidModel,
    InvalidRequest,
    ModelFailed,
    OutOfMemory,
    PeerLost,
)
from potluck.wire.failures import as_error
from potluck.wire.messages import (
    AnyJobSpec,
    AnyTask,
    AnyTaskResult,
    BlobRef,
    Dataset,
    Deploy,
    EpochMetrics,
    ErrorInfo,
    ExportResult,
    ImageOptions,
    JobChanged,
    JobEnded,
    JobProgress,
    JobState,
    JobSubject,
    RoundMetrics,
    Train,
    WarmUpResult,
)

OPINION_SECONDS = 30.0
"""How long another node has to show that the job can be done, or to agree that it cannot."""
REST_SECONDS = 1.0
"""A node that reported an error rests for twice as long, and twice that after the next in a row."""
VALIDATION = "validation-"
"""Prefix of the ids of validation shards."""
CHECK = "check-validation"
"""The id of the shard that looks at validation data before they are due."""
ROUNDS_LIMIT_BYTES = 64 * 1024
"""How large a job's rounds may be in its result: the whole result must fit into one message."""
HISTORY_LIMIT_BYTES = 160 * 1024
"""Rounds and epochs together: beside very many epochs fewer rounds are kept."""
CHOICES_LIMIT = 8
"""So many choices in a row a plan may make, before it decides anything else."""


@dataclass(frozen=True)
class Attempt:
    attempt_id: str
    shard_id: str
    node_id: str
    leased_at: float
    task: AnyTask | None = field(default=None, repr=False, compare=False)
    """The leased task."""


class Strategy(Protocol):
    """How one kind of job is cut into shards. It hears of attempts from the job, and decides."""

    def plan(self, view: ClusterView, attempts: dict[str, Attempt]) -> list[Decision]: ...

    def leased(self, attempt: Attempt, task: AnyTask) -> None: ...

    def finished(self, attempt: Attempt, result: AnyTaskResult, at: float) -> None: ...

    def ended(self, attempt: Attempt, error: ErrorInfo | None) -> None: ...

    def progress(
        self, running: dict[str, tuple[Attempt, int, dict[str, float]]], nodes: Sequence[NodeView] = ()
    ) -> JobProgress:
        """`running`: the reports of each open attempt (items done, metrics). `nodes`: those that can compute now."""
        ...


@runtime_checkable
class Training(Strategy, Protocol):
    """How training is cut into rounds. Methods alone: whether a strategy is one is looked at with every event."""

    def happened(self, event: OfTraining) -> Training:
        """An event that only training knows: a round closed, an epoch ended, a choice. Returns the strategy that continues."""
        ...

    def wants(self, attempt: Attempt) -> bool:
        """Whether the blobs of this attempt's result are of use."""
        ...

    def kept(self) -> set[str]:
        """Blobs that must stay when a round is thrown away, of this job or of one that holds the same."""
        ...

    def used_up(self) -> tuple[BlobRef, ...]:
        """Blobs that the end of the open round replaces."""
        ...

    def checkpoint(self) -> BlobRef | None:
        """The weights after the last round that was closed; before that, those that it began from; None for the model's own."""
        ...

    def exported(self) -> ExportResult | None:
        """The model that was made, once it is."""
        ...

    def best_epoch(self) -> int:
        """Whose weights the model has, where a metric is monitored; else 0."""
        ...


@dataclass
class Job:
    """One job: the state of its strategy, and its open attempts."""

    submitted: JobSubmitted
    strategy: Strategy | None
    dataset: Dataset | None = None
    state: JobState = "queued"
    started_at: float = 0.0
    ended: JobEnded | None = None
    attempts: dict[str, Attempt] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    """How many attempts of each node have ended with an error since its last success."""
    last_error: ErrorInfo | None = None
    hopeless: dict[str, ErrorInfo] = field(default_factory=dict)
    """Errors from nodes that trying again cannot mend. One node may be wrong (it may lack a library): it gets no more of the job while
    there are others. When two nodes report one, the job ends."""
    hopeless_at: float = 0.0
    """When the first node reported one."""
    done_by: set[str] = field(default_factory=set)
    """Nodes that have done something for the job."""
    leased_at: float = 0.0
    """When the job last got a part of a node's time."""
    touched_at: float = 0.0
    """When an attempt last ended with a result or with its own error."""
    participants: set[str] = field(default_factory=set)
    resting: dict[str, float] = field(default_factory=dict)
    """Nodes that reported an error, and until when they get nothing of this job."""
    refused: dict[str, ErrorInfo] = field(default_factory=dict)
    """Nodes that do not allow the model's code, or lack the memory, and their errors: they get nothing of this job."""
    short: set[str] = field(default_factory=set)
    """Nodes whose last attempt ended for lack of memory; after a second time, they are left out."""
    history: list[EpochMetrics] = field(default_factory=list)
    rounds: list[RoundMetrics] = field(default_factory=list)
    rounds_stride: int = 1
    """One round of this many is kept: a power of two."""
    rounds_bytes: int = 0
    history_bytes: int = 0
    deploying: str = ""
    """The model that is deployed for the job."""
    image: ImageOptions | None = None
    """How images become the model's input, from the first node that has made them so."""

    @property
    def job_id(self) -> str:
        return self.submitted.job_id

    @property
    def kind(self) -> str:
        return str(self.submitted.spec.__struct_config__.tag)

    @property
    def subject(self) -> JobSubject:
        """What the job is about, with people's names."""
        spec, done = self.submitted.spec, self.ended.registered if self.ended is not None else ""
        data = data_of(spec)
        if isinstance(spec, Deploy):
            return JobSubject(name=done, model=spec.model, data=data[-1] if data else "")
        model = spec.model if isinstance(spec.model, str) else spec.model_name or spec.model.sha256[:12]
        asked = spec.register if isinstance(spec, Train) else None
        return JobSubject(name=done or asked or "", model=model, data=spec.dataset)

    @property
    def runtimes(self) -> tuple[str, ...]:
        """The runtimes that a node needs to do all of it."""
        if self.strategy is None:
            return ()
        lite = self.submitted.model_format == "tflite" or isinstance(self.submitted.spec, Deploy)
        return ("tensorflow", "litert") if lite else ("tensorflow",)

    @property
    def training(self) -> Training | None:
        """Its strategy, where that is one of training."""
        return self.strategy if isinstance(self.strategy, Training) else None

    @property
    def active(self) -> bool:
        return self.state in ("queued", "running")

    def apply(self, event: AnyEvent) -> None:
        """Change the state. Events of attempts that are no longer open are ignored: a result counts once."""
        match event:
            case AttemptLeased():
                attempt = Attempt(event.attempt_id, event.shard_id, event.node_id, event.at, event.task)
                self.attempts[attempt.attempt_id] = attempt
                self.leased_at = event.at
                self.participants.add(attempt.node_id)
                if self.state == "queued":
                    self.state, self.started_at = "running", event.at
                self._strategy.leased(attempt, event.task)
            case AttemptFinished():
                finished = self.attempts.pop(event.attempt_id, None)
                if finished is not None:
                    self.done_by.add(finished.node_id)
                    self.touched_at = event.at
                    if not isinstance(event.result, WarmUpResult):  # getting ready is not a success yet
                        self.failures.clear()
                        self.short.discard(finished.node_id)
                    self.image = self.image or event.result.image
                    self._strategy.finished(finished, event.result, event.at)
            case AttemptEnded():
                ended = self.attempts.pop(event.attempt_id, None)
                if ended is not None:
                    if event.error is not None:
                        self.touched_at = event.at
                    self._strategy.ended(ended, event.error)
                    if event.error is not None and event.error.code != PeerLost.code:
                        self._failed(_placed(event.error, ended), ended.node_id, event.at)
            case RoundClosed():
                self.strategy = self._trained().happened(event)
                self._keep(event)
            case EpochEnded():
                self.history.append(event.epoch)
                self.history_bytes += _size(event.epoch)
                self.strategy = self._trained().happened(event)
            case StopAsked() | StrategyChosen() | RoundPlanned() | MeasureAgain() | RoundBroken() | StoodStill():
                self.strategy = self._trained().happened(event)
            case JobFinished():
                self.ended = event.result
                self.state = event.result.state
                self.attempts.clear()
            case JobStarted():
                self.state, self.started_at = "running", event.at
            case JobSubmitted():
                raise ValueError("a job is submitted once")

    def plan(self, view: ClusterView) -> list[Decision]:
        """What to do next. The same state and view give the same decisions; the state does not change.

        Raises CodeNotAllowed or OutOfMemory, by the first node that was left out for it, when all nodes are left out.
        """
        if not self.active or self.strategy is None:
            return []
        nodes: Sequence[NodeView] = view.nodes
        if self.refused:
            nodes = [node for node in nodes if node.node_id not in self.refused]
        if view.nodes and not nodes and self.participants <= self.refused.keys():
            reason = self.refused[view.nodes[0].node_id]
            what = "runs this model" if reason.code == CodeNotAllowed.code else "can do this job"
            raise as_error(reason, f"no node {what}: {reason.message}")
        if not (self.refused or self.hopeless or self.resting):
            return self.strategy.plan(view, self.attempts)
        others = [node for node in nodes if node.node_id not in self.hopeless]
        if others and not self._stuck(others, view.now):
            nodes = others
        resting = frozenset(node.node_id for node in nodes if self.resting.get(node.node_id, 0.0) > view.now)
        rested = tuple(node for node in nodes if node.node_id not in resting)
        return self.strategy.plan(ClusterView(rested, view.now, resting), self.attempts)

    def error(self, attempts_limit: int, view: ClusterView) -> ErrorInfo | None:
        """The error that ends this job: one that trying again cannot mend, or too many in a row on a node while no other node works."""
        if self.hopeless and not self._other_opinion(view):
            return next(iter(self.hopeless.values()))
        if max(self.failures.values(), default=0) < attempts_limit:
            return None
        # A working node that has not failed so often may still succeed: when all die once, the job may still be possible.
        hope = any(self.failures.get(attempt.node_id, 0) < attempts_limit for attempt in self.attempts.values())
        return None if hope else self.last_error

    def _other_opinion(self, view: ClusterView) -> bool:
        """Whether a node's error that cannot be mended may be that node's own trouble, and another node can still show it.

        A node that has done something for the job is waited for, even while it is away. Others are waited for only a limited time: the
        user waits to hear of a mistake.
        """
        if len(self.hopeless) > 1:
            return False
        if not view.nodes or self.done_by - self.hopeless.keys():
            return True
        others = {node.node_id for node in view.nodes} | self.participants
        return (
            bool(others - self.hopeless.keys() - self.refused.keys()) and view.now - self.hopeless_at < OPINION_SECONDS
        )

    def _stuck(self, others: Sequence[NodeView], now: float) -> bool:
        """Whether the nodes that never called the job hopeless have room for it, but do nothing: the rest may need a node that did."""
        seconds = now - self.touched_at if self.hopeless and not self.attempts else 0.0
        # A node without room may be busy with other jobs, or refuse its leases: it is waited for, but not for ever.
        return seconds >= (OPINION_SECONDS if all(node.free_slots for node in others) else 10 * OPINION_SECONDS)

    def changed(self, progress: JobProgress) -> JobChanged:
        """The job as clients see it."""
        ended = self.ended
        return JobChanged(
            job_id=self.job_id,
            kind=self.kind,
            state=self.state,
            created_at=self.submitted.at,
            started_at=self.started_at or (ended.started_at if ended else 0.0),
            ended_at=ended.ended_at if ended else 0.0,
            progress=replace(progress, message="") if ended else progress,
            error=ended.error if ended else None,
            subject=self.subject,
        )

    @property
    def told_history(self) -> tuple[EpochMetrics, ...]:
        """The epochs for the result: of very many every second, fourth, ..., and always the last."""
        stride = 1
        while True:
            kept = self.history[::-1][::stride][::-1]
            if len(kept) < 2 or sum(map(_size, kept)) <= HISTORY_LIMIT_BYTES:
                return tuple(kept)
            stride *= 2

    def epochs_after(self, number: int) -> tuple[EpochMetrics, ...]:
        """The epochs above `number`, as many as fit into a message; for a job that has ended, as in its result."""
        known = self.ended.history if self.ended is not None else self.history
        kept: list[EpochMetrics] = []
        size = 0
        for epoch in known:
            if epoch.epoch > number:
                size += _size(epoch)
                if kept and size > HISTORY_LIMIT_BYTES:
                    break
                kept.append(epoch)
        return tuple(kept)

    def _keep(self, closed: RoundClosed) -> None:
        """Keep a round for the result. When they grow too many, every second one is dropped."""
        if closed.round % self.rounds_stride == 0:
            self.rounds.append(
                RoundMetrics(
                    round=closed.round,
                    samples=closed.samples,
                    metrics=closed.metrics,
                    outer_learning_rate=closed.learning_rate,
                    outer_momentum=closed.momentum,
                    closed_at=closed.at,
                    rejected=closed.rejected,
                )
            )
            self.rounds_bytes += _size(self.rounds[-1])
        room = min(ROUNDS_LIMIT_BYTES, HISTORY_LIMIT_BYTES - self.history_bytes)
        while self.rounds_bytes > room and len(self.rounds) > 1:
            self.rounds_stride *= 2
            self.rounds = [kept for kept in self.rounds if kept.round % self.rounds_stride == 0]
            self.rounds_bytes = sum(map(_size, self.rounds))

    def _trained(self) -> Training:
        if (training := self.training) is None:
            raise ValueError(f"job {self.job_id} is no training")
        return training

    @property
    def _strategy(self) -> Strategy:
        if self.strategy is None:
            raise ValueError(f"job {self.job_id} has no shards")
        return self.strategy

    def _failed(self, error: ErrorInfo, node_id: str, at: float) -> None:
        if error.code == CodeNotAllowed.code or (error.code == OutOfMemory.code and node_id in self.short):
            self.refused[node_id] = error
            return
        if error.code == OutOfMemory.code:
            self.short.add(node_id)
        if error.code == EngineFailed.code:
            error = replace(error, message=f"node {node_id}: {error.message}")
        self.last_error = error
        self.failures[node_id] = times = self.failures.get(node_id, 0) + 1
        # The node rests, so that the job is not tried only on a node where everything fails at once.
        self.resting[node_id] = at + REST_SECONDS * 2**times
        if not error.retryable:
            self.hopeless_at = self.hopeless_at or at
            self.hopeless.setdefault(node_id, error)


class EndlessChoices(Exception):
    """A plan makes one choice after the other: a defect of potluck, and no node's fault."""


def settled(job: Job, view: ClusterView, record: Callable[[OfTraining], None]) -> list[Decision]:
    """The job's plan after all choices that it needs: each choice is given to `record`, which applies it.

    Raises the errors of `Job.plan`, and EndlessChoices for a plan that continues to choose.
    """
    for _ in range(CHOICES_LIMIT):
        decisions = job.plan(view)
        choices = [decision.event for decision in decisions if isinstance(decision, Choose)]
        if not choices:
            return decisions
        for event in choices:
            record(event)
    raise EndlessChoices(f"the plan of job {job.job_id} continues to choose: {choices[-1]!r}")


def data_of(spec: AnyJobSpec) -> tuple[str, ...]:
    """The names of a job's data sets; a name comes twice if the job uses it twice."""
    if isinstance(spec, Deploy):
        return tuple(name for name in (spec.calibration, spec.evaluation) if name)
    validation = spec.validation if isinstance(spec, Train) else None
    return (spec.dataset, *([validation] if validation else []))


def _placed(error: ErrorInfo, attempt: Attempt) -> ErrorInfo:
    """The error, naming the validation data if it is about those."""
    about_data = error.code in (InvalidData.code, InvalidModel.code, InvalidRequest.code, ModelFailed.code)
    if about_data and attempt.shard_id.startswith((VALIDATION, CHECK)):
        return replace(error, message=f"in validation: {error.message}")
    return error


def _size(part: RoundMetrics | EpochMetrics) -> int:
    """The size in a JSON message, in bytes; less in msgpack."""
    return len(json.encode(part)) + 1
