"""Training by rounds, the `local` strategy: pure.

In a round each node trains on its own data shards, from the same weights, for a time budget; the outer step (`outer`) makes
the next round's weights of their updates. Epochs count samples over the whole cluster. A node that is lost costs its own
round; nodes that join take part from the next round on. A node whose updates are no use three times in a row is left out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from msgspec.structs import replace

from coordinator.batch import BatchStrategy, merge
from coordinator.federated import NodesEvaluation
from coordinator.jobs import (
    CHECK,
    VALIDATION,
    Attempt,
    CloseEpoch,
    CloseRound,
    Complete,
    Decision,
    EpochEnded,
    Lease,
    RoundClosed,
    Withdraw,
)
from coordinator.placement import ClusterView, assign, speeds, split, split_in_time
from coordinator.training.costs import computing_seconds
from coordinator.training.scores import Best, evaluation_metrics, is_better, weighted
from potluck.errors import Diverged, InvalidRequest
from potluck.messages import (
    AnyTask,
    AnyTaskResult,
    BlobRef,
    Dataset,
    EpochMetrics,
    ErrorInfo,
    EvaluateResult,
    ExportResult,
    ExportTask,
    ImageOptions,
    JobProgress,
    Step,
    Train,
    TrainResult,
    TrainTask,
)

ROUNDS_PER_EPOCH = 2
"""At least so many rounds an epoch, where a round computes for longer than it exchanges weights: on a small data set
many short rounds reach an accuracy in fewer samples."""
PROBE_SECONDS = 5.0
"""The first round's budget, before anything is measured."""
OVERHEADS_KEPT = 5
BUDGET_FACTOR = 1.25
BUDGET_SECONDS = 0.5
"""A node that got slower stops so much after the others: this factor of the planned time, and so many seconds."""
EXPLODED = 10.0
"""An update is left out when it is so many times as large as is usual among the others, for its samples."""
REJECTIONS_LIMIT = 3
STRAGGLER_FACTOR = 4.0
STRAGGLER_SECONDS = 60.0
"""A round waits for its last node at most this long: the larger of so many seconds and so many round times."""


Evaluation = BatchStrategy | NodesEvaluation


@dataclass
class RoundsStrategy:
    """State of one training job between events.

    Phases: train rounds until the epoch's samples are seen, validate (when asked), next epoch; after the last, export.
    """

    spec: Train
    model: BlobRef
    image: ImageOptions | None
    dataset: Dataset
    validation: Callable[[BlobRef | None, Step | None, int], Evaluation] | None
    """Makes the evaluation of (weights, another way to them, epoch)."""
    round: int = 0
    samples: int = 0
    epochs_ended: int = 0
    weights: BlobRef | None = None
    step: Step | None = None
    """What led to `weights`, for the nodes that have those before."""
    velocity: BlobRef | None = None
    agreement: float | None = None
    """How alike the nodes' updates have been until now."""
    best: Best | None = None
    """Where a metric is monitored."""
    rejections: dict[str, int] = field(default_factory=dict)
    """Updates in a row that were of no use, by node."""
    quarantined: dict[str, str] = field(default_factory=dict)
    """Nodes that are left out, and why."""
    contributions: dict[str, TrainResult] = field(default_factory=dict)
    checked: bool = False
    """Whether some node has or had a first batch of the validation data."""
    crew: frozenset[str] = frozenset()
    """Who took part in the last round that was closed."""
    """Results of the open round by node."""
    opened_at: float = 0.0
    overheads: list[float] = field(default_factory=list)
    """Seconds that the last rounds have cost beside computing: transfers, the outer step, setting weights."""
    assigned: dict[str, tuple[int, ...]] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    trained_bytes: int = 0
    """Of the weights that are trained; 0 while nobody has said."""
    delays: dict[str, list[float]] = field(default_factory=dict)
    """Seconds that each node's last parts have taken beside computing: setting weights, quantising, sending."""
    round_metrics: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    computing_seconds: float = 0.0
    """What the nodes computed in this epoch, and the time that its rounds took them, summed over nodes."""
    round_seconds: float = 0.0
    closed_at: float = 0.0
    """When the round before was closed, in this epoch."""
    exchanged_bytes: int = 0
    exchanged_before: int = 0
    """Until the beginning of this epoch."""
    validating: Evaluation | None = None
    exported: ExportResult | None = None
    stop_after: int | None = None
    """Of the epochs that are to be trained, where somebody asked for an earlier end."""
    last_epoch: EpochMetrics | None = None
    epoch_started_at: float = 0.0

    def __post_init__(self) -> None:
        self.weights = self.spec.weights

    @property
    def epochs(self) -> int:
        """How many are to be trained at most."""
        wanted = self.spec.epochs - self.spec.initial_epoch
        return wanted if self.stop_after is None else min(wanted, self.stop_after)

    @property
    def total(self) -> int:
        return self.epochs * self.dataset.count

    @property
    def all_trained(self) -> bool:
        """Whether the last epoch has ended, or nothing has got better for too long."""
        patience, best = self.spec.patience, self.best
        late = patience is not None and best is not None and self.epochs_ended - best.epochs_ended >= patience
        return self.epochs_ended >= self.epochs or late

    @property
    def kept(self) -> set[str]:
        """Blobs that must stay when a round is thrown away, of this job or of one that holds the same."""
        found = [self.weights, self.velocity, self.spec.weights, self.best.weights if self.best else None]
        found += [self.step.update] if self.step is not None else []
        found += [ref for part in self.contributions.values() for ref in (part.base, part.update)]
        return {ref.sha256 for ref in found if ref is not None}

    @property
    def epoch_full(self) -> bool:
        """Whether the samples of the present epoch are seen, up to less than one batch."""
        goal = (self.epochs_ended + 1) * self.dataset.count
        return goal - self.samples < min(self.spec.batch_size, self.dataset.count)

    def plan(self, view: ClusterView, attempts: dict[str, Attempt]) -> list[Decision]:
        if self.all_trained:
            return self._plan_export(view, attempts)
        if self.epoch_full and self.round_metrics:
            return self._plan_validation(view, attempts)
        open_attempts = [attempt for attempt in attempts.values() if self._of_round(attempt)]
        if open_attempts:
            return self._plan_stragglers(view, open_attempts)
        if self.contributions:
            return [self._close_round()]
        self._check_monitor()
        return self._open_round(view)

    def leased(self, attempt: Attempt, task: AnyTask) -> None:
        if isinstance(task, TrainTask):
            if not self.contributions and self._of_round(attempt):
                self.opened_at = attempt.leased_at
            indexes = {shard.blob.sha256: index for index, shard in enumerate(self.dataset.shards)}
            self.assigned[attempt.node_id] = tuple(indexes[shard.blob.sha256] for shard in task.data)
            self.epoch_started_at = self.epoch_started_at or attempt.leased_at
        elif attempt.shard_id == CHECK:
            self.checked = True
        elif self._of_validation(attempt):
            self._validation.leased(attempt, task)

    def finished(self, attempt: Attempt, result: AnyTaskResult, at: float) -> None:
        if isinstance(result, TrainResult):
            seconds = result.seconds + result.seconds_ahead
            self.trained_bytes = result.trained_bytes or self.trained_bytes
            if attempt.node_id in self.measured:  # its first part also starts an engine
                kept = [*self.delays.get(attempt.node_id, ()), at - attempt.leased_at - seconds]
                self.delays[attempt.node_id] = kept[-OVERHEADS_KEPT:]
            if seconds > 0:
                self.measured[attempt.node_id] = result.samples / seconds
            if self._of_round(attempt) and result.samples:
                self.contributions[self._contributor(attempt)] = result
        elif isinstance(result, ExportResult):
            self.exported = result
        elif self._of_validation(attempt):
            self._validation.finished(attempt, result, at)

    def ended(self, attempt: Attempt, error: ErrorInfo | None) -> None:
        if self._of_validation(attempt):
            self._validation.ended(attempt, error)
        elif error is not None and error.code == Diverged.code:
            self._reject(attempt.node_id, error.message)

    def closed_round(self, event: RoundClosed) -> None:
        if event.round != self.round:
            return
        computing = max((result.seconds for result in self.contributions.values()), default=0.0)
        overhead = max(0.0, event.at - self.opened_at - computing)
        if self.round:  # the first one also starts engines
            self.overheads = [*self.overheads, overhead][-OVERHEADS_KEPT:]
        self.computing_seconds += sum(result.seconds + result.seconds_ahead for result in self.contributions.values())
        self.round_seconds += len(self.contributions) * max(0.0, event.at - (self.closed_at or self.opened_at))
        self.closed_at = event.at
        sent = sum(result.update.size for result in self.contributions.values())
        assert event.base is not None
        assert event.step is not None
        self.exchanged_bytes += sent + len(self.contributions) * event.step.size
        for node_id in self.contributions.keys() - event.rejected.keys():
            self.rejections.pop(node_id, None)
        for node_id, reason in event.rejected.items():
            self._reject(node_id, reason)
        self.weights, self.velocity, self.agreement = event.weights, event.velocity, event.agreement
        self.step = Step(base=event.base, update=event.step)
        self.samples += event.samples
        self.round += 1
        self.round_metrics.append((event.samples, event.metrics))
        self.crew, self.contributions = frozenset(self.contributions), {}

    def ended_epoch(self, event: EpochEnded) -> None:
        self.epochs_ended += 1
        self.last_epoch = event.epoch
        value = event.epoch.metrics.get(self.spec.monitor, math.nan)
        if self.weights is not None and is_better(self.spec, value, self.best):
            self.best = Best(value, self.epochs_ended, event.epoch.epoch, self.weights)
        self.epoch_started_at = event.at
        self.round_metrics = []
        self.computing_seconds = self.round_seconds = self.closed_at = 0.0
        self.exchanged_before = self.exchanged_bytes
        self.validating = None

    def stop(self) -> None:
        """The epoch that is under way is the last."""
        if self.stop_after is None:
            self.stop_after = self.epochs_ended + 1

    def progress(self, running: dict[str, tuple[Attempt, int, dict[str, float]]]) -> JobProgress:
        # With those that are done before the others; between rounds, in validation and at the end, those of the last round.
        training_now = {attempt.node_id for attempt, _, _ in running.values() if self._of_round(attempt)}
        at_work = training_now | self.contributions.keys() or self.crew
        nodes = {name: rate for name, rate in self.measured.items() if name in at_work}
        if not self.round and len(nodes) < len(at_work):
            nodes = {}  # the first that is done says nothing of the others
        training = sum(done for attempt, done, _ in running.values() if self._of_round(attempt))
        waiting = self._waiting()
        training += sum(samples for samples, _ in waiting)
        metrics = dict(self.last_epoch.metrics) if self.last_epoch else {}
        live = [(done, seen) for attempt, done, seen in running.values() if self._of_round(attempt) and done]
        metrics.update(weighted([*self.round_metrics, *waiting, *live]))
        message = "writing the model" if self.all_trained else "validating" if self.epoch_full else "training"
        return JobProgress(
            done=min(self.samples + training, self.total),
            total=self.total,
            epoch=min(self.spec.initial_epoch + self.epochs_ended + 1, self.spec.initial_epoch + self.epochs),
            epochs=self.spec.initial_epoch + self.epochs,
            round=self.round,
            metrics=metrics,
            items_per_second=sum(nodes.values()),
            nodes=nodes,
            message=message,
            quarantined=self.quarantined,
            exchanged_bytes=self.exchanged_bytes,
        )

    def _waiting(self) -> list[tuple[int, dict[str, float]]]:
        """(Samples, metrics) of the parts of the open round that are done before the others."""
        return [(result.samples, result.metrics) for result in self.contributions.values()]

    def _open_round(self, view: ClusterView) -> list[Decision]:
        free = [node for node in view.nodes if node.free_slots]
        # Better a round with a node that went wrong before than none at all.
        free = [node for node in free if node.node_id not in self.quarantined] or free
        if not free:
            return []
        rates = speeds(free, self.measured)
        # As many as can have a whole batch each: on fewer items than that, more nodes would repeat some and blur the step.
        room = max(1, self.dataset.count // self.spec.batch_size)
        # Those of the round before first: they have the data, and their optimizers know the way.
        chosen = sorted(rates, key=lambda node_id: (node_id not in self.shares, -rates[node_id], node_id))[:room]
        rates = {node_id: rates[node_id] for node_id in sorted(chosen)}
        parts = self._parts(rates)
        data = self._assignment(rates)
        decisions = self._check_validation(max(rates, key=lambda node_id: (rates[node_id], node_id)))
        for node_id, samples in parts.items():
            # Whole batches, so that no step trains on a few items only, and every node takes part.
            batches = max(1, round(samples / self.spec.batch_size))
            samples = samples if samples < self.spec.batch_size else batches * self.spec.batch_size
            task = replace(
                self._task(samples, self._budget(samples, rates[node_id])),
                data=tuple(self.dataset.shards[index] for index in data[node_id]),
            )
            decisions.append(Lease(self._shard_id, node_id, task))
        return decisions

    def _check_validation(self, node_id: str) -> list[Decision]:
        """A first batch of the validation data, before all else: what is wrong with them need not show after an epoch."""
        validation = self.validation(None, None, 0) if self.validation is not None and not self.checked else None
        return [Lease(CHECK, node_id, validation.first())] if isinstance(validation, BatchStrategy) else []

    def _task(self, samples: int, seconds: float) -> TrainTask:
        """A part of the round that opens, without its data."""
        return TrainTask(
            model=self.model,
            weights=self.weights,
            data=(),
            format=self.dataset.format,
            image=self.image,
            round=self.round,
            samples=samples,
            seconds=seconds,
            batch_size=self.spec.batch_size,
            seed=self.spec.seed,
            compression=self.spec.compression,
            seen=self.samples + self.spec.initial_epoch * self.dataset.count,
            class_weight=self.spec.class_weight,
            overlap=self.spec.overlap,
            step=self.step,
        )

    def _parts(self, rates: dict[str, float]) -> dict[str, int]:
        """The samples of each node in the round that opens: such that all end together, and each has some."""
        wanted = self._round_size(rates)
        if not self.measured:
            return split(wanted, rates)
        # The lower median: what is done once, as reading data that are new to a node, is no reason to give it less.
        delays = {node_id: max(0.0, statistics.median_low(kept)) for node_id, kept in self.delays.items()}
        found = split_in_time(wanted, rates, delays)
        few = min(self.spec.batch_size, max(1, wanted // len(rates)))
        return {node_id: max(found.get(node_id, 0), few) for node_id in rates}

    def _budget(self, samples: int, rate: float) -> float:
        """Seconds that a node may compute for its part."""
        if self.spec.round_seconds or not self.measured:
            return self.spec.round_seconds or PROBE_SECONDS
        return samples / rate * BUDGET_FACTOR + BUDGET_SECONDS

    def _round_size(self, rates: dict[str, float]) -> int:
        """Samples of a round."""
        wanted = max(-(-self.dataset.count // ROUNDS_PER_EPOCH), len(rates) * self.spec.batch_size)
        left = max(1, (self.epochs_ended + 1) * self.dataset.count - self.samples)
        if not self.measured:
            return min(wanted, left)
        together = sum(rates.values())
        overhead = statistics.median(self.overheads) if self.overheads else 0.0
        budget = self.spec.round_seconds or computing_seconds(overhead) or PROBE_SECONDS
        wanted = min(max(wanted, round(together * overhead)), max(1, round(together * budget)))
        rounds = max(1, round(left / wanted))  # of one length: no short one at the end of an epoch
        return math.ceil(left / rounds)

    def _close_round(self) -> CloseRound:
        """With all that can be used of what the nodes have sent."""
        found = self.contributions
        base = self.weights or max(found.values(), key=lambda result: result.samples).base
        wrong = {
            node_id: f"it began from other weights ({result.base.sha256[:12]}) than the round ({base.sha256[:12]})"
            for node_id, result in found.items()
            if result.base.sha256 != base.sha256
        }
        wrong |= self._exploded({key: one for key, one in found.items() if key not in wrong})
        results = tuple(found[node_id] for node_id in sorted(found.keys() - wrong.keys()))
        done = min(1.0, (self.samples + sum(result.samples for result in results)) / self.total)
        return CloseRound(self.round, results, done, self.agreement, self.velocity, wrong)

    def _exploded(self, results: dict[str, TrainResult]) -> dict[str, str]:
        """Of a round's results those that went too far, and why."""
        return exploded({key: (result.norm, result.samples) for key, result in results.items()})

    def _reject(self, node_id: str, reason: str) -> None:
        self.rejections[node_id] = self.rejections.get(node_id, 0) + 1
        if self.rejections[node_id] >= REJECTIONS_LIMIT:
            self.quarantined[node_id] = reason

    def _assignment(self, rates: dict[str, float]) -> dict[str, tuple[int, ...]]:
        """Data shards by speed; kept as they are while the same nodes hold them and no share has moved by a third."""
        total = sum(rates.values())
        shares = {node_id: rate / total for node_id, rate in rates.items()}
        same_nodes = self.shares.keys() == shares.keys()
        if not same_nodes or any(abs(shares[name] - self.shares[name]) > self.shares[name] / 3 for name in shares):
            counts = [shard.count for shard in self.dataset.shards]
            self.assigned = assign(counts, rates, self.assigned)
            self.shares = shares
        return self.assigned

    def _plan_stragglers(self, view: ClusterView, open_attempts: list[Attempt]) -> list[Decision]:
        if not self.contributions:
            return []
        patience = max(STRAGGLER_SECONDS, STRAGGLER_FACTOR * self.spec.round_seconds)
        late = view.now - self.opened_at > patience
        return [Withdraw(attempt.attempt_id, "the round went on without it") for attempt in open_attempts if late]

    def _plan_validation(self, view: ClusterView, attempts: dict[str, Attempt]) -> list[Decision]:
        decisions: list[Decision] = []
        validated: dict[str, float] = {}
        if self.validation is not None:
            if self.validating is None:
                self.validating = self.validation(self.weights, self.step, self.epochs_ended + 1)
            decisions = self.validating.plan(view, attempts)
            if Complete() not in decisions:
                return decisions
            decisions.remove(Complete())
            parts = [part for part in self.validating.in_order() if isinstance(part, EvaluateResult)]
            validated = {f"val_{name}": value for name, value in evaluation_metrics(merge(parts)).items()}
        metrics = self._epoch_metrics() | validated
        seconds = max(0.0, view.now - self.epoch_started_at) if self.epoch_started_at else 0.0
        monitor = self.spec.monitor
        if monitor and monitor not in metrics:
            raise InvalidRequest(
                f"there is no metric {monitor!r} to monitor: this job has {', '.join(sorted(metrics))}"
            )
        epoch = EpochMetrics(
            epoch=self.spec.initial_epoch + self.epochs_ended + 1,
            metrics=metrics,
            samples=self.samples,
            seconds=seconds,
            rounds=len(self.round_metrics),
            computing=min(1.0, self.computing_seconds / self.round_seconds) if self.round_seconds else 0.0,
            exchanged_bytes=self.exchanged_bytes - self.exchanged_before,
        )
        return [*decisions, CloseEpoch(epoch)]

    def _check_monitor(self) -> None:
        """Raises InvalidRequest after the first round already where no epoch will have the metric that is monitored."""
        names = {name for _, metrics in self.round_metrics for name in metrics}
        wanted = self.spec.monitor.removeprefix("val_")
        if wanted and "loss" in names and wanted not in {"accuracy", *names}:  # accuracy is made from counts, too
            raise InvalidRequest(
                f"there is no metric {self.spec.monitor!r} to monitor: this job has {', '.join(sorted(names))}, "
                "and with validation data val_ ones"
            )

    def _epoch_metrics(self) -> dict[str, float]:
        """Of training, in the epoch that ends."""
        return weighted(self.round_metrics)

    def _plan_export(self, view: ClusterView, attempts: dict[str, Attempt]) -> list[Decision]:
        if self.exported is not None:
            return [Complete()]
        if any(attempt.shard_id == "export" for attempt in attempts.values()) or self.weights is None:
            return []
        rates = speeds(view.nodes, self.measured)
        free = [node.node_id for node in view.nodes if node.free_slots]
        if not free:
            return []
        best = self.best.weights if self.best is not None else self.weights
        task = ExportTask(model=self.model, weights=best, step=self.step if best == self.weights else None)
        fastest = max(free, key=lambda node_id: (rates[node_id], node_id))
        return [Lease("export", fastest, task)]

    def _of_round(self, attempt: Attempt) -> bool:
        """Whether an attempt is a part of the open round."""
        return attempt.shard_id == self._shard_id

    def _contributor(self, attempt: Attempt) -> str:
        """By what a round's results are told apart."""
        return attempt.node_id

    def _of_validation(self, attempt: Attempt) -> bool:
        if self.validating is None and self.validation is not None and attempt.shard_id.startswith(VALIDATION):
            # Replaying: the plan that made it is not in the journal, but it follows from the state.
            self.validating = self.validation(self.weights, self.step, self.epochs_ended + 1)
        return self.validating is not None and attempt.shard_id.startswith(self.validating.prefix + "-")

    @property
    def _validation(self) -> Evaluation:
        if self.validating is None:
            raise ValueError("no validation is under way")
        return self.validating

    @property
    def _shard_id(self) -> str:
        return f"round-{self.round}"


def exploded(norms: dict[str, tuple[float, int]]) -> dict[str, str]:
    """Of updates by node, as (norm, samples): those that went too far, and why. Never all of them.

    An update grows with its samples, at most in proportion; so each is compared with what the median of the others would be
    for as many samples.
    """
    found: dict[str, str] = {}
    for node_id, (norm, samples) in norms.items():
        others = sorted(
            other * max(1.0, samples / count)
            for key, (other, count) in norms.items()
            if key != node_id and other > 0 and count > 0
        )
        if others and norm > EXPLODED * others[len(others) // 2]:
            times = norm / others[len(others) // 2]
            found[node_id] = f"its update was {times:.0f} times as large as those of the other nodes"
    return found if len(found) < len(norms) else {}
