"""Arrays in JSON: an array comes back as it was, and anything else is refused with a reason."""

from __future__ import annotations

import json
import tracemalloc
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.gateway import json_arrays, tensorflow_inputs
from potluck.errors import InvalidRequest
from potluck.wire.tensors import DTYPES, to_numpy
from potluck.wire.values import Signature, TensorSpec

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b64", "z"]), inner, max_size=2),
    max_leaves=12,
)
DATATYPES = st.sampled_from([*DTYPES, "BYTES"])


def spec(datatype: str, name: str = "a") -> TensorSpec:
    return TensorSpec(name=name, datatype=datatype, shape=(-1, -1))


@given(DATATYPES, st.lists(st.integers(0, 3), max_size=4), st.integers(0, 2**32 - 1))
def test_every_array_comes_back(datatype: str, shape: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    if datatype == "BYTES":
        array = np.full(shape, "ä", object)
    else:
        array = random.integers(0, 2 if datatype == "BOOL" else 100, shape).astype(DTYPES[datatype])
    value = json.loads(json_arrays.written(array.tolist()))
    found = json_arrays.tensor(spec(datatype), value)
    # An empty list does not tell how many axes follow.
    cut = shape.index(0) + 1 if 0 in shape else len(shape)
    assert found.shape == tuple(shape[:cut])
    assert json_arrays.nested(found) == value if cut == len(shape) else found.shape[-1] == 0
    assert to_numpy(found).size == array.size


@given(DATATYPES, JSON)
def test_whatever_is_sent_is_an_array_or_refused(datatype: str, value: Any) -> None:
    with suppress(InvalidRequest):
        found = json_arrays.tensor(spec(datatype), value)
        assert to_numpy(found).shape == found.shape == json_arrays.shape_of(value)


@given(st.lists(st.sampled_from([*DTYPES, "BYTES"]), min_size=1, max_size=2), JSON)
def test_requests_become_tensors_or_are_refused(datatypes: list[str], value: Any) -> None:
    inputs = tuple(spec(datatype, name) for datatype, name in zip(datatypes, "az", strict=False))
    signature = Signature(inputs=inputs, outputs=())
    for read in (tensorflow_inputs.from_rows, tensorflow_inputs.from_columns):
        with suppress(InvalidRequest):
            found = read(signature, value)
            assert [tensor.name for tensor in found] == [one.name for one in inputs]
    with suppress(InvalidRequest):
        found = tensorflow_inputs.from_examples(signature, {"examples": value}, "classify")
        assert [tensor.name for tensor in found] == [one.name for one in inputs]


def test_a_long_text_among_numbers_takes_no_room_for_each_of_them() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest, match="is not of expected type: float"):
            json_arrays.tensor(spec("FP32"), ["a" * 10_000, *[1.0] * 10_000])
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_numbers_that_do_not_fit_are_refused() -> None:
    for datatype, value in (
        ("UINT8", [256]),
        ("INT8", [-129]),
        ("INT64", [2**63]),
        ("INT32", [0.5]),
        ("FP32", [2**24]),
        ("FP16", [70000.0]),
    ):
        with pytest.raises(InvalidRequest):
            json_arrays.tensor(spec(datatype), value)
    assert to_numpy(json_arrays.tensor(spec("UINT64"), [2**64 - 1])).tolist() == [2**64 - 1]
