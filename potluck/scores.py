"""Class scores among a model's outputs, in the form that every way to ask shows. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def of_classes(values: np.ndarray[Any, Any], classes: Sequence[str]) -> tuple[np.ndarray[Any, Any], tuple[str, ...]]:
    """A score for each class on the last axis, and the class labels; no labels where the model's classes do not fit.

    If a model with two classes has one score, that is the second class's (a sigmoid); the first class gets the rest.
    """
    if values.shape[-1] == 1 and len(classes) == 2:
        second = values.astype(np.float64)
        values = np.concatenate([1.0 - second, second], axis=-1)
    return values, tuple(classes) if len(classes) == values.shape[-1] else ()
