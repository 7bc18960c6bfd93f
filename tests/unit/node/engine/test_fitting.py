"""A request's data become the model's input, or are refused."""

from __future__ import annotations

import numpy as np
import pytest

from node.engine.fitting import fit
from potluck.errors import InvalidRequest
from potluck.wire.values import Tensor, TensorSpec

OBJECT = np.dtype(object)


def texts(shape: tuple[int, ...], *data: str) -> Tensor:
    return Tensor(name="x", datatype="BYTES", shape=shape, data=list(data))


def test_a_list_of_texts_fits_a_model_whose_items_are_lists_of_one() -> None:
    one = TensorSpec(name="x", datatype="BYTES", shape=(-1, 1))
    for tensor in (texts((2,), "a", "b"), texts((2, 1), "a", "b")):
        [array] = fit([tensor], [one], [OBJECT])
        assert array.tolist() == [["a"], ["b"]]
    two = TensorSpec(name="x", datatype="BYTES", shape=(-1, 2))
    with pytest.raises(InvalidRequest, match="takes BYTES of shape"):
        fit([texts((2,), "a", "b")], [two], [OBJECT])
    number = Tensor(name="x", datatype="FP32", shape=(2,), data=[1.0, 2.0])
    with pytest.raises(InvalidRequest, match="takes FP32 of shape"):
        fit([number], [TensorSpec(name="x", datatype="FP32", shape=(-1, 1))], [np.dtype(np.float32)])
