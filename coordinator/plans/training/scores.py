"""Computes with metrics: the mean of parts, and which value is the best until now. Pure."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from potluck.wire.jobs import Train
from potluck.wire.tasks import EvaluateResult
from potluck.wire.values import BlobRef

FALLS = (
    *("loss", "error", "mae", "mse", "mape", "msle", "rmse", "crossentropy", "divergence", "kld", "poisson"),
    *("hinge", "huber", "logcosh", "log_cosh", "perplexity", "false_positives", "false_negatives"),
)
RISES = (
    *("acc", "accuracy", "auc", "precision", "recall", "f1", "f1_score", "fbeta_score", "iou", "io_u", "r2_score"),
    *("similarity", "correlation", "true_positives", "true_negatives", "sensitivity", "specificity", "_at_recall"),
    *("_at_precision", "_at_sensitivity", "_at_specificity"),
)
"""How the names of Keras's losses and metrics end, by what is better: a smaller value, or a larger one."""

ROUNDING = 1e-5
"""A mean of float32 may be so far from the same ratio of counts."""


@dataclass(frozen=True)
class Best:
    """The epoch with the best value of the monitored metric, and the weights after it."""

    value: float
    epochs_ended: int
    epoch: int
    weights: BlobRef


def is_better(spec: Train, value: float, best: Best | None) -> bool:
    """Whether a value of the monitored metric is the best until now."""
    if not spec.monitor or math.isnan(value):
        return False
    if best is None:
        return True
    falls = direction(spec) == "min"  # an older job's name may not tell: then large is good
    return value < best.value - spec.min_delta if falls else value > best.value + spec.min_delta


def direction(spec: Train) -> Literal["min", "max"] | None:
    """Whether what is monitored is better when it is small: what the job says, or by its name, as Keras has them; None where neither tells."""
    if spec.monitor_mode != "auto":
        return spec.monitor_mode
    name = re.sub(r"_\d+$", "", spec.monitor.lower())  # of a second metric of a kind
    if name.endswith(FALLS):
        return "min"
    return "max" if name.endswith(RISES) else None


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
    """Mean metrics from sums and counts, and those that are no means; accuracy from the confusion matrix, unless the model's own says something else.

    (It is weighted, or cuts the scores of two classes elsewhere than they are equal, as Keras does with logits.)
    """
    metrics = {name: value / result.count for name, value in result.sums.items()} if result.count else {}
    if result.confusion and result.count and "accuracy" not in result.counts:
        right = sum(row[i] for i, row in enumerate(result.confusion))
        # Fewer than all where some items have no class. Keras counts those as wrong, too.
        known = sum(map(sum, result.confusion))
        if "accuracy" not in metrics:
            metrics["accuracy"] = right / known if known else 0.0
        elif abs(metrics["accuracy"] - right / result.count) < ROUNDING:
            metrics["accuracy"] = right / result.count
    return metrics | result.values
