"""An optimizer's step as one program of XLA, on CPUs.

Keras writes the step as about ten operations for each weight, and each of them goes through memory. XLA makes one pass of them
(Adam on 12.9 million weights and one core: 29 ms in place of 99).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from node.engine import keras_parts

WORTHWHILE_NUMBERS = 1_000_000
"""With fewer numbers in the optimizer's state, compiling the step and calling it takes longer than it saves."""


def fuse(optimizer: Any) -> bool:
    """Make `optimizer.apply` such a program from now on, if that is worth it. Returns whether it was. The optimizer is built.

    It compiles when it is first called. If that fails, the caller calls `unfuse` and tries again.
    """
    state = sum(math.prod(variable.shape) for variable in optimizer.variables)
    scales = hasattr(optimizer, "inner_optimizer")  # it scales a float16 loss, and first checks that all is finite
    if state < WORTHWHILE_NUMBERS or scales or tf.config.list_logical_devices("GPU"):
        return False
    plain = optimizer.apply
    programs: dict[tuple[int, ...], Any] = {}

    def apply(gradients: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        if any(isinstance(gradient, tf.IndexedSlices) for gradient in gradients):  # of embeddings: few rows of many
            plain(gradients, trainable_variables)
            return
        variables = keras_parts.trained_by(optimizer) if trainable_variables is None else list(trainable_variables)
        key = tuple(map(id, variables))
        if key not in programs:
            programs[key] = tf.function(lambda *found: plain(list(found), variables), jit_compile=True)
        programs[key](*gradients)

    optimizer.apply = apply
    return True


def unfuse(optimizer: Any) -> None:
    """Undo `fuse`."""
    del optimizer.apply
