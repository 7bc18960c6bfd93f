"""What a plan asks the dispatcher to do: pure."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.plans.events import OfTraining
from potluck.wire.jobs import EpochMetrics
from potluck.wire.tasks import AnyTask, TrainResult
from potluck.wire.values import BlobRef


@dataclass(frozen=True)
class Lease:
    """Give this shard to this node."""

    shard_id: str
    node_id: str
    task: AnyTask


@dataclass(frozen=True)
class Withdraw:
    """Take an attempt back, because its result is no longer wanted."""

    attempt_id: str
    reason: str


@dataclass(frozen=True)
class CloseRound:
    """Take the outer step with these results; answered by `RoundClosed`.

    `done`: the share of the job that is done after it. `agreement`: of the rounds before. `rejected`: nodes left out, and why.
    `by_items`: each result counts by the data that live on its node, not by the samples that it has seen.
    """

    round: int
    results: tuple[TrainResult, ...]
    done: float
    agreement: float | None
    velocity: BlobRef | None
    rejected: dict[str, str]
    by_items: bool = False


@dataclass(frozen=True)
class CloseSync:
    """A stretch of synchronous training is done, and this is its checkpoint; answered by `RoundClosed`."""

    round: int
    weights: BlobRef
    optimizer: BlobRef
    samples: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class CloseEpoch:
    """Answered by `EpochEnded`."""

    epoch: EpochMetrics


@dataclass(frozen=True)
class Complete:
    """All the work is done: make the result, and end the job as succeeded."""


@dataclass(frozen=True)
class Choose:
    """A choice that later plans need: it is journaled, and then the plan is made again. A plan itself changes nothing."""

    event: OfTraining


Decision = Lease | Withdraw | CloseRound | CloseSync | CloseEpoch | Complete | Choose
