"""Training by rounds: pure.

In a round each node trains on its own, from the same weights, for a time budget; the outer step (`dispatch/outer`) makes the next
round's weights of their updates. Epochs count samples over the whole cluster. A node that is lost costs its own round; nodes that
join take part once they are ready (`readiness`), from the next round on. What differs between the kinds of such training is its
manner (`manner`): that of `local`, `federated` or `fixed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from coordinator.plans.decisions import CloseRound, Decision
from coordinator.plans.events import RoundBroken, RoundClosed, StoodStill
from coordinator.plans.job import Attempt
from coordinator.plans.placement import ClusterView, NodeView
from coordinator.plans.training import warming
from coordinator.plans.training.contributions import Contributions
from coordinator.plans.training.manner import Manner
from coordinator.plans.training.state import TrainingState
from potluck.wire.jobs import JobProgress
from potluck.wire.tasks import AnyTask, AnyTaskResult, TrainResult, TrainTask
from potluck.wire.values import ErrorInfo


@dataclass
class UpdateRounds:
    """The rounds of `state`, in which nodes send updates, in one manner or another."""

    state: TrainingState = field(repr=False)
    manner: Manner
    contributions: Contributions = field(default_factory=Contributions)
    may_leave: ClassVar[bool] = True

    def plan(self, view: ClusterView, attempts: dict[str, Attempt]) -> list[Decision]:
        if choice := warming.measured_anew(self.state, view):
            return choice
        return [*warming.warm_ups(self.state, self.manner, view, attempts), *self._round(view, attempts)]

    def leased(self, attempt: Attempt, task: AnyTask) -> None:
        if not isinstance(task, TrainTask):
            return
        state, found = self.state, self.contributions
        if state.open.has(attempt):
            if not found.results:
                state.open.opened_at = attempt.leased_at
            expected = state.measured.expected(attempt.node_id, task, self.manner.late_seconds)
            found.promise(attempt.node_id, attempt.leased_at, expected, task.parts)
        state.sharing.has(attempt.node_id, state.given.indexes(task))

    def finished(self, attempt: Attempt, result: AnyTaskResult) -> None:
        if not isinstance(result, TrainResult):
            return
        if self.state.open.has(attempt) and result.samples:
            self.contributions.results[self.state.open.contributor(attempt)] = result
        self.manner.finished(attempt, result)

    def breaks_off(self, attempt: Attempt, error: ErrorInfo | None) -> bool:
        return False

    def happened(self, event: RoundClosed | RoundBroken | StoodStill) -> None:
        if not isinstance(event, RoundClosed):
            return
        results = self.contributions.results
        step_bytes = event.step.size if event.step is not None else 0
        self.manner.closed(results, event.rejected)
        self.state.trust.closed(results, event.rejected)
        self.state.round_closed(
            event,
            results.keys(),
            longest_seconds=max((result.seconds for result in results.values()), default=0.0),
            computing_seconds=sum(result.seconds + result.seconds_ahead for result in results.values()),
            sent_bytes=sum(result.update.size + step_bytes for result in results.values()),
        )
        self.contributions.closed()

    def done(self) -> dict[str, tuple[int, dict[str, float]]]:
        return {name: (result.samples, result.metrics) for name, result in self.contributions.results.items()}

    def kept(self) -> set[str]:
        return self.contributions.kept()

    def metrics(self) -> dict[str, float]:
        return self.manner.metrics()

    def told(self, progress: JobProgress, nodes: Sequence[NodeView], *, running: bool) -> JobProgress:
        return self.manner.told(progress, idle=not running and not self.contributions.results)

    def _round(self, view: ClusterView, attempts: dict[str, Attempt]) -> list[Decision]:
        mine = [attempt for attempt in attempts.values() if self.state.open.has(attempt)]
        in_time = mine if view.now < self.contributions.due else []
        if self.contributions.over(in_time=bool(in_time)):
            return [self._close()]
        return self.manner.parts(view, attempts, in_time)

    def _close(self) -> CloseRound:
        """Close the round with all usable results of the nodes."""
        state, found = self.state, self.contributions.results
        base = state.exchange.weights or self.contributions.first_base(state.measured.rates)
        wrong = self.contributions.began_elsewhere(base)
        wrong |= self.manner.too_far({name: one for name, one in found.items() if name not in wrong})
        results = tuple(found[name] for name in sorted(found.keys() - wrong.keys()))
        return CloseRound(
            round=state.open.number,
            results=results,
            done=state.epochs.done_with(sum(result.samples for result in results)),
            agreement=state.exchange.agreement,
            velocity=state.exchange.velocity,
            rejected=wrong,
            by_items=self.manner.by_items,
        )
