"""An optimizer's step as one program of XLA, on CPUs.

Keras writes it as some ten operations for each weight, each of which goes through memory: a fifth of the founding example's step.
XLA makes one pass of them (Adam on 12.9 million weights and one core: 29 ms in place of 99).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from node.engine import keras_parts

WORTHWHILE_NUMBERS = 1_000_000
"""State of an optimizer below which compiling, and calling what was compiled, takes longer than it saves."""


def fuse(optimizer: Any) -> bool:
    """Let `optimizer.apply` be such a program from now on, where that is worth it; whether it is. The optimizer is built.

    It compiles when it is first called. Whoever calls it calls `unfuse` where that fails, and calls again.
    """
    state = sum(math.prod(variable.shape) for variable in optimizer.variables)
    scales = hasattr(optimizer, "inner_optimizer")  # a loss of float16, and looks first whether all is finite
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
    """Take `fuse` back."""
    del optimizer.apply
