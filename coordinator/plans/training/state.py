"""The state of a training job between events, made of parts that each hold one idea: pure.

All kinds of training have it, and `auto` passes it on from one kind to the other.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from coordinator.plans.events import EpochEnded, RoundClosed
from coordinator.plans.job import Attempt
from coordinator.plans.training.epochs import Epochs
from coordinator.plans.training.exchange import Exchange
from coordinator.plans.training.given import Given
from coordinator.plans.training.measurements import Measurements
from coordinator.plans.training.open_round import OpenRound
from coordinator.plans.training.readiness import Readiness, beside
from coordinator.plans.training.sharing import Sharing
from coordinator.plans.training.trust import Trust
from coordinator.plans.training.validation import Evaluate, Evaluation, Validation
from potluck.wire.tasks import ExportResult, TrainResult, TrainTask, WarmUpResult


@dataclass
class TrainingState:
    """The parts do not know each other: changes to several of them happen here."""

    given: Given
    epochs: Epochs
    exchange: Exchange
    validation: Validation
    open: OpenRound = field(default_factory=OpenRound)
    measured: Measurements = field(default_factory=Measurements)
    readiness: Readiness = field(default_factory=Readiness)
    sharing: Sharing = field(default_factory=Sharing)
    trust: Trust = field(default_factory=Trust)
    exported: ExportResult | None = None

    @classmethod
    def of(cls, given: Given, evaluate: Evaluate | None) -> TrainingState:
        """Before the first round. `evaluate`: makes the evaluations of the data that are held out."""
        epochs = Epochs(given.spec, given.dataset.count)
        return cls(given, epochs, Exchange(given.spec.weights), Validation(evaluate))

    def kept(self) -> set[str]:
        """Blobs that must stay when a round is thrown away."""
        best = self.epochs.best
        return self.exchange.kept() | ({best.weights.sha256} if best is not None else set())

    def task(self, samples: int, seconds: float) -> TrainTask:
        """A part of the open round, without its data."""
        given, spec = self.given, self.given.spec
        return TrainTask(
            model=given.model,
            weights=self.exchange.weights,
            data=(),
            format=given.dataset.format,
            image=given.image,
            round=self.open.number,
            samples=samples,
            seconds=seconds,
            batch_size=spec.batch_size,
            seed=spec.seed,
            compression=spec.compression,
            seen=self.epochs.seen,
            class_weight=spec.class_weight,
            overlap=spec.overlap,
            step=self.exchange.step,
        )

    def evaluation(self, attempt: Attempt) -> Evaluation | None:
        """The validation that an attempt is a part of."""
        return self.validation.of(attempt, self.exchange.weights, self.exchange.step, self.epochs.ended + 1)

    def warmed_up(self, attempt: Attempt, result: WarmUpResult, at: float) -> None:
        self.readiness.warmed_up(attempt, at)
        self.measured.warmed_up(attempt.node_id, result.rate, beside(result, self.given.model))

    def trained(self, attempt: Attempt, result: TrainResult, at: float) -> None:
        self.measured.trained(attempt, result, at)
        if result.seconds + result.seconds_ahead > 0:
            self.readiness.measured(attempt.node_id, at)

    def round_closed(
        self,
        event: RoundClosed,
        crew: Collection[str],
        *,
        longest_seconds: float,
        computing_seconds: float,
        sent_bytes: int,
        formed: bool = False,
    ) -> None:
        """`crew`: who took part; of them one computed for `longest_seconds`, and all together for `computing_seconds`.

        `formed`: the round began with forming a group, which is no part of what a round costs.
        """
        overhead = max(0.0, event.at - self.open.opened_at - longest_seconds)
        seconds = self.open.seconds(event.at)
        self.measured.closed(event.samples, seconds, None if formed else overhead)
        self.epochs.round_closed(event, computing_seconds, len(crew) * seconds)
        self.exchange.closed(event, sent_bytes)
        self.open.closed(event.at, crew)

    def epoch_ended(self, event: EpochEnded) -> None:
        self.epochs.epoch_ended(event, self.exchange.weights)
        self.exchange.epoch_ended()
        self.validation.epoch_ended()
        self.open.epoch_ended()
