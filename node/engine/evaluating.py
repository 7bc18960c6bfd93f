"""Evaluation of slices as sums and counts, so that the parts of several nodes merge into the result that one process would get.

The loss is the mean of the compiled loss over items. If a loss reduces by sum, the sum of a batch counts for its items, so it
does not grow with the batch. Regularization is included, as in Keras. Metrics have the names that Keras prints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from node.engine import keras_models
from node.engine.inputs import Source
from node.engine.loaded import Loaded, Scored
from node.engine.shards import ShardPart
from node.engine.targets import Labels
from node.engine.truth import truth_of
from potluck.wire.tasks import EvaluateResult

CONFUSION_CLASSES = 200
"""With more classes, the confusion matrix would be larger than a message may be."""
STATES_NUMBERS = 8192
"""The most numbers in `EvaluateResult.states`. AUC has 800 with 200 thresholds; with several labels, 800 for each label."""

Step = Callable[[int], None]


def evaluate(loaded: Loaded, source: Source, parts: Sequence[ShardPart], batch_size: int, step: Step) -> EvaluateResult:
    """`step` is called with the items so far. The confusion matrix is empty unless there is one output, with one class an item."""
    model = loaded.model
    truth = truth_of(source, parts, "to evaluate against")
    alone = len(truth.targets) == 1
    labels, shape = truth.labels[0], tuple(model.outputs[0].shape)
    counted = alone and labels.kind != "plain" and len(shape) == 2
    classes = max(2, labels.units) if counted and labels.units <= CONFUSION_CLASSES else 0
    table = np.zeros((classes, classes), np.int64)
    sums = {"loss": 0.0}
    model.reset_metrics()
    done, learnt, threshold = 0, 0.0, labels.threshold
    """`learnt`: the items that the loss is a mean over, without the parts of items that have no class."""
    for batch in source.batches(parts, batch_size):
        size = len(batch[0])
        columns = [column[done : done + size] for column in truth.columns]
        scored = loaded.evaluate(batch, truth, columns)
        known = ~labels.void(columns[0]).reshape(size, -1)
        of_these = size * float(known.mean()) if alone else size
        learnt += of_these
        _add_losses(sums, loaded, scored, size, of_these)
        if classes:
            if not done:
                threshold = loaded.threshold(labels.threshold)
            some = known[:, 0]
            np.add.at(table, _decided(columns[0][some], scored.outputs[0][some], labels, threshold), 1)
        if alone and labels.kind == "plain" and truth.weights is None and scored.outputs[0].shape == columns[0].shape:
            _add_errors(sums, scored.outputs[0], columns[0])
        done += size
        step(done)
    means = loaded.mean_metrics()
    sums = {name: mean * done for name, (mean, _) in means.items()} | sums
    weights = {name: weight for name, (_, weight) in means.items() if name in sums}
    if learnt != done and not _is_sum(model):
        sums["loss"] *= done / learnt if learnt else 0.0
        weights["loss"] = learnt
    if not math.isfinite(sums["loss"]):
        sums["loss"] = math.nan
    rows: dict[str, tuple[float, tuple[float, ...]]] = {}
    room = STATES_NUMBERS
    for name, (value, row) in loaded.counted().items():
        if name not in sums and len(row) <= room:
            rows[name] = value, row
            room -= len(row)
    return EvaluateResult(
        count=done,
        sums=sums,
        confusion=tuple(tuple(row) for row in table.tolist()),
        counts={name: weight for name, weight in weights.items() if weight != done},
        states={name: row for name, (_, row) in rows.items()},
        values={name: value for name, (value, _) in rows.items()},
        threshold=threshold if classes and labels.kind == "binary" else None,
        middle=labels.threshold if classes and labels.kind == "binary" else None,
    )


def _is_sum(model: Any) -> bool:
    """Whether the loss of a model with one output is a sum over items."""
    losses = [loss for loss in keras_models.output_losses(model) if loss is not None]
    return bool(losses) and getattr(losses[0], "reduction", None) == "sum"


def _add_losses(sums: dict[str, float], loaded: Loaded, scored: Scored, size: int, learnt: float) -> None:
    """Add the losses of a batch, each weighted by its items; the loss of a single output by the part with a class."""
    if not scored.parts:
        if _is_sum(loaded.model):
            sums["loss"] += scored.loss - scored.penalty + scored.penalty * size
        else:
            sums["loss"] += scored.loss * learnt
        return
    sums["loss"] += scored.penalty * size
    values: dict[str, float] = {}
    for (name, weight, summed), part in zip(loaded.parts, scored.parts, strict=True):
        # Outputs of one layer share its name: the last one is reported, as in Keras.
        values[name] = part * (1 if summed else size)
        sums["loss"] += weight * values[name]
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value


def _decided(truth: Any, output: Any, labels: Labels, threshold: float) -> tuple[Any, Any]:
    """The class of each item: the true one, and the one that the model says."""
    if labels.kind == "binary":
        return (truth[:, 0] > 0.5).astype(np.int64), (output[:, 0] > threshold).astype(np.int64)
    actual = truth.reshape(len(truth)) if labels.kind == "sparse" else truth.argmax(axis=-1)
    return actual, output.argmax(axis=-1)


def _add_errors(sums: dict[str, float], output: Any, truth: Any) -> None:
    error = (output.astype(np.float64) - truth).reshape(len(truth), -1)
    for name, values in (("mae", np.abs(error)), ("mse", np.square(error))):
        sums[name] = sums.get(name, 0.0) + float(values.mean(axis=1).sum())
