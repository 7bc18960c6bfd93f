"""Data that live on the nodes and never leave them (`node:name`): what the cluster knows of them, and their evaluation. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from coordinator.plans.decisions import Complete, Decision, Lease
from coordinator.plans.job import Attempt
from coordinator.plans.placement import ClusterView, NodeView
from potluck.errors import InvalidRequest, NotFound
from potluck.wire.jobs import NODE_DATA, JobProgress
from potluck.wire.questions import DatasetInfo
from potluck.wire.tasks import AnyTask, AnyTaskResult, EvaluateResult, EvaluateTask, TaskResult
from potluck.wire.values import DataFormat, Dataset, ErrorInfo, NodeData

TRIES = 3
"""A node with this many errors is left out of an evaluation that others can do."""


def joined(name: str, held: Mapping[str, NodeData]) -> Dataset:
    """The data set that the nodes' parts make together: no shards, all items, every class that any of them has.

    Raises NotFound where no node has such a data set, InvalidRequest where the parts differ in kind.
    """
    if not held:
        raise NotFound(
            f"no online node has data named {name!r}: name them under [data] in a node's settings "
            "(`potluck data list` shows what there is)"
        )
    first_id, first = next(iter(sorted(held.items())))
    for node_id, data in sorted(held.items()):
        if _kind(data.format) != _kind(first.format):
            raise InvalidRequest(
                f"the nodes have different data under the name {name!r}: {_words(first.format)} on {first_id}, "
                f"{_words(data.format)} on {node_id}: give them the same form, or another name"
            )
    format = DataFormat(
        kind=first.format.kind,
        classes=_classes(held),
        inputs=first.format.inputs,
        target=first.format.target,
        targets=first.format.targets,
        weight=first.format.weight,
        rate=first.format.rate,
    )
    return Dataset(name=name, format=format, count=sum(data.count for data in held.values()), shards=())


def fits(held: NodeData | None, format: DataFormat) -> bool:
    """Whether a node's data may be used in a job on data of this format: they may lack classes, but not add any."""
    return held is not None and _kind(held.format) == _kind(format) and set(held.format.classes) <= set(format.classes)


def described(held: Mapping[str, Mapping[str, NodeData]]) -> tuple[DatasetInfo, ...]:
    """The data sets for clients; `held` by name and node."""
    return tuple(
        DatasetInfo(
            name=NODE_DATA + name,
            kind=next(iter(parts.values())).format.kind,
            count=sum(data.count for data in parts.values()),
            shards=0,
            size_bytes=0,
            classes=_classes(parts),
            nodes=tuple(sorted(parts)),
        )
        for name, parts in sorted(held.items())
    )


@dataclass
class NodesEvaluation:
    """Evaluation of data that live on nodes: each node evaluates all of its own, and only sums and counts leave it.

    A lost node is left out, and so is one with several errors. A node that comes while others work takes part.
    """

    data: Dataset
    task: EvaluateTask
    prefix: str
    results: dict[str, EvaluateResult] = field(default_factory=dict)
    """Results by node."""
    errors: dict[str, int] = field(default_factory=dict)
    """How many errors each node has reported."""

    def plan(self, view: ClusterView, attempts: dict[str, Attempt]) -> list[Decision]:
        mine = [attempt for attempt in attempts.values() if attempt.shard_id.startswith(f"{self.prefix}-")]
        busy = {attempt.node_id for attempt in mine}
        done = self.results.keys() | busy
        if self.results:  # otherwise the job ends with the nodes' errors
            done |= {node_id for node_id, errors in self.errors.items() if errors >= TRIES}
        missing = [node for node in self._holders(view) if node.node_id not in done]
        awaited = view.resting & self.errors.keys() - done
        if self.results and not missing and not busy and not awaited:
            return [Complete()]
        return [Lease(f"{self.prefix}-{node.node_id}", node.node_id, self.task) for node in missing if node.free_slots]

    def leased(self, attempt: Attempt, task: AnyTask) -> None:
        """Keeps nothing: the attempt stays open until it ends."""

    def finished(self, attempt: Attempt, result: AnyTaskResult, at: float) -> None:
        if isinstance(result, EvaluateResult):
            self.results[attempt.node_id] = result

    def ended(self, attempt: Attempt, error: ErrorInfo | None) -> None:
        if error is not None:
            self.errors[attempt.node_id] = self.errors.get(attempt.node_id, 0) + 1

    def progress(
        self, running: dict[str, tuple[Attempt, int, dict[str, float]]], nodes: Sequence[NodeView] = ()
    ) -> JobProgress:
        done = sum(result.count for result in self.results.values()) + sum(done for _, done, _ in running.values())
        return JobProgress(done=min(done, self.data.count), total=self.data.count)

    def in_order(self) -> list[TaskResult]:
        """The results ordered by node id."""
        return [self.results[node_id] for node_id in sorted(self.results)]

    def _holders(self, view: ClusterView) -> list[NodeView]:
        return [node for node in view.nodes if fits(node.holds(self.data.name), self.data.format)]


def _classes(held: Mapping[str, NodeData]) -> tuple[str, ...]:
    """Every class that any node has, in alphabetical order."""
    return tuple(sorted({label for data in held.values() for label in data.format.classes}))


def _kind(format: DataFormat) -> tuple[object, ...]:
    """What all parts of a data set must have in common."""
    learnt = format.target, sorted(format.targets), format.weight
    return format.kind, format.rate, sorted(format.inputs), learnt, bool(format.classes)


def _words(format: DataFormat) -> str:
    learnt = ", ".join(format.targets) or format.target
    target = f" and target {learnt}" if learnt else ""
    inputs = f" of {', '.join(format.inputs)}" if format.inputs else ""
    rate = f" at {format.rate} Hz" if format.rate else ""
    return f"{format.kind}{rate}{inputs}{target}{'' if format.classes else ' without classes'}"
