"""Before a replica is ready it has run every batch size that it will be given, or those for which there was time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from node.engine.fitting import Array
from node.engine.replicas import Replicas, warm_up
from potluck.errors import InvalidModel, InvalidRequest, OutOfMemory, PotluckError
from potluck.messages import Signature, TensorSpec
from potluck.tensors import from_numpy


class Model:
    """Takes batches of sizes as `size` says, in a second a row of its clock; fails beyond `breaks_at` rows."""

    def __init__(
        self,
        size: Callable[[int], int],
        width: int = 4,
        breaks_at: int = 1000,
        error: type[PotluckError] = InvalidRequest,
    ) -> None:
        spec = TensorSpec(name="x", datatype="FP32", shape=(-1, width))
        self.signature = Signature(inputs=(spec,), outputs=(spec,))
        self.dtypes = (np.dtype(np.float32),)
        self.rows_at_once = size
        self.sizes: list[int] = []
        self.now = 0.0
        self._breaks_at = breaks_at
        self._error = error

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        rows = len(arrays[0])
        if rows > self._breaks_at:
            raise self._error("the model failed on this input: it is too long")
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


def test_sizes_for_which_there_is_no_memory_are_left_cold() -> None:
    assert warm_up(Model(even, breaks_at=6, error=OutOfMemory), 64, 1000.0) == 6
    with pytest.raises(OutOfMemory):
        warm_up(Model(even, breaks_at=1, error=OutOfMemory), 64, 1000.0)


def test_requests_that_do_not_fit_together_run_one_by_one() -> None:
    replicas = Replicas(lambda model_format, path: Model(lambda rows: rows, breaks_at=2, error=OutOfMemory))
    replicas.load("r", "keras", Path("model"), 2, 1.0)
    outcomes = replicas.infer("r", [(from_numpy("x", np.zeros((rows, 4), np.float32)),) for rows in (1, 2, 3, 1)])
    assert [outcome.error.code if outcome.error else "" for outcome in outcomes] == ["", "", "out_of_memory", ""]
