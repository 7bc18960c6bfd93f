"""How long a task will still take, as far as that can be told: a node that stops finishes what is nearly done. Pure."""

from __future__ import annotations

from math import inf

from potluck.wire.tasks import AnyTask, EvaluateTask, PredictTask, SyncTask, TrainTask


def seconds_left(task: AnyTask, done: int, seconds: float) -> float:
    """For a task that has done so much (as its progress counts) in so many seconds. Infinite where nothing can be told."""
    total = _total(task)
    if not total or not done or seconds <= 0:
        return inf
    left = max(0, total - done) * seconds / done
    if isinstance(task, TrainTask) and not task.parts:
        left = min(left, max(0.0, task.seconds - seconds))
    return left


def _total(task: AnyTask) -> int:
    """What its progress counts up to; 0: it tells none."""
    match task:
        case TrainTask():
            return task.samples
        case SyncTask():
            return task.steps * task.batches[task.rank]
        case EvaluateTask() | PredictTask():
            return sum(part.stop - part.start for part in task.slices)
        case _:
            return 0
