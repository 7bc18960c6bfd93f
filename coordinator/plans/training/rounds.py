"""Training by rounds, the `local` strategy: pure.

In a round each node trains on its own data shards, from the same weights, for a time budget; the outer step (`outer`) makes
the next round's weights of their updates. Epochs count samples over the whole cluster. A node that is lost costs its own
round; nodes that join take part once they are ready (`readiness`), from the next round on. A round ends when all that was
promised is here, or should be: it goes on without a node that is late, which may go on as well, and is in no round until it is done.
A node that would bring less than it costs is left out for a while, one whose updates are no use three times in a row for good.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from coordinator.plans.batch import BatchStrategy, merge
from coordinator.plans.job import (
    CHECK,
    VALIDATION,
    Attempt,
    Choose,
    CloseEpoch,
    CloseRound,
    Complete,
    Decision,
    EpochEnded,
    Lease,
    MeasureAgain,
    OfTraining,
    RoundClosed,
    RoundPlanned,
    StopAsked,
    Training,
    Withdraw,
)
from coordinator.plans.node_data import NodesEvaluation
from coordinator.plans.placement import ClusterView, NodeView, assign, speeds, without_slow
from coordinator.plans.training.costs import computing_seconds
from coordinator.plans.training.readiness import WARM_UP, Readiness, beside, of_rounds
from coordinator.plans.training.scores import Best, evaluation_metrics, is_better, weighted
from potluck.errors import Diverged, InvalidRequest
from potluck.wire.messages import (
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
    WarmUpResult,
    WarmUpTask,
)

ROUNDS_PER_EPOCH = 2
"""At least so many rounds an epoch, where a round computes for longer than it exchanges weights: on a small data set
many short rounds reach an accuracy in fewer samples."""
LEFT_SHARE = 0.05
"""Of an epoch's samples, at most so many are left to the next one."""
PROBE_SECONDS = 5.0
"""The first round's budget, before it is known what rounds cost."""
OVERHEADS_KEPT = 5
PACES_KEPT = 5
BUDGET_FACTOR = 1.25
BUDGET_SECONDS = 0.5
"""A node that got slower stops so much after the others: this factor of the planned time, and so many seconds."""
GRACE = 0.1
GRACE_SECONDS = 2.0
"""The first node that is ready waits for others for this share of the time that it took, and for so many seconds at most:
nodes that are alike are ready at nearly the same time."""
LATE_FACTOR = 2.0
LATE_SECONDS = 5.0
"""A part is late when it takes so many times as long beside computing as it should, and so many seconds longer at least."""
LOST_SECONDS = 900.0
"""A part that is late for so long is taken back: its engine lives, but nobody can tell what it does."""
SLOWEST = 8.0
"""Of nodes that were not measured, those whose processors are so many times as slow are expected to be ready later than the others."""
EXPLODED = 10.0
"""An update is left out when it is so many times as large as is usual among the others, for its samples."""
REJECTIONS_LIMIT = 3


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
    usual: float = 0.0
    """The size of an update for each sample, the median of a round, as large as it ever was."""
    agreement: float | None = None
    """How alike the nodes' updates have been until now."""
    best: Best | None = None
    """Where a metric is monitored."""
    rejections: dict[str, int] = field(default_factory=dict)
    """Updates in a row that were of no use, by node."""
    quarantined: dict[str, str] = field(default_factory=dict)
    """Nodes that are left out, and why."""
    contributions: dict[str, TrainResult] = field(default_factory=dict)
    """Results of the open round by node."""
    checked: bool = False
    """Whether some node has or had a first batch of the validation data."""
    crew: frozenset[str] = frozenset()
    """Who took part in the last round that was closed."""
    opened_at: float = 0.0
    due: float = 0.0
    """When all parts of the open round should be here."""
    promised: frozenset[str] = frozenset()
    """The nodes for which the round was opened."""
    promised_until: float = 0.0
    """Whoever gets a part later does it in the place of others, which are all late by then."""
    readiness: Readiness = field(default_factory=Readiness)
    slow: dict[str, str] = field(default_factory=dict)
    """Nodes that the last round was opened without, since they bring less than they cost, and why."""
    slow_at: float = 0.0
    """When that was found."""
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
    paces: list[tuple[int, float]] = field(default_factory=list)
    """Samples of the last rounds, and the seconds that each has taken from the one before."""
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
        self.weights = self.weights or self.spec.weights

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
        """Whether the samples of the present epoch are seen, up to less than one batch; what is less than that for each node, and
        little, is left to the next epoch: a round would cost all of them more than it brings."""
        if self.validating is not None:  # whatever is asked meanwhile: its numbers are those of these weights
            return True
        left = (self.epochs_ended + 1) * self.dataset.count - self.samples
        if left < min(self.spec.batch_size, self.dataset.count):
            return True
        little = min(len(self.crew) * self.spec.batch_size, LEFT_SHARE * self.dataset.count)
        return self._may_leave and left < little and self.epochs_ended + 1 < self.epochs

    @property
    def _may_leave(self) -> bool:
        """Whether an epoch may end a few batches early, and the next begin with them."""
        return True

    def plan(self, view: ClusterView, attempts: dict[str, Attempt]) -> list[Decision]:
        if self.all_trained:
            return self._plan_export(view, attempts)
        if self.epoch_full and self.round_metrics:
            return self._plan_validation(view, attempts)
        if choice := self._measured_anew(view):
            return choice
        return [*self._plan_warm_ups(view, attempts), *self._plan_round(view, attempts)]

    def _plan_round(self, view: ClusterView, attempts: dict[str, Attempt]) -> list[Decision]:
        mine = [attempt for attempt in attempts.values() if self._of_round(attempt)]
        # Parts that were given away anew, as all were late, are not waited for once those are here after all.
        here = bool(self.promised) and self.promised <= self.contributions.keys()
        if mine and view.now < self.due and not here:
            return []
        if self.contributions:
            return [self._close_round()]
        self._check_monitor()
        if not self.round and self._hopes(view, attempts):
            return []
        # Where all parts are late, whoever else is ready does the round.
        return self._open_round(self.readiness.able(view, attempts))

    def _hopes(self, view: ClusterView, attempts: dict[str, Attempt]) -> bool:
        """Whether the first round should wait a moment longer, for nodes that will be ready about now."""
        return self.readiness.hopes(view.now, attempts, GRACE, GRACE_SECONDS, self._alike(view))

    def _alike(self, view: ClusterView) -> set[str]:
        """The nodes that get ready about as soon as those that are: far slower ones are waited for in vain."""
        best = max((node.gflops for node in view.nodes if node.node_id in self.readiness.ready), default=0.0)
        return {node.node_id for node in view.nodes if node.gflops * SLOWEST >= best or not node.gflops}

    def leased(self, attempt: Attempt, task: AnyTask) -> None:
        if isinstance(task, TrainTask):
            if not self.contributions and self._of_round(attempt):
                self.opened_at = attempt.leased_at
            if self._of_round(attempt):
                if not self.promised:
                    self.promised_until = attempt.leased_at + self._expected(attempt.node_id, task)
                if attempt.leased_at < self.promised_until:
                    self.promised |= {attempt.node_id}
                self.due = max(self.due, attempt.leased_at + self._expected(attempt.node_id, task))
            self.assigned[attempt.node_id] = self._indexes(task)
            self.epoch_started_at = self.epoch_started_at or attempt.leased_at
        elif isinstance(task, WarmUpTask):
            self.assigned.setdefault(attempt.node_id, self._indexes(task.task))
        elif attempt.shard_id == CHECK:
            self.checked = True
        elif self._of_validation(attempt):
            self._validation.leased(attempt, task)

    def finished(self, attempt: Attempt, result: AnyTaskResult, at: float) -> None:
        if isinstance(result, TrainResult):
            seconds = result.seconds + result.seconds_ahead
            self.trained_bytes = result.trained_bytes or self.trained_bytes
            kept = [*self.delays.get(attempt.node_id, ()), at - attempt.leased_at - seconds]
            self.delays[attempt.node_id] = kept[-OVERHEADS_KEPT:]
            if seconds > 0:
                self.measured[attempt.node_id] = result.samples / seconds
                self.readiness.measured(attempt.node_id, at)
            if self._of_round(attempt) and result.samples:
                self.contributions[self._contributor(attempt)] = result
        elif isinstance(result, WarmUpResult):
            self.readiness.warmed_up(attempt, at)
            self.delays[attempt.node_id] = [beside(result, self.model)]
            if result.rate > 0:
                self.measured[attempt.node_id] = result.rate
        elif isinstance(result, ExportResult):
            self.exported = result
        elif self._of_validation(attempt):
            self._validation.finished(attempt, result, at)

    def ended(self, attempt: Attempt, error: ErrorInfo | None) -> None:
        if self._of_validation(attempt):
            self._validation.ended(attempt, error)
        elif error is not None and error.code == Diverged.code:
            self._reject(attempt.node_id, error.message)
        elif attempt.shard_id == CHECK and error is not None and not error.retryable:
            self.checked = False  # another node is to look, where there is one
        elif error is None or error.retryable:
            self.readiness.lost(attempt.node_id)

    def happened(self, event: OfTraining) -> Training:
        match event:
            case RoundClosed():
                if event.round == self.round:
                    self._closed_round(event)
            case EpochEnded():
                self._ended_epoch(event)
            case StopAsked() if self.stop_after is None:
                self.stop_after = self.epochs_ended + 1  # the epoch that is under way is the last
            case RoundPlanned():
                self.assigned, self.shares = dict(event.assigned) or self.assigned, dict(event.shares) or self.shares
                self.slow, self.slow_at = event.slow, event.at
            case MeasureAgain():
                for node_id in event.nodes:
                    self.readiness.lost(node_id)
            case _:
                pass
        return self

    def _closed_round(self, event: RoundClosed) -> None:
        computing = max((result.seconds for result in self.contributions.values()), default=0.0)
        overhead = max(0.0, event.at - self.opened_at - computing)
        self.overheads = [*self.overheads, overhead][-OVERHEADS_KEPT:]
        pace = event.samples, max(0.0, event.at - (self.closed_at or self.opened_at))
        self.paces = [*self.paces, pace][-PACES_KEPT:]
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
        self.due = 0.0
        self.round_metrics.append((event.samples, event.metrics))
        used = [one for node_id, one in self.contributions.items() if node_id not in event.rejected]
        if len(used) > 1:  # one alone is held against nobody
            self.usual = max(self.usual, statistics.median_low(one.norm / max(1, one.samples) for one in used))
        self.crew, self.contributions, self.promised = frozenset(self.contributions), {}, frozenset()

    def _ended_epoch(self, event: EpochEnded) -> None:
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

    def progress(
        self, running: dict[str, tuple[Attempt, int, dict[str, float]]], nodes: Sequence[NodeView] = ()
    ) -> JobProgress:
        # With those that are done before the others; between rounds, in validation and at the end, those of the last round.
        training_now = {attempt.node_id for attempt, _, _ in running.values() if self._of_round(attempt)}
        at_work = training_now | self.contributions.keys() or self.crew
        rates = {name: rate for name, rate in self.measured.items() if name in at_work}
        training = sum(items for attempt, items, _ in running.values() if self._of_round(attempt))
        done = self._done_parts()
        training += sum(samples for samples, _ in done)
        metrics = dict(self.last_epoch.metrics) if self.last_epoch else {}
        live = [(items, seen) for attempt, items, seen in running.values() if self._of_round(attempt) and items]
        metrics.update(weighted([*self.round_metrics, *done, *live]))
        message = "writing the model" if self.all_trained else "validating" if self.epoch_full else "training"
        return JobProgress(
            done=min(self.samples + training, self.total),
            total=self.total,
            epoch=min(self.spec.initial_epoch + self.epochs_ended + 1, self.spec.initial_epoch + self.epochs),
            epochs=self.spec.initial_epoch + self.epochs,
            round=self.round,
            metrics=metrics,
            items_per_second=self._pace or sum(rates.values()),
            nodes=rates,
            message=message,
            quarantined=self.quarantined,
            waiting=self._waiting(running),
            exchanged_bytes=self.exchanged_bytes,
        )

    @property
    def _pace(self) -> float:
        """Samples a second that the last rounds have brought, with all that was waited for; 0 before there are any."""
        seconds = sum(seconds for _, seconds in self.paces)
        return sum(samples for samples, _ in self.paces) / seconds if seconds else 0.0

    def _waiting(self, running: dict[str, tuple[Attempt, int, dict[str, float]]]) -> dict[str, str]:
        """Nodes that are in no round now, and why."""
        found = dict(self.slow)
        for attempt, _, _ in running.values():
            if attempt.shard_id == WARM_UP:
                if self.readiness.ready:  # else nobody takes part yet
                    found.setdefault(attempt.node_id, "it gets ready")
            elif of_rounds(attempt) and not self._of_round(attempt):
                found[attempt.node_id] = "its part takes longer than it should, and the others go on without it"
        return found

    def _measured_anew(self, view: ClusterView) -> list[Decision]:
        """Nodes that were left out for being slow, and may have become faster: not those of this very plan."""
        if view.now <= self.slow_at:
            return []
        stale = tuple(sorted(node_id for node_id in self.slow if self.readiness.stale(node_id, view.now)))
        return [Choose(MeasureAgain(at=view.now, nodes=stale))] if stale else []

    def _plan_warm_ups(self, view: ClusterView, attempts: dict[str, Attempt]) -> list[Decision]:
        """Nodes that are to get ready, and those of which nothing is to be expected any more."""
        late: list[Decision] = [
            Withdraw(attempt.attempt_id, "nothing has come of it for too long")
            for attempt in attempts.values()
            if of_rounds(attempt) and view.now - max(attempt.leased_at, self.opened_at) > LOST_SECONDS
        ]
        holders = self._holders(view)
        nodes = self.readiness.needing(holders, attempts)
        if not nodes:
            looking = [node.node_id for node in view.nodes if node.free_slots]
            return [*late, *(self._check_validation(looking[0]) if looking else [])]
        rates = speeds(holders, self.measured)
        # As many as can take part, and one more, in case one of them gets no further.
        known = {attempt.node_id for attempt in attempts.values()} | self.readiness.ready.keys()
        taken = sum(node.node_id in known and node.node_id not in self.slow for node in holders)
        nodes.sort(key=lambda node: (-rates[node.node_id], node.node_id))
        nodes = nodes[: max(0, self._room + 1 - taken)]
        if not nodes:
            return late
        first = self._check_validation(max((node.node_id for node in nodes), key=lambda name: (rates[name], name)))
        tasks = self._rehearsals(nodes, rates)
        return [*late, *first, *(Lease(WARM_UP, name, WarmUpTask(task=task)) for name, task in tasks.items())]

    @property
    def _room(self) -> int:
        """As many nodes as can have a whole batch each: on fewer items than that, more would repeat some and blur the step."""
        return max(1, self.dataset.count // self.spec.batch_size)

    def _holders(self, view: ClusterView) -> list[NodeView]:
        """The nodes that may take part."""
        return list(view.nodes)

    def _rehearsals(self, nodes: list[NodeView], rates: dict[str, float]) -> dict[str, TrainTask]:
        """Tasks for these nodes as they may be given in a round, with the data that each will probably have there."""
        task = replace(self._task(self.spec.batch_size, PROBE_SECONDS), weights=None, step=None)
        counts = [shard.count for shard in self.dataset.shards]
        # Those that are much slower will be ready later, or are left out: the fast ones have the data among themselves.
        fast = {name: rate for name, rate in rates.items() if rate * SLOWEST >= max(rates.values())}
        data = assign(counts, rates, self.assigned) | assign(counts, fast, self.assigned)
        return {
            node.node_id: replace(task, data=tuple(self.dataset.shards[index] for index in data[node.node_id]))
            for node in nodes
        }

    def _indexes(self, task: TrainTask) -> tuple[int, ...]:
        """Of a task's data among the shards of the data set."""
        indexes = {shard.blob.sha256: index for index, shard in enumerate(self.dataset.shards)}
        return tuple(indexes[shard.blob.sha256] for shard in task.data)

    def _done_parts(self) -> list[tuple[int, dict[str, float]]]:
        """(Samples, metrics) of the parts of the open round that are done before the others."""
        return [(result.samples, result.metrics) for result in self.contributions.values()]

    def _open_round(self, view: ClusterView) -> list[Decision]:
        """Parts for nodes that are ready."""
        free = [node for node in view.nodes if node.free_slots]
        # Better a round with a node that went wrong before than none at all.
        free = [node for node in free if node.node_id not in self.quarantined] or free
        if not free:
            return []
        rates = speeds(free, self.measured)
        # Those of the round before first: they have the data, and their optimizers know the way.
        chosen = sorted(rates, key=lambda node_id: (node_id not in self.crew, -rates[node_id], node_id))[: self._room]
        parts, slow = self._parts({node_id: rates[node_id] for node_id in sorted(chosen)})
        rates = {node_id: rates[node_id] for node_id in parts}
        data, shares = self._assignment(rates)
        if (data, shares, slow) != (self.assigned, self.shares, self.slow):
            planned = RoundPlanned(at=view.now, round=self.round, assigned=data, shares=shares, slow=slow)
            return [Choose(planned)]
        decisions: list[Decision] = []
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

    def _parts(self, rates: dict[str, float]) -> tuple[dict[str, int], dict[str, str]]:
        """The samples of each node in the round that opens, such that all end together; and those that are left out, since they cost
        more than they bring, with the reason."""
        wanted = self._round_size(rates)
        # The lower median: what is done once, as reading data that are new to a node, is no reason to give it less.
        delays = {node_id: max(0.0, statistics.median_low(kept)) for node_id, kept in self.delays.items()}
        found, slow = self._shared(wanted, rates, delays)
        few = min(self.spec.batch_size, max(1, wanted // len(found)))
        return {node_id: max(samples, few) for node_id, samples in found.items()}, slow

    def _shared(
        self, wanted: int, rates: dict[str, float], delays: dict[str, float]
    ) -> tuple[dict[str, int], dict[str, str]]:
        """Samples by node, and the nodes that are left out this time, with the reason."""
        return without_slow(wanted, rates, delays, self.spec.batch_size)

    def _budget(self, samples: int, rate: float) -> float:
        """Seconds that a node may compute for its part."""
        return self.spec.round_seconds or samples / rate * BUDGET_FACTOR + BUDGET_SECONDS

    def _expected(self, node_id: str, task: TrainTask) -> float:
        """Seconds after which a part is late."""
        seconds = task.seconds or task.samples / self.measured.get(node_id, 1.0) * BUDGET_FACTOR + BUDGET_SECONDS
        return seconds + max(self._late_seconds, LATE_FACTOR * max(self.delays.get(node_id, [0.0])))

    @property
    def _late_seconds(self) -> float:
        """So much longer at least a part may take than it should."""
        return LATE_SECONDS

    def _round_size(self, rates: dict[str, float]) -> int:
        """Samples of a round."""
        wanted = max(-(-self.dataset.count // ROUNDS_PER_EPOCH), len(rates) * self.spec.batch_size)
        left = max(1, (self.epochs_ended + 1) * self.dataset.count - self.samples)
        together = sum(rates.values())
        overhead = statistics.median(self.overheads) if self.overheads else 0.0
        budget = self.spec.round_seconds or computing_seconds(overhead) or PROBE_SECONDS
        wanted = min(max(wanted, round(together * overhead)), max(1, round(together * budget)))
        rounds = max(1, round(left / wanted))  # of one length: no short one at the end of an epoch
        return math.ceil(left / rounds)

    def _close_round(self) -> CloseRound:
        """With all that can be used of what the nodes have sent."""
        found = self.contributions
        base = self.weights or self._first_base(found)
        wrong = {
            node_id: f"it began from other weights ({result.base.sha256[:12]}) than the round ({base.sha256[:12]})"
            for node_id, result in found.items()
            if result.base.sha256 != base.sha256
        }
        wrong |= self._exploded({key: one for key, one in found.items() if key not in wrong})
        results = tuple(found[node_id] for node_id in sorted(found.keys() - wrong.keys()))
        done = min(1.0, (self.samples + sum(result.samples for result in results)) / self.total)
        return CloseRound(self.round, results, done, self.agreement, self.velocity, wrong)

    def _first_base(self, found: dict[str, TrainResult]) -> BlobRef:
        """The weights that most nodes began with, which are the model's own; of as many, those of the faster node."""
        begun = Counter(result.base.sha256 for result in found.values())
        rates = self.measured
        best = max(found, key=lambda name: (begun[found[name].base.sha256], rates.get(name, 0.0), name))
        return found[best].base

    def _exploded(self, results: dict[str, TrainResult]) -> dict[str, str]:
        """Of a round's results those that went too far, and why: farther, too, than updates of this job ever did. Where little is left to
        learn, those of a node that has just come are many times as large as the others', and good.
        """
        found = exploded({key: (result.norm, result.samples) for key, result in results.items()})
        return {key: reason for key, reason in found.items() if results[key].norm > self.usual * results[key].samples}

    def _reject(self, node_id: str, reason: str) -> None:
        self.rejections[node_id] = self.rejections.get(node_id, 0) + 1
        if self.rejections[node_id] >= REJECTIONS_LIMIT:
            self.quarantined[node_id] = reason

    def _assignment(self, rates: dict[str, float]) -> tuple[dict[str, tuple[int, ...]], dict[str, float]]:
        """Data shards by speed, and the shares that they rest on; kept as they are while the same nodes hold them and no share has
        moved by a third."""
        total = sum(rates.values())
        shares = {node_id: rate / total for node_id, rate in rates.items()}
        same_nodes = self.shares.keys() == shares.keys()
        if not same_nodes or any(abs(shares[name] - self.shares[name]) > self.shares[name] / 3 for name in shares):
            counts = [shard.count for shard in self.dataset.shards]
            return assign(counts, rates, self.assigned), shares
        return self.assigned, self.shares

    def _plan_validation(self, view: ClusterView, attempts: dict[str, Attempt]) -> list[Decision]:
        decisions: list[Decision] = []
        validated: dict[str, float] = {}
        if self.validation is not None:
            validating = self.validating or self.validation(self.weights, self.step, self.epochs_ended + 1)
            able = self.readiness.able(view, attempts) if isinstance(validating, BatchStrategy) else view
            decisions = validating.plan(able if able.nodes else view, attempts)
            if Complete() not in decisions:
                return decisions
            decisions.remove(Complete())
            parts = [part for part in validating.in_order() if isinstance(part, EvaluateResult)]
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
        able = self.readiness.able(view, attempts)
        free = [node.node_id for node in able.nodes or view.nodes if node.free_slots]
        if not free:
            return []
        best = self.best.weights if self.best is not None else self.weights
        task = ExportTask(model=self.model, weights=best, step=self.step if best == self.weights else None)
        fastest = max(free, key=lambda node_id: (rates[node_id], node_id))
        return [Lease("export", fastest, task)]

    def wants(self, attempt: Attempt) -> bool:
        """Whether the blobs of this attempt's result are of use: not of a part whose round was closed without it."""
        return not of_rounds(attempt) or self._of_round(attempt)

    def _of_round(self, attempt: Attempt) -> bool:
        """Whether an attempt is a part of the open round."""
        return attempt.shard_id == self._shard_id

    def _contributor(self, attempt: Attempt) -> str:
        """By what a round's results are told apart."""
        return attempt.node_id

    def _of_validation(self, attempt: Attempt) -> bool:
        if self.validating is None and self.validation is not None and attempt.shard_id.startswith(VALIDATION):
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
