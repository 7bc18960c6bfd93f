"""A model with its functions for whole batches: evaluate and predict, traced once for any number of items."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from node.engine import runtime
from node.engine.wording import one_line
from potluck.errors import InvalidModel

FAILURES = (ValueError, TypeError, tf.errors.InvalidArgumentError)
"""What Keras and TensorFlow raise when a model does not fit its data."""


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

    def evaluate(self, batch: list[Any], target: Any) -> tuple[float, float, list[Any]]:
        """The loss of the batch as Keras reduces it, the part of it that comes from regularization, and the outputs.

        The compiled metrics take it in, too. Raises InvalidModel.
        """
        key = (target.shape[1:], target.dtype.str)
        step = self._evaluate.get(key)
        if step is None:
            specs = [*self._specs, tf.TensorSpec((None, *target.shape[1:]), target.dtype)]
            step = self._evaluate[key] = tf.function(self._evaluate_step, input_signature=specs)
        loss, penalty, outputs = _run(lambda: step(*batch, tf.convert_to_tensor(target)), "be evaluated")
        return float(loss), float(penalty), [output.numpy() for output in outputs]

    def mean_metrics(self) -> dict[str, float]:
        """The compiled metrics that are means over items, since the last reset: those of parts merge exactly."""
        found: dict[str, float] = {}
        for group in self.model.metrics:
            for metric in getattr(group, "metrics", None) or [group]:
                if metric.name != "loss" and type(metric).result is keras.metrics.Mean.result:
                    value = np.asarray(metric.result())
                    if value.ndim == 0:
                        found[metric.name] = float(value)
        return found

    def _predict_step(self, *batch: Any) -> list[Any]:
        return runtime.flat(self.model(runtime.packed(self.model, batch), training=False))

    def _evaluate_step(self, *batch: Any) -> tuple[Any, Any, list[Any]]:
        model, target = self.model, batch[-1]
        x = runtime.packed(model, batch[:-1])
        outputs = model(x, training=False)
        loss = model.compute_loss(x=x, y=target, y_pred=outputs, training=False)
        penalty = tf.add_n([tf.cast(part, tf.float32) for part in model.losses]) if model.losses else 0.0
        model.compute_metrics(x, target, outputs)
        return tf.reduce_mean(loss), penalty, runtime.flat(outputs)


def _run(call: Callable[[], Any], what: str) -> Any:
    try:
        return call()
    except FAILURES as error:
        raise InvalidModel(f"the model cannot {what} on this data: {one_line(error)}") from error
