"""Which weights of a model are trained, and which are state: how each one travels, and which state a step changes."""

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
    """The roles of `model.weights`, in order.

    The state of several nodes can be averaged only if it is a statistic: that of BatchNormalization, and state that a layer declares
    as one (`add_weight(..., aggregation="mean")`). Of other state (counters, vectors of length 1, codes), one node's is taken.
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
    """The momentum of an optimizer that adds up past steps. Adam and similar ones divide by the size, so theirs adds no length."""
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    lengthens = isinstance(optimizer, keras.optimizers.SGD | keras.optimizers.RMSprop)
    return float(optimizer.momentum or 0.0) if lengthens else 0.0


def constrain(model: Any) -> None:
    """Apply each trained weight's constraint, as Keras does after a step: an outer step or rounding may have broken it."""
    for variable in model.trainable_variables:
        if (constraint := getattr(variable, "constraint", None)) is not None:
            variable.assign(constraint(variable))


def changing(graph: Any, variables: Iterable[Any]) -> list[Any]:
    """The variables that a traced function (its `graph`) writes, or may write."""
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
    """The size of the trained weights as float32."""
    return sum(
        4 * math.prod(weight.shape)
        for weight, role in zip(model.weights, roles(model), strict=True)
        if role == "trained"
    )
