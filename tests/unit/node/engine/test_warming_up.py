"""Before a replica is ready, it has run every batch size that it will get, or as many as there was time for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from node.engine.fitting import Array
from node.engine.replicas import LoadedReplicas, warm_up
from potluck.errors import InvalidModel, ModelFailed, OutOfMemory, PotluckError
from potluck.wire.tensors import from_numpy, to_numpy
from potluck.wire.values import Signature, TensorSpec


class Model:
    """Takes batches of sizes as `size` says, in one second of its clock per row; fails above `breaks_at` rows, and for
    values that it does not take.
    """

    def __init__(
        self,
        size: Callable[[int], int],
        width: int = 4,
        breaks_at: int = 1000,
        error: type[PotluckError] = ModelFailed,
        takes: tuple[float, ...] = (),
    ) -> None:
        spec = TensorSpec(name="x", datatype="FP32", shape=(-1, width))
        self.signature = Signature(inputs=(spec,), outputs=(spec,))
        self.dtypes = (np.dtype(np.float32),)
        self.rows_at_once = size
        self.sizes: list[int] = []
        self.now = 0.0
        self._breaks_at = breaks_at
        self._error = error
        self._takes = takes

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        rows = len(arrays[0])
        if rows > self._breaks_at:
            raise self._error("the model failed on this input: it is too long")
        if self._takes and not np.isin(arrays[0], self._takes).all():
            raise self._error("the model failed on this input: it is not in the vocabulary")
        self.sizes.append(rows)
        self.now += rows
        return [arrays[0]]


def even(rows: int) -> int:
    return rows + rows % 2


def test_every_size_is_run_once() -> None:
    model = Model(even)
    assert warm_up(model, 9, 1000.0, lambda: model.now) == 9
    assert model.sizes == [2, 4, 6, 8, 10]
    whole = Model(lambda rows: 32)  # a model that takes only batches of one size
    assert warm_up(whole, 64, 1000.0, lambda: whole.now) == 64
    assert whole.sizes == [32]


def test_when_time_is_up_it_says_how_far_it_came() -> None:
    model = Model(even)
    assert warm_up(model, 64, 10.0, lambda: model.now) == 6
    assert model.sizes == [2, 4, 6]
    slow = Model(even)
    assert warm_up(slow, 64, 0.0, lambda: slow.now) == 2  # at least one: it must be known to run


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
    replicas = LoadedReplicas(lambda model_format, path: Model(lambda rows: rows, breaks_at=2, error=OutOfMemory))
    replicas.load("r", "keras", Path("model"), 2, 1.0)
    outcomes = replicas.infer("r", [(from_numpy("x", np.zeros((rows, 4), np.float32)),) for rows in (1, 2, 3, 1)])
    assert [outcome.error.code if outcome.error else "" for outcome in outcomes] == ["", "", "out_of_memory", ""]


def test_what_is_invented_for_a_model_proves_nothing_against_it() -> None:
    assert warm_up(Model(even, takes=(1.0,)), 9, 1000.0) == 9  # no zeros, then
    assert warm_up(Model(even, takes=(7.0,)), 9, 1000.0) == 0
    with pytest.raises(InvalidModel, match="not in the vocabulary"):  # an error that no other value would avoid
        warm_up(Model(even, takes=(7.0,), error=InvalidModel), 9, 1000.0)


def test_a_batch_is_filled_up_with_a_row_that_it_has() -> None:
    replicas = LoadedReplicas(lambda model_format, path: Model(even, takes=(7.0, 8.0)))
    replicas.load("r", "keras", Path("model"), 4, 1.0)
    rows = np.array([[7.0] * 4, [7.0] * 4, [8.0] * 4], np.float32)
    (outcome,) = replicas.infer("r", [(from_numpy("x", rows),)])
    assert outcome.error is None
    np.testing.assert_array_equal(to_numpy(outcome.outputs[0]), rows)


def test_who_is_at_fault_is_open_until_something_has_run() -> None:
    replicas = LoadedReplicas(lambda model_format, path: Model(even, takes=(7.0,)))
    replicas.load("r", "keras", Path("model"), 4, 1.0)

    def said(value: float) -> str:
        (outcome,) = replicas.infer("r", [(from_numpy("x", np.full((1, 4), value, np.float32)),)])
        return outcome.error.message if outcome.error is not None else ""

    assert said(3.0).endswith("the model itself may be at fault)")
    assert said(7.0) == ""
    assert said(3.0) == "the model failed on this input: it is not in the vocabulary"
