"""Training that hides single items, or this node as a whole, behind noise (differential privacy): see `potluck.wire.values.Privacy`.

Samples and noise come from the operating system's entropy, never from a job's seed: with the seed, one could remove the noise.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from node.engine import keras_models, keras_parts
from node.engine.truth import Truth
from potluck.errors import InvalidModel
from potluck.weights import files
from potluck.weights.updates import Role
from potluck.wire.values import Privacy

AT_ONCE = 16
GRADIENTS_BYTES = 64 * 2**20
"""Limit of the memory for the gradients of items that are computed together."""


def check(model: Any) -> None:
    """Raises InvalidModel for a model whose training cannot hide items."""
    for layer in keras_parts.all_layers(model):
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable:
            raise InvalidModel(
                f"layer '{layer.name}' (BatchNormalization) mixes the items of a batch, so that none can be hidden: "
                "use GroupNormalization or LayerNormalization"
            )
    if isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer):
        raise InvalidModel("gradients are cut to a norm, which float16's loss scale would change: use mixed_bfloat16")


class NoisyStep:
    """A step of DP-SGD (Abadi et al., 2016, algorithm 1) with the model's own loss and optimizer, on items held in memory.

    Each item is taken with the probability `batch` / items, independently of all others (Poisson sampling, which the accountant
    assumes). So the number of items differs from step to step. The sum of their gradients is divided by `batch`.
    """

    def __init__(self, model: Any, rules: Privacy, batch: int, items: Sequence[Any], truth: Truth) -> None:
        """`items` are tensors in the order of the model's inputs. Raises InvalidModel."""
        check(model)
        self._model = model
        self._rules = rules
        self._batch = batch
        self._count = len(items[0])
        self._truth = truth
        # Copied to the device of the step, if the items are elsewhere.
        self._held = [tf.identity(item) for item in items], [tf.constant(column) for column in truth.columns]
        size = sum(4 * math.prod(variable.shape) for variable in model.trainable_variables)
        self._at_once = max(1, min(AT_ONCE, GRADIENTS_BYTES // max(1, size)))
        self._choice = np.random.default_rng()
        # `from_non_deterministic_state` is refused once an engine was asked for deterministic operations.
        self._noise = tf.random.Generator.from_seed(secrets.randbits(63))
        self._step = self._traced()
        self._loss, self._taken = 0.0, 0

    def __call__(self) -> float:
        """Take a step. Returns the sum of the items' losses."""
        taken = int(self._choice.binomial(self._count, min(1.0, self._batch / self._count)))
        chosen = self._choice.choice(self._count, taken, replace=False, shuffle=False)
        try:
            loss = self._taken_with(chosen)
        except (TypeError, ValueError, NotImplementedError):
            if self._at_once == 1:
                raise
            # TensorFlow cannot trace every layer for several items side by side (recurrent ones: their loops).
            self._at_once, self._step = 1, self._traced()
            loss = self._taken_with(chosen)
        self._loss, self._taken = self._loss + loss, self._taken + taken
        return loss

    def reset_metrics(self) -> None:
        self._loss, self._taken = 0.0, 0

    def metrics(self) -> dict[str, float]:
        """The mean loss since the last reset. Empty if there is noise: the exact loss would tell of the data."""
        return {} if self._rules.noise_multiplier else {"loss": self._loss / max(1, self._taken)}

    def _traced(self) -> Any:
        return tf.function(self._apply, input_signature=[tf.TensorSpec([None], tf.int64), tf.TensorSpec([], tf.int64)])

    def _taken_with(self, chosen: Any) -> float:
        index = np.zeros(-(-max(1, len(chosen)) // self._at_once) * self._at_once, np.int64)
        index[: len(chosen)] = chosen
        return float(self._step(tf.constant(index), tf.constant(len(chosen), tf.int64)))

    def _apply(self, index: Any, taken: Any) -> Any:
        """`index`: the items, filled up so that `_at_once` divides their number."""
        variables = self._model.trainable_variables
        sums = [tf.zeros(variable.shape, variable.dtype) for variable in variables]
        total = tf.constant(0.0)
        for start in tf.range(0, tf.size(index, tf.int64), self._at_once):
            place = start + tf.range(self._at_once, dtype=tf.int64)
            some = tf.gather(index, place)
            items = [[tf.gather(array, some) for array in held] for held in self._held]
            counts = tf.cast(place < taken, tf.float32)
            if self._at_once > 1:
                gradients, losses = tf.vectorized_map(self._cut, (items, counts))
            else:
                alone = self._cut(([[array[0] for array in held] for held in items], counts[0]))
                gradients, losses = [part[None] for part in alone[0]], alone[1]
            sums = [before + tf.reduce_sum(parts, axis=0) for before, parts in zip(sums, gradients, strict=True)]
            total += tf.reduce_sum(losses)
        deviation = self._rules.noise_multiplier * self._rules.l2_norm_clip
        noisy = [
            (part + self._noise.normal(tf.shape(part), stddev=deviation, dtype=part.dtype)) / self._batch
            for part in sums
        ]
        self._model.optimizer.apply(noisy, variables)
        return total

    def _cut(self, given: Any) -> Any:
        """(The gradient of one item, cut to the norm, and its loss): both are 0 for an item that only fills up."""
        items, counts = given
        arrays, columns = ([array[None] for array in held] for held in items)
        model = self._model
        with tf.GradientTape() as tape:
            x = keras_models.packed(model, arrays)
            y, *weights = self._truth.packed(columns)
            outputs = model(x, training=True)
            loss = model.compute_loss(
                x=x, y=y, y_pred=outputs, sample_weight=weights[0] if weights else None, training=True
            )
        found = tape.gradient(loss, model.trainable_variables, unconnected_gradients="zero")
        gradients = [tf.convert_to_tensor(part) for part in found]
        norm = tf.linalg.global_norm(gradients)
        factor = tf.minimum(1.0, self._rules.l2_norm_clip / tf.maximum(norm, 1e-12))
        # An item whose gradient is not finite counts as 0.
        factor = tf.where(tf.math.is_finite(norm), factor * counts, 0.0)
        return [tf.math.multiply_no_nan(part, tf.cast(factor, part.dtype)) for part in gradients], tf.cast(
            loss, tf.float32
        ) * counts


def protected(before: Path, after: Sequence[Any], rules: Privacy | None, roles: Sequence[Role]) -> list[Any]:
    """The weights `after` a round, as they may leave this node. `after`, the roles and the file `before` have the order of
    `model.weights`.

    For the unit `node`, the update is cut and noise is added (McMahan et al., 2018, with noise at each node). Untrained state
    stays as it was: it would tell of the data without noise.
    """
    if rules is None:
        return list(after)
    stored = dict(files.load(before))
    names = sorted(stored, key=lambda name: name[1:])
    kept = [value if role == "trained" else stored[name] for name, value, role in zip(names, after, roles, strict=True)]
    if rules.unit == "example":
        return kept
    learnt = {
        place: kept[place].astype(np.float64) - stored[name]
        for place, name in enumerate(names)
        if roles[place] == "trained" and kept[place].dtype.kind == "f"
    }
    norm = math.sqrt(math.fsum(float(np.vdot(part, part)) for part in learnt.values()))
    factor = min(1.0, rules.l2_norm_clip / norm) if norm else 1.0
    noise = np.random.default_rng()
    for place, part in learnt.items():
        moved = part * factor + noise.normal(0.0, rules.noise_multiplier * rules.l2_norm_clip, part.shape)
        kept[place] = (stored[names[place]] + moved).astype(after[place].dtype)
    return kept
