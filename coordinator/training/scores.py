"""What is made of metrics: the mean of parts, which value is the best until now. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from potluck.messages import BlobRef, EvaluateResult, Train

SMALL_IS_GOOD = ("loss", "error", "mae", "mse", "rmse", "divergence", "crossentropy", "perplexity", "logcosh", "hinge")
"""Words in the names of Keras's losses and metrics that are better when they are smaller; all others are to be large."""


@dataclass(frozen=True)
class Best:
    """The epoch with the best value of what is monitored, and the weights after it."""

    value: float
    epochs_ended: int
    epoch: int
    weights: BlobRef


def is_better(spec: Train, value: float, best: Best | None) -> bool:
    """Whether a value of what is monitored is the best until now. Losses and errors are to be small, other metrics large."""
    if not spec.monitor or math.isnan(value):
        return False
    if best is None:
        return True
    falls = any(word in spec.monitor.lower() for word in SMALL_IS_GOOD)
    return value < best.value - spec.min_delta if falls else value > best.value + spec.min_delta


def weighted(parts: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Mean metrics of parts of (samples, metrics), by samples."""
    total: dict[str, float] = {}
    weight: dict[str, int] = {}
    for samples, metrics in parts:
        for name, value in metrics.items():
            total[name] = total.get(name, 0.0) + samples * value
            weight[name] = weight.get(name, 0) + samples
    return {name: total[name] / weight[name] for name in total if weight[name]}


def changes(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """The metrics of a model, and what was the main one of the model that it was made of: `accuracy_before`, `accuracy_change`."""
    both = [name for name in after if name in before]
    both = ["accuracy"] if "accuracy" in both else both
    was = {f"{name}_before": before[name] for name in both}
    return after | was | {f"{name}_change": after[name] - before[name] for name in both}


def evaluation_metrics(result: EvaluateResult) -> dict[str, float]:
    """Mean metrics from sums and counts; accuracy from the confusion matrix, unless it is weighted."""
    metrics = {name: value / result.count for name, value in result.sums.items()} if result.count else {}
    if result.confusion and result.count and "accuracy" not in result.counts:
        metrics["accuracy"] = sum(row[i] for i, row in enumerate(result.confusion)) / result.count
    return metrics
