"""Jobs as pure transitions: events change the state; `plan` reads the state and decides what to do next.

Every event is journaled before its effects happen. Replaying a job's events gives its state back, and planning again from
there repeats the effects that a killed coordinator did not reach. So nothing else needs to be remembered.
Pure: no clock, no randomness, no input or output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

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
from coordinator.plans.failings import Failings
from coordinator.plans.history import History, epochs_that_fit
from coordinator.plans.placement import ClusterView, NodeView
from potluck.errors import (
    InvalidData,
    InvalidModel,
    InvalidRequest,
    ModelFailed,
)
from potluck.wire.jobs import AnyJobSpec, Deploy, EpochMetrics, JobProgress, JobState, Train
from potluck.wire.questions import JobChanged, JobEnded, JobSubject
from potluck.wire.tasks import AnyTask, AnyTaskResult, ExportResult, WarmUpResult
from potluck.wire.values import BlobRef, Dataset, ErrorInfo, ImageOptions

VALIDATION = "validation-"
"""Prefix of the ids of validation shards."""
CHECK = "check-validation"
"""The id of the shard that looks at validation data before they are due."""
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
    leased_at: float = 0.0
    """When the job last got a part of a node's time."""
    participants: set[str] = field(default_factory=set)
    failings: Failings = field(default_factory=Failings)
    history: History = field(default_factory=History)
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
                    succeeded = not isinstance(event.result, WarmUpResult)
                    self.failings.done(finished.node_id, event.at, succeeded=succeeded)
                    self.image = self.image or event.result.image
                    self._strategy.finished(finished, event.result, event.at)
            case AttemptEnded():
                ended = self.attempts.pop(event.attempt_id, None)
                if ended is not None:
                    self._strategy.ended(ended, event.error)
                    if event.error is not None:
                        self.failings.failed(ended.node_id, _placed(event.error, ended), event.at)
            case RoundClosed():
                self.strategy = self._trained().happened(event)
                self.history.round_closed(event)
            case EpochEnded():
                self.history.epoch_ended(event.epoch)
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
        takers = self.failings.takers(view, self.participants, at_work=bool(self.attempts))
        return self.strategy.plan(takers, self.attempts)

    def error(self, attempts_limit: int, view: ClusterView) -> ErrorInfo | None:
        """The error this job must end with; None where it may go on."""
        at_work = (attempt.node_id for attempt in self.attempts.values())
        return self.failings.fatal(attempts_limit, view, self.participants, at_work)

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

    def epochs_after(self, number: int) -> tuple[EpochMetrics, ...]:
        """The epochs above `number`, as many as fit into a message; for a job that has ended, as in its result."""
        return epochs_that_fit(number, self.ended.history if self.ended is not None else self.history.epochs)

    def _trained(self) -> Training:
        if (training := self.training) is None:
            raise ValueError(f"job {self.job_id} is no training")
        return training

    @property
    def _strategy(self) -> Strategy:
        if self.strategy is None:
            raise ValueError(f"job {self.job_id} has no shards")
        return self.strategy


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
