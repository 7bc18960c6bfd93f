"""What all kinds of training do alike: pure.

An epoch has rounds, until its samples are seen. Then comes validation, if it was asked for, and then the next epoch. After the last
epoch, a node writes the model. What happens in a round is in `rounds` (nodes send updates) or `sync` (a group takes steps together).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from coordinator.plans.decisions import CloseEpoch, Complete, Decision, Lease
from coordinator.plans.events import (
    EpochEnded,
    MeasureAgain,
    OfTraining,
    RoundBroken,
    RoundClosed,
    RoundPlanned,
    StoodStill,
    StopAsked,
    StrategyChosen,
)
from coordinator.plans.job import CHECK, Attempt
from coordinator.plans.placement import ClusterView, NodeView, speeds
from coordinator.plans.training.readiness import WARM_UP, of_rounds
from coordinator.plans.training.scores import weighted
from coordinator.plans.training.state import TrainingState
from potluck.errors import Diverged
from potluck.wire.jobs import JobProgress
from potluck.wire.tasks import (
    AnyTask,
    AnyTaskResult,
    ExportResult,
    ExportTask,
    SyncResult,
    SyncTask,
    TrainResult,
    TrainTask,
    WarmUpResult,
    WarmUpTask,
)
from potluck.wire.values import BlobRef, ErrorInfo

EXPORT = "export"
"""The id of the shard that writes the model."""
Running = dict[str, tuple[Attempt, int, dict[str, float]]]


class Rounds(Protocol):
    """The rounds of a training job. They change those parts of the job's state that rounds are about."""

    @property
    def may_leave(self) -> bool:
        """Whether an epoch may end a few batches early, and the next begin with them."""
        ...

    def plan(self, view: ClusterView, attempts: dict[str, Attempt]) -> list[Decision]:
        """What to do in an epoch that lacks samples."""
        ...

    def leased(self, attempt: Attempt, task: AnyTask) -> None: ...

    def finished(self, attempt: Attempt, result: AnyTaskResult) -> None: ...

    def breaks_off(self, attempt: Attempt, error: ErrorInfo | None) -> bool:
        """A part of the open round ended without a result. Whether this ends the round: then nothing is held against the node."""
        ...

    def happened(self, event: RoundClosed | RoundBroken | StoodStill) -> None:
        """`RoundClosed` is that of the open round."""
        ...

    def done(self) -> dict[str, tuple[int, dict[str, float]]]:
        """(Samples, metrics) of the parts of the open round that are done already, by who has done them."""
        ...

    def kept(self) -> set[str]:
        """Blobs of the open round that must stay."""
        ...

    def metrics(self) -> dict[str, float]:
        """The metrics of training in the present epoch."""
        ...

    def told(self, progress: JobProgress, nodes: Sequence[NodeView], *, running: bool) -> JobProgress:
        """The progress, with what only these rounds know. `nodes`: those that can compute now. `running`: whether something runs."""
        ...


@dataclass
class TrainingStrategy:
    """One training job. `why`: its kind in words, and if `auto` chose that, the reason."""

    state: TrainingState
    rounds: Rounds
    why: str = ""

    @property
    def epoch_full(self) -> bool:
        """Whether enough samples of the present epoch are seen. While it is validated they are, even if users ask for something new."""
        epochs, crew = self.state.epochs, len(self.state.open.crew)
        return self.state.validation.under_way is not None or epochs.full(crew, may_leave=self.rounds.may_leave)

    def plan(self, view: ClusterView, attempts: dict[str, Attempt]) -> list[Decision]:
        if self.state.epochs.all_trained:
            return self._plan_export(view, attempts)
        if self.epoch_full and self.state.epochs.rounds:
            return self._plan_validation(view, attempts)
        return self.rounds.plan(view, attempts)

    def leased(self, attempt: Attempt, task: AnyTask) -> None:
        state = self.state
        if isinstance(task, TrainTask | SyncTask):
            self.rounds.leased(attempt, task)
            state.epochs.began(attempt.leased_at)
        elif isinstance(task, WarmUpTask):
            state.sharing.rehearses(attempt.node_id, state.given.indexes(task.task))
        elif attempt.shard_id == CHECK:
            state.validation.checked = True
        elif (evaluation := state.evaluation(attempt)) is not None:
            evaluation.leased(attempt, task)

    def finished(self, attempt: Attempt, result: AnyTaskResult, at: float) -> None:
        state = self.state
        if isinstance(result, TrainResult):
            state.trained(attempt, result, at)
            self.rounds.finished(attempt, result)
        elif isinstance(result, SyncResult):
            self.rounds.finished(attempt, result)
        elif isinstance(result, WarmUpResult):
            state.warmed_up(attempt, result, at)
        elif isinstance(result, ExportResult):
            state.exported = result
        elif (evaluation := state.evaluation(attempt)) is not None:
            evaluation.finished(attempt, result, at)

    def ended(self, attempt: Attempt, error: ErrorInfo | None) -> None:
        state = self.state
        if state.open.has(attempt) and self.rounds.breaks_off(attempt, error):
            return
        if (evaluation := state.evaluation(attempt)) is not None:
            evaluation.ended(attempt, error)
        elif error is not None and error.code == Diverged.code:
            state.trust.reject(attempt.node_id, error.message)
        elif attempt.shard_id == CHECK and error is not None and not error.retryable:
            # Another node is to look at the data, if there is one.
            state.validation.checked = False
        elif error is None or error.retryable:
            state.readiness.lost(attempt.node_id)

    def happened(self, event: OfTraining) -> TrainingStrategy:
        state = self.state
        match event:
            case RoundClosed():
                if event.round == state.open.number:
                    self.rounds.happened(event)
            case RoundBroken() | StoodStill():
                self.rounds.happened(event)
            case EpochEnded():
                state.epoch_ended(event)
            case StopAsked():
                state.epochs.stop()
            case RoundPlanned():
                state.sharing.planned(event)
            case MeasureAgain():
                for node_id in event.nodes:
                    state.readiness.lost(node_id)
            case StrategyChosen():
                # `auto` heeds it (`AutoStrategy.happened`), once.
                pass
        return self

    def progress(self, running: Running, nodes: Sequence[NodeView] = ()) -> JobProgress:
        state, epochs = self.state, self.state.epochs
        mine = [one for one in running.values() if state.open.has(one[0])]
        # Nodes whose parts run or are done already. Between rounds, in validation and at the end: the nodes of the last round.
        done = self.rounds.done()
        at_work = {attempt.node_id for attempt, _, _ in mine} | done.keys() or state.open.crew
        rates = {name: rate for name, rate in state.measured.rates.items() if name in at_work}
        training = sum(items for _, items, _ in mine) + sum(samples for samples, _ in done.values())
        metrics = dict(epochs.last.metrics) if epochs.last else {}
        metrics.update(weighted([*epochs.rounds, *done.values(), *((items, seen) for _, items, seen in mine if items)]))
        message = "writing the model" if epochs.all_trained else "validating" if self.epoch_full else "training"
        last = epochs.spec.initial_epoch + epochs.wanted
        progress = JobProgress(
            done=min(epochs.samples + training, epochs.total),
            total=epochs.total,
            epoch=min(epochs.number, last),
            epochs=last,
            round=state.open.number,
            metrics=metrics,
            items_per_second=state.measured.pace or sum(rates.values()),
            nodes=rates,
            message=message,
            quarantined=state.trust.quarantined,
            waiting=self._waiting(running),
            exchanged_bytes=state.exchange.bytes,
            strategy=self.why,
        )
        return self.rounds.told(progress, nodes, running=bool(running))

    def wants(self, attempt: Attempt) -> bool:
        """Whether the result would be of use: not if the round was closed without it."""
        return not of_rounds(attempt) or self.state.open.has(attempt)

    def kept(self) -> set[str]:
        return self.state.kept() | self.rounds.kept()

    def used_up(self) -> tuple[BlobRef, ...]:
        return self.state.exchange.used_up()

    def checkpoint(self) -> BlobRef | None:
        return self.state.exchange.weights

    def exported(self) -> ExportResult | None:
        return self.state.exported

    def best_epoch(self) -> int:
        return self.state.epochs.best.epoch if self.state.epochs.best is not None else 0

    def _waiting(self, running: Running) -> dict[str, str]:
        """Nodes that are in no round now, and why."""
        found = dict(self.state.sharing.slow)
        for attempt, _, _ in running.values():
            if attempt.shard_id == WARM_UP:
                if self.state.readiness.ready:  # else nobody takes part yet
                    found.setdefault(attempt.node_id, "it gets ready")
            elif of_rounds(attempt) and not self.state.open.has(attempt):
                found[attempt.node_id] = "its part takes longer than it should, and the others go on without it"
        return found

    def _plan_validation(self, view: ClusterView, attempts: dict[str, Attempt]) -> list[Decision]:
        state, exchange = self.state, self.state.exchange
        able = state.readiness.able(view, attempts)
        decisions, validated = state.validation.plan(
            view, able, attempts, exchange.weights, exchange.step, state.epochs.ended + 1
        )
        if validated is None:
            return decisions
        epoch = state.epochs.summary(view.now, self.rounds.metrics() | validated, exchange.bytes_in_epoch)
        return [*decisions, CloseEpoch(epoch)]

    def _plan_export(self, view: ClusterView, attempts: dict[str, Attempt]) -> list[Decision]:
        state, weights = self.state, self.state.exchange.weights
        if state.exported is not None:
            return [Complete()]
        if any(attempt.shard_id == EXPORT for attempt in attempts.values()) or weights is None:
            return []
        rates = speeds(view.nodes, state.measured.rates)
        able = state.readiness.able(view, attempts)
        free = [node.node_id for node in able.nodes or view.nodes if node.free_slots]
        if not free:
            return []
        best = state.epochs.best.weights if state.epochs.best is not None else weights
        step = state.exchange.step if best == weights else None
        task = ExportTask(model=state.given.model, weights=best, step=step)
        return [Lease(EXPORT, max(free, key=lambda node_id: (rates[node_id], node_id)), task)]
