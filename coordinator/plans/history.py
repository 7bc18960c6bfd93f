"""The rounds and epochs of a training job, as its result tells them: pure. All of it must fit into one message."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from msgspec import json

from coordinator.plans.events import RoundClosed
from potluck.wire.jobs import EpochMetrics, RoundMetrics

ROUNDS_LIMIT_BYTES = 64 * 1024
"""What a job's rounds take, at most."""
HISTORY_LIMIT_BYTES = 160 * 1024
"""The limit for rounds and epochs together: with very many epochs, fewer rounds are kept."""


@dataclass
class History:
    """Every epoch, and as many rounds as there is room for."""

    epochs: list[EpochMetrics] = field(default_factory=list)
    rounds: list[RoundMetrics] = field(default_factory=list)
    stride: int = 1
    """One round of this many is kept: a power of two."""
    epochs_bytes: int = 0
    rounds_bytes: int = 0

    def epoch_ended(self, epoch: EpochMetrics) -> None:
        self.epochs.append(epoch)
        self.epochs_bytes += _size(epoch)

    def round_closed(self, closed: RoundClosed) -> None:
        """Add a round. When they grow too many, every second goes."""
        if closed.round % self.stride == 0:
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
        room = min(ROUNDS_LIMIT_BYTES, HISTORY_LIMIT_BYTES - self.epochs_bytes)
        while self.rounds_bytes > room and len(self.rounds) > 1:
            self.stride *= 2
            self.rounds = [kept for kept in self.rounds if kept.round % self.stride == 0]
            self.rounds_bytes = sum(map(_size, self.rounds))

    def told(self) -> tuple[EpochMetrics, ...]:
        """The epochs for the result: of very many every second, fourth, ..., and always the last."""
        stride = 1
        while True:
            kept = self.epochs[::-1][::stride][::-1]
            if len(kept) < 2 or sum(map(_size, kept)) <= HISTORY_LIMIT_BYTES:
                return tuple(kept)
            stride *= 2


def epochs_that_fit(number: int, known: Iterable[EpochMetrics]) -> tuple[EpochMetrics, ...]:
    """Those above `number`, as many as fit into a message."""
    kept: list[EpochMetrics] = []
    size = 0
    for epoch in known:
        if epoch.epoch > number:
            size += _size(epoch)
            if kept and size > HISTORY_LIMIT_BYTES:
                break
            kept.append(epoch)
    return tuple(kept)


def _size(part: RoundMetrics | EpochMetrics) -> int:
    """The size in a JSON message, in bytes; less in msgpack."""
    return len(json.encode(part)) + 1
