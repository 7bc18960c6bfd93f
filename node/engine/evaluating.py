"""Evaluation of slices as sums and counts, so that the parts of several nodes merge into what one process would have got.

The loss is the mean over items of what was compiled: where the loss reduces by sum, the sum of a batch counts for its
items, and does not grow with the batch. Regularization is in it, as Keras has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from node.engine.inputs import Source
from node.engine.loaded import Loaded
from node.engine.shards import Part
from node.engine.targets import Labels, encode, labels_for
from potluck.errors import InvalidData

CONFUSION_CLASSES = 200
"""With more classes, the confusion matrix would be larger than a message may be."""

Step = Callable[[int], None]


def evaluate(
    loaded: Loaded, source: Source, parts: Sequence[Part], batch_size: int, step: Step
) -> tuple[int, dict[str, float], tuple[tuple[int, ...], ...]]:
    """Items, sums, and confusion matrix (empty unless each item has one class). `step` is told the items so far."""
    model = loaded.model
    labels = labels_for(model, source.data.classes)
    target = source.targets(parts)
    if target is None:
        raise InvalidData("the data set has no targets to evaluate against")
    output = tuple(model.outputs[0].shape)
    wanted = encode(target, labels, output)
    sum_loss = getattr(model.loss, "reduction", None) == "sum"
    counted = labels.kind != "plain" and len(output) == 2
    classes = max(2, labels.units) if counted and labels.units <= CONFUSION_CLASSES else 0
    table = np.zeros((classes, classes), np.int64)
    sums = {"loss": 0.0}
    model.reset_metrics()
    done = 0
    for batch in source.batches(parts, batch_size):
        size = len(batch[0])
        truth = wanted[done : done + size]
        loss, penalty, outputs = loaded.evaluate(batch, truth)
        sums["loss"] += (loss - penalty) * (1 if sum_loss else size) + penalty * size
        if classes:
            np.add.at(table, _decided(truth, outputs[0], labels), 1)
        if labels.kind == "plain" and outputs[0].shape == truth.shape:
            _add_errors(sums, outputs[0], truth)
        done += size
        step(done)
    sums = {name: value * done for name, value in loaded.mean_metrics().items()} | sums
    if not math.isfinite(sums["loss"]):
        sums["loss"] = math.nan
    return done, sums, tuple(tuple(row) for row in table.tolist())


def _decided(truth: Any, output: Any, labels: Labels) -> tuple[Any, Any]:
    """Class of each item: what it is, and what the model says."""
    if labels.kind == "binary":
        return (truth[:, 0] > 0.5).astype(np.int64), (output[:, 0] > labels.threshold).astype(np.int64)
    actual = truth.reshape(len(truth)) if labels.kind == "sparse" else truth.argmax(axis=-1)
    return actual, output.argmax(axis=-1)


def _add_errors(sums: dict[str, float], output: Any, truth: Any) -> None:
    error = (output.astype(np.float64) - truth).reshape(len(truth), -1)
    for name, values in (("mae", np.abs(error)), ("mse", np.square(error))):
        sums[name] = sums.get(name, 0.0) + float(values.mean(axis=1).sum())
