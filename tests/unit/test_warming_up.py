"""Before a replica is ready it has run every batch size that it will be given, or those for which there was time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from node.engine.fitting import Array
from node.engine.replicas import warm_up
from potluck.errors import InvalidModel, InvalidRequest
from potluck.messages import Signature, TensorSpec


class Model:
    """Takes batches of sizes as `size` says, in a second a row of its clock; fails beyond `breaks_at` rows."""

    def __init__(self, size: Callable[[int], int], width: int = 4, breaks_at: int = 1000) -> None:
        spec = TensorSpec(name="x", datatype="FP32", shape=(-1, width))
        self.signature = Signature(inputs=(spec,), outputs=(spec,))
        self.dtypes = (np.dtype(np.float32),)
        self.rows_at_once = size
        self.sizes: list[int] = []
        self.now = 0.0
        self._breaks_at = breaks_at

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        rows = len(arrays[0])
        if rows > self._breaks_at:
            raise InvalidRequest("the model failed on this input: it is too long")
        self.sizes.append(rows)
        self.now += rows
        return [arrays[0]]


def even(rows: int) -> int:
    return rows + rows % 2


def test_every_size_is_run_once() -> None:
    model = Model(even)
    assert warm_up(model, 9, 1000.0, lambda: model.now) == 9
    assert model.sizes == [2, 4, 6, 8, 10]
    whole = Model(lambda rows: 32)  # a model that takes batches of one size
    assert warm_up(whole, 64, 1000.0, lambda: whole.now) == 64
    assert whole.sizes == [32]


def test_when_time_is_up_it_says_how_far_it_came() -> None:
    model = Model(even)
    assert warm_up(model, 64, 10.0, lambda: model.now) == 6
    assert model.sizes == [2, 4, 6]
    slow = Model(even)
    assert warm_up(slow, 64, 0.0, lambda: slow.now) == 2  # one at least: it must be known to run


def test_a_model_that_cannot_run_is_refused_unless_its_sizes_are_free() -> None:
    with pytest.raises(InvalidModel, match=r"cannot run: .*too long"):
        warm_up(Model(even, breaks_at=3), 64, 1000.0)
    free = Model(even, width=-1, breaks_at=1)
    assert warm_up(free, 64, 1000.0) == 0
