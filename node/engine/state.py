"""What of a model is trained, and what is state: how each weight travels, and which state a step changes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import keras

from node.engine import keras_parts
from potluck.weights.updates import Role

READS = frozenset({"ReadVariableOp", "ResourceGather", "ResourceGatherNd", "VariableShape"})
"""Operations that leave a variable as it is."""


def roles(model: Any) -> list[Role]:
    """Of `model.weights`, in order.

    A mean of several nodes' state is of the same kind where it is a statistic: that of BatchNormalization, and what a layer says is
    one (`add_weight(..., aggregation="mean")`). Of all else (counters, vectors of length 1, codes) only one node's is sure to be.
    """
    statistics = {
        id(variable)
        for layer in keras_parts.all_layers(model)
        if isinstance(layer, keras.layers.BatchNormalization)
        for variable in layer.non_trainable_variables
    }

    def role(weight: Any) -> Role:
        if id(weight) in statistics or (getattr(weight, "aggregation", "none") == "mean" and not weight.trainable):
            return "mean"
        if getattr(weight, "overwrite_with_gradient", False):  # scales of 8-bit floats: the "gradient" is the new value
            return "mean"
        return "trained" if weight.trainable else "value"

    return [role(weight) for weight in model.weights]


def momentum(model: Any) -> float:
    """Of the model's optimizer, where it adds up past steps; Adam and its like divide by their size, so theirs makes none longer."""
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    lengthens = isinstance(optimizer, keras.optimizers.SGD | keras.optimizers.RMSprop)
    return float(optimizer.momentum or 0.0) if lengthens else 0.0


def constrain(model: Any) -> None:
    """Let each trained weight's constraint hold, as Keras does after a step: an outer step, or rounding, may have led out of it."""
    for variable in model.trainable_variables:
        if (constraint := getattr(variable, "constraint", None)) is not None:
            variable.assign(constraint(variable))


def changing(graph: Any, variables: Iterable[Any]) -> list[Any]:
    """Those of the variables that a traced function (its `graph`) writes, or may write."""
    inside = {id(outer): inner for outer, inner in graph.captures}
    return [
        variable
        for variable in variables
        if (handle := inside.get(id(variable.value.handle))) is not None
        and any(_writes(operation, handle) for operation in handle.consumers())
    ]


def _writes(operation: Any, handle: Any) -> bool:
    if operation.type in READS:
        return False
    try:  # what calls functions (loops, branches) says which of its inputs these only read
        only_read = operation.get_attr("_read_only_resource_inputs")
    except ValueError:
        return True
    return any(given is handle and place not in only_read for place, given in enumerate(operation.inputs))


def trained_bytes(model: Any) -> int:
    """Of the weights that are trained, as float32."""
    return sum(
        4 * math.prod(weight.shape)
        for weight, role in zip(model.weights, roles(model), strict=True)
        if role == "trained"
    )
