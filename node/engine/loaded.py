"""A model with its functions for batches, evaluate and predict, each traced once for any number of items."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from node.engine import keras_models, keras_parts
from node.engine.truth import Truth
from node.engine.wording import one_line
from potluck.errors import InvalidModel

FAILURES = (ValueError, TypeError, tf.errors.InvalidArgumentError)
"""What Keras and TensorFlow raise when a model does not fit its data."""


@dataclass(frozen=True)
class Scored:
    """The scores of a batch: its loss as Keras reduces it, the part from regularization, and the model's outputs.

    `parts`: the losses of several outputs, in the order of `Loaded.parts`.
    """

    loss: float
    penalty: float
    parts: list[float]
    outputs: list[Any]


class Loaded:
    """`weights` is the hash of the weights that were set in the model; "": its own."""

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
        """Score a batch against `columns` of its truth, and update the compiled metrics. Raises InvalidModel."""
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
        """For the loss of each of several outputs, after a first batch: name, weight in the loss, and whether it is a sum."""
        compiled = keras_parts.compiled_losses(self.model)
        if compiled is None or not compiled.metrics:
            return []
        return [
            (
                metric.name,
                1.0 if part.loss_weights is None else float(part.loss_weights),
                getattr(part.loss, "reduction", None) == "sum",
            )
            for metric, part in zip(compiled.metrics, keras_parts.flat_losses(compiled), strict=True)
        ]

    def mean_metrics(self) -> dict[str, tuple[float, float]]:
        """The compiled metrics that are means, since the last reset, by Keras's names: (mean, sum of its weights)."""
        found: dict[str, tuple[float, float]] = {}
        for name, metric in self._named_metrics():
            if type(metric).result is keras.metrics.Mean.result:
                value = np.asarray(metric.result())
                if value.ndim == 0:
                    found[name] = (float(value), float(metric.count))
        return found

    def counted(self) -> dict[str, tuple[float, tuple[float, ...]]]:
        """Keras's own metrics that are not means, since the last reset: (value, all that they have counted, as one row).

        Their variables are sums over items (AUC's are positives above each threshold), so rows of several nodes are added.
        """
        found: dict[str, tuple[float, tuple[float, ...]]] = {}
        for name, metric in self._named_metrics():
            if not _counts(metric):
                continue
            value = np.asarray(metric.result())
            if value.ndim == 0:
                row = [number for variable in metric.variables for number in np.ravel(variable.numpy()).tolist()]
                found[name] = (float(value), tuple(map(float, row)))
        return found

    def values_of(self, states: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """The values of these metrics for such rows. Rows of a wrong length are left out: another version of Keras may send them.

        The metrics must have seen a batch: before that, some have no variables.
        """
        found: dict[str, float] = {}
        for name, metric in self._named_metrics():
            row, position = np.asarray(states.get(name, ()), np.float64), 0
            if not _counts(metric) or len(row) != sum(math.prod(variable.shape) for variable in metric.variables):
                continue
            for variable in metric.variables:
                size = math.prod(variable.shape)
                part = row[position : position + size].reshape(variable.shape)
                variable.assign(part.astype(keras.backend.standardize_dtype(variable.dtype)))
                position += size
            found[name] = float(metric.result())
        return found

    def threshold(self, otherwise: float) -> float:
        """The threshold at which the compiled metrics tell two classes apart, after a first batch; `otherwise` if none has one."""
        cuts: list[float] = []
        for _, metric in self._named_metrics():
            config = metric.get_config() if _is_kerass_own(metric) else {}
            found = config.get("threshold", config.get("thresholds"))
            if found is None and isinstance(metric, keras.metrics.Precision | keras.metrics.Recall):
                found = metric.thresholds  # the default, which is not in the settings
            found = found[0] if isinstance(found, list | tuple) and len(found) == 1 else found
            if isinstance(found, int | float):
                cuts.append(float(found))
        return cuts[0] if cuts else otherwise

    def _named_metrics(self) -> Iterator[tuple[str, Any]]:
        """The compiled metrics by Keras's names, without the loss."""
        for group in self._own_metrics():
            metrics = getattr(group, "metrics", None)
            # With several outputs, the group names the metrics, in the same order.
            named = zip(group.result(), metrics, strict=True) if metrics else [(group.name, group)]
            yield from ((name, metric) for name, metric in named if name != "loss")

    def _own_metrics(self) -> list[Any]:
        """The metrics except those of the outputs' losses: in a graph for any batch size, these lose the size of each batch."""
        losses = {id(metric) for metric in getattr(keras_parts.compiled_losses(self.model), "metrics", ())}
        return [metric for metric in self.model.metrics if id(metric) not in losses]

    def _predict_step(self, *batch: Any) -> list[Any]:
        return keras_models.flat(self.model(keras_models.packed(self.model, batch), training=False))

    def _evaluate_step(self, batch: Sequence[Any], target: Any, weights: Any = None) -> tuple[Any, Any, Any, Any]:
        model = self.model
        x = keras_models.packed(model, batch)
        outputs = model(x, training=False)
        loss = model.compute_loss(x=x, y=target, y_pred=outputs, sample_weight=weights, training=False)
        penalty = tf.add_n([tf.cast(part, tf.float32) for part in model.losses]) if model.losses else 0.0
        parts = []
        for metric in getattr(keras_parts.compiled_losses(model), "metrics", ()):
            parts.append(tf.identity(metric.result()))  # of this batch alone
            metric.reset_state()
        model.compute_metrics(x, target, outputs, sample_weight=weights)
        return tf.reduce_mean(loss), penalty, parts, keras_models.flat(outputs)


def _counts(metric: Any) -> bool:
    """Whether it is a metric of Keras that is not a mean and whose variables are sums over items."""
    return type(metric).result is not keras.metrics.Mean.result and _is_kerass_own(metric)


def _is_kerass_own(metric: Any) -> bool:
    return getattr(keras.metrics, type(metric).__name__, None) is type(metric)


def _run(call: Callable[[], Any], what: str) -> Any:
    try:
        return call()
    except FAILURES as error:
        raise InvalidModel(f"the model cannot {what} on this data: {one_line(error)}") from error
