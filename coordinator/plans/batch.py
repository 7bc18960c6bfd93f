"""Evaluate and predict: one queue of items, cut into chunks by the measured speed of the node that asks next.

Guided self-scheduling (Polychronopoulos and Kuck, 1987): a chunk is half of the remaining work, shared by speed, and takes a few
seconds at most. When the queue is empty, an idle node gets a backup attempt at the oldest straggler (MapReduce,
Dean and Ghemawat, 2004); the first result counts, so each item is in the output exactly once. After an evaluation in
several parts, one node computes the metrics that are not means from the counts of all parts. Pure.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from msgspec.structs import replace

from coordinator.plans.decisions import Complete, Decision, Lease, Withdraw
from coordinator.plans.job import Attempt
from coordinator.plans.placement import ClusterView, NodeView, speeds
from potluck.errors import ModelFailed
from potluck.wire.jobs import JobProgress
from potluck.wire.tasks import AnyTask, AnyTaskResult, EvaluateResult, EvaluateTask, PredictTask, TaskResult
from potluck.wire.values import DataShard, DataSlice, ErrorInfo

CHUNK_SECONDS = 3.0
"""The longest chunk at the node's measured speed: a lost node can cost this much."""
PROBE_ITEMS = 256
"""The length of a first chunk, while the speed is unknown."""
BACKUP_FACTOR = 2.0
"""A backup starts when an attempt has taken this many times as long as its node's speed promised."""

Range = tuple[int, int]


class ItemIndex:
    """Maps item numbers of a whole data set to slices of its shards."""

    def __init__(self, shards: tuple[DataShard, ...]) -> None:
        self._shards = shards
        self._ends = list(accumulate(shard.count for shard in shards))
        self.count = self._ends[-1] if self._ends else 0

    def slices(self, start: int, stop: int) -> tuple[DataSlice, ...]:
        """The slices that hold items `start` to `stop` (exclusive), in order."""
        found: list[DataSlice] = []
        position = bisect_right(self._ends, start)
        while start < stop:
            begin = self._ends[position] - self._shards[position].count
            end = min(stop, self._ends[position])
            found.append(DataSlice(blob=self._shards[position].blob, start=start - begin, stop=end - begin))
            start, position = end, position + 1
        return tuple(found)


@dataclass
class _Chunk:
    items: Range
    task: AnyTask
    attempts: set[str] = field(default_factory=set)

    @property
    def count(self) -> int:
        return self.items[1] - self.items[0]


@dataclass
class BatchStrategy:
    """Cuts items 0 to `total` into chunks; `task_for(slices)` makes a task. Results by first item, each item once."""

    index: ItemIndex
    batch_size: int
    task_for: Callable[[tuple[DataSlice, ...]], EvaluateTask | PredictTask]
    prefix: str = "items"
    runtime: str = "tensorflow"
    """What a node needs besides a decoder for the data."""
    next_item: int = 0
    done_items: int = 0
    chunks: dict[str, _Chunk] = field(default_factory=dict)
    returned: dict[str, None] = field(default_factory=dict)
    """Chunks that were leased and came back, in order."""
    results: dict[int, TaskResult] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    valued: EvaluateResult | None = None
    """The metrics computed from the `states` of all results."""
    late: dict[str, None] = field(default_factory=dict)
    """Attempts at chunks where another attempt was first, in order."""

    @property
    def total(self) -> int:
        return self.index.count

    @property
    def complete(self) -> bool:
        return self.done_items == self.total

    def first(self) -> EvaluateTask | PredictTask:
        """The task of the first batch only."""
        return self.task_for(self.index.slices(0, min(self.batch_size, self.total)))

    def plan(self, view: ClusterView, attempts: dict[str, Attempt]) -> list[Decision]:
        decisions: list[Decision] = [
            Withdraw(attempt_id, "another attempt was first") for attempt_id in self.late if attempt_id in attempts
        ]
        view = view.having(self.runtime)
        if self.complete:
            return [*decisions, *self._plan_values(view, attempts)]
        free = [node for node in view.nodes if node.free_slots]
        if not free:
            return decisions
        rates = speeds(view.nodes, self.measured)
        whole = sum(rates.values())
        next_item, returned = self.next_item, deque(self.returned)
        # One chunk per node and turn, fastest first, so that the last chunks go to nodes that finish them soonest.
        free.sort(key=lambda node: (-rates[node.node_id], node.node_id))
        for turn in range(max(node.free_slots for node in free)):
            for node in free:
                if node.free_slots <= turn:
                    continue
                if returned:
                    shard_id = returned.popleft()
                    decisions.append(Lease(shard_id, node.node_id, self.chunks[shard_id].task))
                elif next_item < self.total:
                    size = self._chunk_size(self.total - next_item, rates[node.node_id], whole)
                    stop = min(self.total, next_item + size)
                    task = self.task_for(self.index.slices(next_item, stop))
                    decisions.append(Lease(f"{self.prefix}-{next_item}-{stop}", node.node_id, task))
                    next_item = stop
        if not returned and next_item >= self.total:
            leased = {decision.node_id for decision in decisions if isinstance(decision, Lease)}
            decisions += self._backups(free, attempts, rates, leased, view.now)
        return decisions

    def leased(self, attempt: Attempt, task: AnyTask) -> None:
        if attempt.shard_id == self._values_id:
            return
        chunk = self.chunks.get(attempt.shard_id)
        if chunk is None:
            start, stop = (int(part) for part in attempt.shard_id.rsplit("-", 2)[1:])
            chunk = self.chunks[attempt.shard_id] = _Chunk((start, stop), task)
            self.next_item = max(self.next_item, stop)
        chunk.attempts.add(attempt.attempt_id)
        self.returned.pop(attempt.shard_id, None)

    def finished(self, attempt: Attempt, result: AnyTaskResult, at: float) -> None:
        if attempt.shard_id == self._values_id and isinstance(result, EvaluateResult):
            self.valued = result
            return
        if result.seconds > 0 and isinstance(result, TaskResult):
            rate = getattr(result, "count", 0) / result.seconds
            before = self.measured.get(attempt.node_id, rate)
            self.measured[attempt.node_id] = (before + rate) / 2
        self.late.pop(attempt.attempt_id, None)
        chunk = self.chunks.pop(attempt.shard_id, None)
        if chunk is None:
            return
        self.late.update(dict.fromkeys(sorted(chunk.attempts - {attempt.attempt_id})))
        self.returned.pop(attempt.shard_id, None)
        self.results[chunk.items[0]] = result
        self.done_items += chunk.count

    def ended(self, attempt: Attempt, error: ErrorInfo | None) -> None:
        self.late.pop(attempt.attempt_id, None)
        chunk = self.chunks.get(attempt.shard_id)
        if chunk is not None:
            chunk.attempts.discard(attempt.attempt_id)
            if not chunk.attempts:
                self.returned[attempt.shard_id] = None

    def progress(
        self, running: dict[str, tuple[Attempt, int, dict[str, float]]], nodes: Sequence[NodeView] = ()
    ) -> JobProgress:
        best: dict[str, int] = {}
        for attempt, done, _ in running.values():
            if attempt.shard_id in self.chunks:
                best[attempt.shard_id] = max(
                    best.get(attempt.shard_id, 0), min(done, self.chunks[attempt.shard_id].count)
                )
        at_work = {attempt.node_id for attempt, _, _ in running.values()}
        rates = {node_id: rate for node_id, rate in self.measured.items() if node_id in at_work}
        return JobProgress(
            done=self.done_items + sum(best.values()),
            total=self.total,
            nodes=rates,
            items_per_second=sum(rates.values()),
        )

    def in_order(self) -> list[TaskResult]:
        """The results in item order; after them, the metrics computed from their counts."""
        found = [self.results[start] for start in sorted(self.results)]
        return [*found, self.valued] if self.valued is not None else found

    def check_invariants(self) -> None:
        """Every item is in exactly one place: done, in a chunk, or not yet cut."""
        in_chunks = sum(chunk.count for chunk in self.chunks.values())
        assert self.done_items + in_chunks + (self.total - self.next_item) == self.total
        assert all(not self.chunks[shard_id].attempts for shard_id in self.returned)
        assert all(chunk.attempts or name in self.returned for name, chunk in self.chunks.items())

    def _plan_values(self, view: ClusterView, attempts: dict[str, Attempt]) -> list[Decision]:
        """Give the parts' states to a node that computes their metrics; complete the job when that is done or not needed."""
        parts = [result for result in self.results.values() if isinstance(result, EvaluateResult)]
        states = merge(parts).states if self.valued is None and len(parts) > 1 else {}
        if not states:
            return [Complete()]
        free = [node.node_id for node in view.nodes if node.free_slots]
        if not free or any(attempt.shard_id == self._values_id for attempt in attempts.values()):
            return []
        rates = speeds(view.nodes, self.measured)
        task = replace(self.task_for(self.index.slices(0, 1)), states=states)
        return [Lease(self._values_id, max(free, key=lambda node_id: (rates[node_id], node_id)), task)]

    @property
    def _values_id(self) -> str:
        return f"{self.prefix}-values"

    def _chunk_size(self, remaining: int, rate: float, whole: float) -> int:
        """The items of a chunk for a node that does `rate` of the `whole` items per second of all nodes."""
        size = remaining * rate / whole / 2
        if self.measured:
            size = min(size, rate * CHUNK_SECONDS)
            size = max(size, rate * CHUNK_SECONDS / 12)
        else:
            size = min(size, max(PROBE_ITEMS, self.batch_size))
        batches = max(1, round(size / self.batch_size))
        return batches * self.batch_size

    def _backups(
        self, free: list[NodeView], attempts: dict[str, Attempt], rates: dict[str, float], busy: set[str], now: float
    ) -> list[Decision]:
        late: list[tuple[float, str, str]] = []
        for shard_id, chunk in self.chunks.items():
            if len(chunk.attempts) != 1:
                continue
            attempt = attempts.get(next(iter(chunk.attempts)))
            if attempt is None:
                continue
            promised = (
                chunk.count / self.measured[attempt.node_id] if attempt.node_id in self.measured else CHUNK_SECONDS
            )
            if now - attempt.leased_at > BACKUP_FACTOR * max(promised, CHUNK_SECONDS):
                late.append((attempt.leased_at, shard_id, attempt.node_id))
        idle = [node for node in free if node.idle and node.node_id not in busy]
        found: list[Decision] = []
        for _, shard_id, owner in sorted(late):
            node = next((node for node in idle if node.node_id != owner), None)
            if node is None:
                break
            idle.remove(node)
            found.append(Lease(shard_id, node.node_id, self.chunks[shard_id].task))
        return found


def merge(results: list[EvaluateResult]) -> EvaluateResult:
    """The sum of the parts: counts exactly, sums up to float64 rounding (they are weighted again).

    A metric that one part lacks is left out: the mean of the others would look like that of all items. Raises ModelFailed for
    parts with different numbers of classes.
    """
    count = sum(result.count for result in results)
    parts = [result for result in results if result.count]
    names = [name for name in parts[0].sums if all(name in part.sums for part in parts)] if parts else []
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    for part in parts:
        for name in names:
            weight = part.counts.get(name, float(part.count))
            sums[name] = sums.get(name, 0.0) + part.sums[name] / part.count * weight
            counts[name] = counts.get(name, 0.0) + weight
    # Each is a sum of means by weight: turn it into a mean over items again, as `sums` has it.
    sums = {name: value / counts[name] * count if counts[name] else 0.0 for name, value in sums.items()}
    states: dict[str, tuple[float, ...]] = {
        name: tuple(map(sum, zip(*(part.states[name] for part in parts), strict=True)))
        for name, row in (parts[0].states.items() if parts else ())
        if all(len(part.states.get(name, ())) == len(row) for part in parts)
    }
    # Those of a single part, or those computed from the states of all parts.
    values = [result.values for result in results if not result.count or len(parts) == 1]
    # A part leaves its matrix out where it is too large to send. One of the others alone would miss items.
    tables = [part.confusion for part in parts] if all(part.confusion for part in parts) else []
    confusion: tuple[tuple[int, ...], ...] = ()
    if len({len(table) for table in tables}) > 1:
        sizes = " and ".join(str(size) for size in sorted({len(table) for table in tables}))
        raise ModelFailed(f"the nodes do not agree on how many classes the model has: {sizes}")
    if tables:
        confusion = tuple(tuple(sum(cells) for cells in zip(*rows, strict=True)) for rows in zip(*tables, strict=True))
    return EvaluateResult(
        count=count,
        sums=sums,
        confusion=confusion,
        counts={name: value for name, value in counts.items() if value != count},
        states=states,
        values={name: value for found in values for name, value in found.items()},
        seconds=sum(result.seconds for result in results),
        threshold=parts[0].threshold if parts else None,
        middle=parts[0].middle if parts else None,
    )
