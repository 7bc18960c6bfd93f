"""What a model should learn from data shards: a target for each output, and the weight of each item in the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from node.engine import keras_models
from node.engine.inputs import Source
from node.engine.shards import Array, ShardPart
from node.engine.targets import Labels, encode, item_weights, labels_for
from potluck.errors import InvalidData, InvalidRequest
from potluck.wording import counted

IN_ORDER = "y_"
"""Targets named `y_0`, `y_1`, ... are those of the outputs in their order."""


@dataclass(frozen=True)
class Truth:
    """`targets` and their `labels` in the order of the model's outputs; `weights` of the items, or None."""

    model: Any
    labels: tuple[Labels, ...]
    targets: tuple[Array, ...]
    weights: Array | None

    def __len__(self) -> int:
        return len(self.targets[0])

    @property
    def columns(self) -> list[Array]:
        """The targets, and then the weights if there are any."""
        return [*self.targets, *([] if self.weights is None else [self.weights])]

    def packed(self, columns: Sequence[Any]) -> tuple[Any, ...]:
        """`columns` of some items as Keras takes them after the inputs: (targets,) or (targets, weights)."""
        count = len(self.targets)
        return (keras_models.packed_targets(self.model, columns[:count]), *columns[count:])


def truth_of(
    source: Source, parts: Sequence[ShardPart], purpose: str, class_weight: Mapping[str, float] | None = None
) -> Truth:
    """The truth of all items of the parts. `purpose` says what they are for, as in "to train on".

    Raises InvalidData, InvalidRequest, InvalidModel.
    """
    model, classes = source.model, source.data.classes
    stored = source.targets(parts)
    if not stored:
        raise InvalidData(f"the data set has no targets {purpose}: add it with class folders, or name its --target")
    targets = by_output(model, stored)
    shapes = [tuple(output.shape) for output in model.outputs]
    losses = keras_models.output_losses(model)
    labels = tuple(
        labels_for(loss, shape, target.ndim, classes)
        for loss, shape, target in zip(losses, shapes, targets, strict=True)
    )
    encoded = tuple(encode(*each) for each in zip(targets, labels, shapes, strict=True))
    weights = source.weights(parts)
    if class_weight:
        if len(encoded) > 1:
            raise InvalidRequest(
                f"class_weight is for models with one output, and this one has {len(encoded)}: give each item a weight instead"
            )
        if weights is not None:
            raise InvalidRequest(
                "class_weight and the weights of items in the data cannot be used together (nor does Keras): "
                "multiply them into the data's own"
            )
        weights = item_weights(encoded[0], labels[0], classes, class_weight)
    if weights is not None:
        weights = weights.astype(np.float32, copy=False)
        rank = max(map(len, shapes)) - 1
        if weights.ndim == 1 < rank:  # each step of a sequence has the weight of its item
            weights = weights.reshape(-1, *[1] * (rank - 1))
    return Truth(model, labels, encoded, weights)


def by_output(model: Any, stored: dict[str, Array]) -> list[Array]:
    """The targets in the order of the model's outputs. Raises InvalidRequest if they do not fit."""
    names = keras_models.output_names(model)
    if len(names) == 1:
        if len(stored) == 1:
            return list(stored.values())
        if all(array.ndim == 1 for array in stored.values()):  # columns of a table: one target of several values
            return [np.stack(list(stored.values()), axis=-1)]
    if len(stored) == len(names):
        if set(stored) == set(names):
            return [stored[name] for name in names]
        if set(stored) == {f"{IN_ORDER}{i}" for i in range(len(names))}:
            return [stored[f"{IN_ORDER}{i}"] for i in range(len(names))]
    raise InvalidRequest(
        f"the model has {counted(len(names), 'output')} ({', '.join(names)}), and the data {counted(len(stored), 'target')} "
        f"({', '.join(stored)}): give a target for each output, by its name"
    )
