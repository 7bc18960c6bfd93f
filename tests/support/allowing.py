"""The module `own_code`, as on nodes that allow it: on PYTHONPATH, under that name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SUPPORT = Path(__file__).parent
ROWS = 32
X = np.random.default_rng(0).normal(size=(ROWS, 6)).astype(np.float32)
Y = X.mean(axis=1)


@contextmanager
def own_code() -> Iterator[Any]:
    """The module. Processes that start before the block ends find it, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{SUPPORT}:{SUPPORT.parents[1]}")
        patch.syspath_prepend(str(SUPPORT))
        import own_code

        yield own_code
        sys.modules.pop("own_code", None)


def compiled(model: Any, loss: Any = "mse", metrics: Any = ("mae",)) -> Any:
    """A model for six numbers, built and compiled."""
    import keras

    model(X[:1])
    model.compile(keras.optimizers.SGD(0.05), loss, metrics=list(metrics))
    return model


def dense(*layers: Any, loss: Any = "mse", metrics: Any = ("mae",)) -> Any:
    """`layers` and one unit, with the same initial weights each time."""
    import keras

    keras.utils.set_random_seed(5)
    return compiled(keras.Sequential([keras.Input((6,)), *layers, keras.layers.Dense(1)]), loss, metrics)
