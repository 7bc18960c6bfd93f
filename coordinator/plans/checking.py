"""Checks whether a result is what its lease asked for: a node may be broken, of another version, or lie. Pure.

A result that no working node can give is a violation by its node. A loss that is not a number (NaN) is no violation: some models
have that. It is believed when two nodes report it, or the only node does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from msgspec.structs import replace

from potluck.wire.reports import LeaseRenewed
from potluck.wire.tasks import (
    AnyTask,
    AnyTaskResult,
    ConvertResult,
    ConvertTask,
    EvaluateResult,
    EvaluateTask,
    ExportResult,
    ExportTask,
    PredictResult,
    PredictTask,
    SyncResult,
    SyncTask,
    Task,
    TaskResult,
    TrainResult,
    TrainTask,
    WarmUpResult,
    WarmUpTask,
)
from potluck.wire.tensors import DTYPES
from potluck.wire.values import BlobRef, ErrorInfo, Signature, Tensor

RESULT_OF: dict[type[Task], type[TaskResult]] = {
    TrainTask: TrainResult,
    WarmUpTask: WarmUpResult,
    SyncTask: SyncResult,
    EvaluateTask: EvaluateResult,
    PredictTask: PredictResult,
    ExportTask: ExportResult,
    ConvertTask: ConvertResult,
}
SECONDS_LIMIT = 1e8
"""Longest time that a result may report: three years."""
RATE_LIMIT = 1e12
NUMBER_LIMIT = 1e300
"""Largest value: sums of several values stay finite."""
NAMES_LIMIT = 1000
NAMES_SHOWN = 64
TEXT_LIMIT = 200
ERROR_LIMIT = 4000
DIMENSIONS_LIMIT = 32
UPDATE_SLACK_BYTES = 2**20
"""How much larger than its weights an update may be: for names and shapes."""


class _Wrong(Exception):
    """Why a result is not what was asked for."""


def violation(task: AnyTask, result: AnyTaskResult, node_items: int | None = None) -> str:
    """What is wrong with a result of this task; "" if nothing is. `node_items`: size of the node's own data that the task is about."""
    try:
        _check(task, result, node_items)
    except _Wrong as error:
        return str(error)
    return ""


def wrong_signature(signature: Signature) -> str:
    """What is wrong with a node's description of a model's inputs and outputs; "" if nothing is."""
    try:
        _signature(signature)
    except _Wrong as error:
        return str(error)
    return ""


def is_no_number(result: AnyTaskResult) -> bool:
    """Whether an evaluation reports a loss, or a value that counts towards a metric, that is not a number."""
    if not isinstance(result, EvaluateResult):
        return False
    numbers = (
        *result.sums.values(),
        *result.counts.values(),
        *(cell for row in result.states.values() for cell in row),
    )
    return not all(map(math.isfinite, numbers))


@dataclass
class Doubts:
    """Which nodes reported first, for each shard of one job, that the loss is not a number."""

    said: dict[str, str] = field(default_factory=dict)
    believed: bool = False

    def doubted(self, shard_id: str, node_id: str, *, alone: bool) -> bool:
        """A node reports this for a shard; returns whether another node must check it. `alone`: there is no other node."""
        if alone or any(other != node_id for other in self.said.values()):
            self.believed = True
        self.said.setdefault(shard_id, node_id)
        return not self.believed

    def disproved(self, shard_id: str, node_id: str) -> str:
        """A node has numbers for a shard; returns the node that reported that there are none, "" for nobody else."""
        liar = self.said.pop(shard_id, "")
        return liar if liar != node_id else ""


def bounded_error(error: ErrorInfo) -> ErrorInfo:
    """The error, short enough for a job's result."""
    if len(error.message) <= ERROR_LIMIT and len(error.code) <= TEXT_LIMIT:
        return error
    return replace(error, code=error.code[:TEXT_LIMIT], message=error.message[:ERROR_LIMIT])


def bounded_renewal(task: AnyTask, message: LeaseRenewed) -> LeaseRenewed:
    """A node's progress report, limited to possible and readable values."""
    metrics = {name: value for name, value in list(message.metrics.items())[:NAMES_SHOWN] if len(name) <= TEXT_LIMIT}
    most = _most_samples(task, None) if isinstance(task, TrainTask) else _items(task)
    done = message.done if most is None else min(message.done, most)
    return replace(message, done=done, metrics=metrics, stage=message.stage[:TEXT_LIMIT])


def _check(task: AnyTask, result: AnyTaskResult, node_items: int | None) -> None:
    if not isinstance(result, RESULT_OF[type(task)]):
        raise _Wrong(f"the result of a task of kind {_kind(task)!r} has kind {_kind(result)!r}")
    _number(result.seconds, "seconds", 0, SECONDS_LIMIT)
    _number(result.fetch_seconds, "fetch_seconds", 0, SECONDS_LIMIT)
    if result.image is not None and result.image.scale is not None:
        _number(result.image.scale, "image.scale", 0, 1e6)
    match task, result:
        case EvaluateTask(), EvaluateResult():
            _evaluation(task, result, node_items)
        case PredictTask(), PredictResult():
            _same(result.count, _items(task), "count")
            if not result.outputs:
                raise _Wrong("predictions without outputs")
            for tensor in result.outputs:
                _output(tensor, result.count)
        case TrainTask(), TrainResult():
            _training(task, result, node_items)
        case WarmUpTask(), WarmUpResult():
            _number(result.rate, "rate", 0, RATE_LIMIT)
            if not result.rate:
                raise _Wrong("rate is 0")
            _number(result.beside_seconds, "beside_seconds", 0, SECONDS_LIMIT)
        case SyncTask(), SyncResult():
            _same(result.steps, task.steps, "steps")
            _same(result.samples, task.steps * task.batches[task.rank], "samples")
            _number(result.rate, "rate", 0, RATE_LIMIT)
            _names(result.metrics, "metrics")
            if (task.rank == 0) != (result.weights is not None) or (task.rank == 0) != (result.optimizer is not None):
                raise _Wrong(f"member {task.rank} {'has no' if task.rank == 0 else 'has a'} checkpoint")
            _blobs(result.weights, result.optimizer)
        case ExportTask(), ExportResult():
            _blobs(result.model)
            _signature(result.signature)
        case _, ConvertResult():
            _blobs(result.model)
        case _:
            pass
    if result.seconds > 0:
        done = getattr(result, "count", 0) or getattr(result, "samples", 0)
        _number(done / result.seconds, "items a second", 0, RATE_LIMIT)


def _evaluation(task: EvaluateTask, result: EvaluateResult, node_items: int | None) -> None:
    for one, what in (
        (result.sums, "sums"),
        (result.counts, "counts"),
        (result.values, "values"),
        (result.states, "states"),
    ):
        _names(one, what)
    if task.states:
        _same(result.count, 0, "count")
        return
    if task.node_data is None:
        _same(result.count, _items(task), "count")
    elif not result.count or (node_items is not None and result.count > node_items):
        raise _Wrong(f"count is {result.count}, of {node_items if node_items is not None else 'its own'} items")
    for name, value in (*result.sums.items(), *result.counts.items()):
        if math.isfinite(value) and abs(value) > NUMBER_LIMIT:
            raise _Wrong(f"{name[:80]!r} is {value:g}")
    if any(value < 0 for value in result.counts.values()):
        raise _Wrong("a count is below 0")
    classes = len(result.confusion)
    if any(len(row) != classes or min(row, default=0) < 0 for row in result.confusion):
        raise _Wrong("the confusion matrix is not a square of counts")
    if (counted := sum(map(sum, result.confusion))) > result.count:
        raise _Wrong(f"the confusion matrix counts {counted} items of {result.count}")


def _training(task: TrainTask, result: TrainResult, node_items: int | None) -> None:
    if not 1 <= result.steps <= result.samples:
        raise _Wrong(f"{result.samples} samples in {result.steps} steps")
    most = _most_samples(task, node_items)
    if most is not None and result.samples > most:
        raise _Wrong(f"{result.samples} samples, but {task.samples} were asked for")
    items = node_items if task.node_data is not None else sum(shard.count for shard in task.data)
    if items is not None and result.items > items:
        raise _Wrong(f"trained on {result.items} items of {items}")
    _number(result.norm, "norm", 0, math.inf)  # the coordinator measures it itself
    _number(result.seconds_ahead, "seconds_ahead", 0, SECONDS_LIMIT)
    _number(result.momentum, "momentum", 0, 1)
    _names(result.metrics, "metrics")
    _blobs(result.base, result.update)
    if result.update.size > 2 * result.base.size + UPDATE_SLACK_BYTES:
        raise _Wrong(f"an update of {result.update.size} bytes to weights of {result.base.size}")


def _most_samples(task: TrainTask, node_items: int | None) -> int | None:
    """The most samples of a round's part: as many as asked for, or as a node trains ahead when its round before was at most an epoch."""
    items = sum(shard.count for shard in task.data) if task.node_data is None else node_items
    return None if items is None else 2 * (max(task.samples, items) + task.batch_size)


def _items(task: AnyTask) -> int | None:
    """How many items the task's slices have; None where they do not tell."""
    if isinstance(task, EvaluateTask | PredictTask) and (isinstance(task, PredictTask) or task.node_data is None):
        return sum(one.stop - one.start for one in task.slices)
    return None


def _output(tensor: Tensor, rows: int) -> None:
    label = f"output {tensor.name[:80]!r}"
    if not tensor.shape or tensor.shape[0] != rows:
        raise _Wrong(f"{label} has the shape {list(tensor.shape)[:8]}, but there are {rows} items")
    count, data = math.prod(tensor.shape), tensor.data
    if tensor.datatype == "BYTES":
        if not isinstance(data, list) or len(data) != count or not all(isinstance(one, str | bytes) for one in data):
            raise _Wrong(f"{label} is not a list of {count} texts")
        return
    if tensor.datatype not in DTYPES:
        raise _Wrong(f"{label} has the datatype {tensor.datatype[:20]!r}")
    if isinstance(data, list):
        raise _Wrong(f"{label} is a list")
    size = data.size if isinstance(data, BlobRef) else len(data)
    if size != count * DTYPES[tensor.datatype].itemsize:
        raise _Wrong(f"{label} of shape {list(tensor.shape)[:8]} has {size} bytes")


def _signature(signature: Signature) -> None:
    specs = (*signature.inputs, *signature.outputs)
    _names([spec.name for spec in specs], "inputs and outputs")
    for spec in specs:
        if len(spec.shape) > DIMENSIONS_LIMIT or any(not -1 <= size <= 2**40 for size in spec.shape):
            raise _Wrong(f"the signature has the shape {list(spec.shape)[:8]}")
        if spec.datatype != "BYTES" and spec.datatype not in DTYPES:
            raise _Wrong(f"the signature has the datatype {spec.datatype[:20]!r}")
    _number(signature.pixel_scale, "pixel_scale", 0, 1e6)


def _number(value: float, what: str, least: float, most: float) -> None:
    if not least <= value <= most:  # false for NaN, too
        raise _Wrong(f"{what} is {value:g}")


def _same(found: int, wanted: int | None, what: str) -> None:
    if found != wanted:
        raise _Wrong(f"{what} is {found}, but {wanted} were asked for")


def _names(found: Mapping[str, object] | Iterable[str], what: str) -> None:
    names = list(found)
    if len(names) > NAMES_LIMIT or any(len(name) > TEXT_LIMIT for name in names):
        raise _Wrong(f"{what} have {len(names)} names, or very long ones")


def _blobs(*refs: BlobRef | None) -> None:
    if any(ref is not None and not ref.size for ref in refs):
        raise _Wrong("a blob of 0 bytes")


def _kind(value: Task | TaskResult) -> str:
    return str(value.__struct_config__.tag)
