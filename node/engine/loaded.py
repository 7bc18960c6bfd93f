"""A model with its functions for whole batches: evaluate and predict, traced once for any number of items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from node.engine import runtime
from node.engine.truth import Truth
from node.engine.wording import one_line
from potluck.errors import InvalidModel

FAILURES = (ValueError, TypeError, tf.errors.InvalidArgumentError)
"""What Keras and TensorFlow raise when a model does not fit its data."""


@dataclass(frozen=True)
class Scored:
    """A batch: its loss as Keras reduces it, the part of it that comes from regularization, and the model's outputs.

    `parts`: the losses of several outputs, in the order of `Loaded.parts`.
    """

    loss: float
    penalty: float
    parts: list[float]
    outputs: list[Any]


class Loaded:
    """`weights` is the hash of those that were put into the model; empty for its own."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.weights = ""
        self._specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in model.inputs]
        self._predict: Any = None
        self._evaluate: dict[Any, Any] = {}

    def predict(self, batch: list[Any]) -> list[Any]:
        """Outputs as arrays. Raises InvalidModel."""
        if self._predict is None:
            self._predict = tf.function(self._predict_step, input_signature=self._specs)
        outputs = _run(lambda: self._predict(*batch), "predict")
        return [output.numpy() for output in outputs]

    def evaluate(self, batch: list[Any], truth: Truth, columns: Sequence[Any]) -> Scored:
        """Score a batch against `columns` of its truth. The compiled metrics take it in, too. Raises InvalidModel."""
        key = tuple((column.shape[1:], column.dtype.str) for column in columns)
        step = self._evaluate.get(key)
        if step is None:
            count = len(self._specs)

            def evaluate_step(*tensors: Any) -> Any:
                return self._evaluate_step(tensors[:count], *truth.packed(tensors[count:]))

            specs = [*self._specs, *(tf.TensorSpec((None, *column.shape[1:]), column.dtype) for column in columns)]
            step = self._evaluate[key] = tf.function(evaluate_step, input_signature=specs)
        loss, penalty, parts, outputs = _run(lambda: step(*batch, *map(tf.convert_to_tensor, columns)), "be evaluated")
        return Scored(float(loss), float(penalty), [float(part) for part in parts], [out.numpy() for out in outputs])

    @property
    def parts(self) -> list[tuple[str, float, bool]]:
        """Of the losses of several outputs, after a first batch: name, weight in the loss, and whether they are sums."""
        compiled = self.model._compile_loss
        if compiled is None or not compiled.metrics:
            return []
        return [
            (
                metric.name,
                1.0 if part.loss_weights is None else float(part.loss_weights),
                getattr(part.loss, "reduction", None) == "sum",
            )
            for metric, part in zip(compiled.metrics, compiled._flat_losses, strict=True)
        ]

    def mean_metrics(self) -> dict[str, tuple[float, float]]:
        """The compiled metrics that are means, since the last reset, by Keras's names: (mean, sum of what it weighs by)."""
        found: dict[str, tuple[float, float]] = {}
        for group in self._own_metrics():
            metrics = getattr(group, "metrics", None)
            # Their group names those of several outputs, in their order.
            named = zip(group.result(), metrics, strict=True) if metrics else [(group.name, group)]
            for name, metric in named:
                if name != "loss" and type(metric).result is keras.metrics.Mean.result:
                    value = np.asarray(metric.result())
                    if value.ndim == 0:
                        found[name] = (float(value), float(metric.count))
        return found

    def _own_metrics(self) -> list[Any]:
        """Without those that follow the losses of outputs: in a graph for batches of any size they forget how large each was."""
        losses = {id(metric) for metric in getattr(self.model._compile_loss, "metrics", ())}
        return [metric for metric in self.model.metrics if id(metric) not in losses]

    def _predict_step(self, *batch: Any) -> list[Any]:
        return runtime.flat(self.model(runtime.packed(self.model, batch), training=False))

    def _evaluate_step(self, batch: Sequence[Any], target: Any, weights: Any = None) -> tuple[Any, Any, Any, Any]:
        model = self.model
        x = runtime.packed(model, batch)
        outputs = model(x, training=False)
        loss = model.compute_loss(x=x, y=target, y_pred=outputs, sample_weight=weights, training=False)
        penalty = tf.add_n([tf.cast(part, tf.float32) for part in model.losses]) if model.losses else 0.0
        parts = []
        for metric in getattr(model._compile_loss, "metrics", ()):
            parts.append(tf.identity(metric.result()))  # of this batch alone
            metric.reset_state()
        model.compute_metrics(x, target, outputs, sample_weight=weights)
        return tf.reduce_mean(loss), penalty, parts, runtime.flat(outputs)


def _run(call: Callable[[], Any], what: str) -> Any:
    try:
        return call()
    except FAILURES as error:
        raise InvalidModel(f"the model cannot {what} on this data: {one_line(error)}") from error
