"""The epochs of a training job: how many samples were seen, with what metrics, and when there are enough. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from coordinator.plans.events import EpochEnded, RoundClosed
from coordinator.plans.training.scores import Best, is_better, weighted
from potluck.errors import InvalidRequest
from potluck.wire.jobs import EpochMetrics, Train
from potluck.wire.values import BlobRef

LEFT_SHARE = 0.05
"""The largest share of an epoch's samples that may be left to the next epoch."""


@dataclass
class Epochs:
    """`count`: the items of an epoch. All that is counted in an epoch begins anew with the next."""

    spec: Train = field(repr=False)
    count: int
    samples: int = 0
    """Samples seen by all nodes together, in all epochs."""
    ended: int = 0
    best: Best | None = None
    """The best epoch, if a metric is monitored."""
    stop_after: int | None = None
    """The number of epochs to train, if a user asked for an earlier end."""
    last: EpochMetrics | None = None
    rounds: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    """(Samples, metrics) of the rounds of this epoch."""
    started_at: float = 0.0
    computing_seconds: float = 0.0
    """What the nodes computed in this epoch, and the time that its rounds took them, summed over nodes."""
    round_seconds: float = 0.0

    @property
    def wanted(self) -> int:
        """How many epochs to train at most."""
        wanted = self.spec.epochs - self.spec.initial_epoch
        return wanted if self.stop_after is None else min(wanted, self.stop_after)

    @property
    def total(self) -> int:
        """Samples of the whole job."""
        return self.wanted * self.count

    @property
    def left(self) -> int:
        """Samples that the present epoch still lacks; not above 0 where rounds have brought more."""
        return (self.ended + 1) * self.count - self.samples

    @property
    def seen(self) -> int:
        """Samples that the weights have seen, with those of the job that this one goes on from."""
        return self.samples + self.spec.initial_epoch * self.count

    @property
    def number(self) -> int:
        """The number of the present epoch, counted from 1."""
        return self.spec.initial_epoch + self.ended + 1

    @property
    def all_trained(self) -> bool:
        """Whether the last epoch has ended, or nothing has got better for too long."""
        patience, best = self.spec.patience, self.best
        late = patience is not None and best is not None and self.ended - best.epochs_ended >= patience
        return self.ended >= self.wanted or late

    def full(self, crew: int, *, may_leave: bool) -> bool:
        """Whether the samples of the present epoch are seen, up to less than one batch.

        `may_leave`: less than a batch for each of the crew may be left to the next epoch, if it is little. A round for it would
        cost more than it brings.
        """
        if self.left < min(self.spec.batch_size, self.count):
            return True
        little = min(crew * self.spec.batch_size, LEFT_SHARE * self.count)
        return may_leave and self.left < little and self.ended + 1 < self.wanted

    def done_with(self, samples: int) -> float:
        """The share of the job that is done once these samples are seen, too."""
        return min(1.0, (self.samples + samples) / self.total)

    def metrics(self) -> dict[str, float]:
        """The metrics of training in the present epoch."""
        return weighted(self.rounds)

    def began(self, at: float) -> None:
        self.started_at = self.started_at or at

    def stop(self) -> None:
        """Let the epoch that is under way be the last."""
        if self.stop_after is None:
            self.stop_after = self.ended + 1

    def round_closed(self, event: RoundClosed, computing_seconds: float, round_seconds: float) -> None:
        self.samples += event.samples
        self.rounds.append((event.samples, event.metrics))
        self.computing_seconds += computing_seconds
        self.round_seconds += round_seconds

    def epoch_ended(self, event: EpochEnded, weights: BlobRef | None) -> None:
        """`weights`: the weights after the epoch."""
        self.ended += 1
        self.last = event.epoch
        value = event.epoch.metrics.get(self.spec.monitor, math.nan)
        if weights is not None and is_better(self.spec, value, self.best):
            self.best = Best(value, self.ended, event.epoch.epoch, weights)
        self.started_at = event.at
        self.rounds = []
        self.computing_seconds = self.round_seconds = 0.0

    def summary(self, now: float, metrics: dict[str, float], exchanged_bytes: int) -> EpochMetrics:
        """Of the present epoch, which ends. Raises InvalidRequest where the metric that is monitored is not among its metrics."""
        monitor = self.spec.monitor
        if monitor and monitor not in metrics:
            raise InvalidRequest(
                f"there is no metric {monitor!r} to monitor: this job has {', '.join(sorted(metrics))}"
            )
        return EpochMetrics(
            epoch=self.number,
            metrics=metrics,
            samples=self.samples,
            seconds=max(0.0, now - self.started_at) if self.started_at else 0.0,
            rounds=len(self.rounds),
            computing=min(1.0, self.computing_seconds / self.round_seconds) if self.round_seconds else 0.0,
            exchanged_bytes=exchanged_bytes,
        )

    def check_monitor(self) -> None:
        """Raises InvalidRequest after the first round already where no epoch will have the metric that is monitored."""
        names = {name for _, metrics in self.rounds for name in metrics}
        wanted = self.spec.monitor.removeprefix("val_")
        if wanted and "loss" in names and wanted not in {"accuracy", *names}:  # accuracy is made from counts, too
            raise InvalidRequest(
                f"there is no metric {self.spec.monitor!r} to monitor: this job has {', '.join(sorted(names))}, "
                "and with validation data val_ ones"
            )
