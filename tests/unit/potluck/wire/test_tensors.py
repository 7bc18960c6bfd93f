"""Tensors <-> numpy, and data that do not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from potluck.errors import InvalidRequest
from potluck.wire import codec
from potluck.wire.questions import Inferred
from potluck.wire.tensors import DTYPES, as_lists, datatype_of, from_numpy, packed, to_numpy, unpacked
from potluck.wire.values import BlobRef, Tensor

any_array = st.sampled_from(list(DTYPES.values())).flatmap(
    lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
)


@given(any_array)
def test_every_array_survives_as_bytes_and_as_lists(array: np.ndarray[Any, Any]) -> None:
    tensor = from_numpy("x", array)
    assert isinstance(tensor.data, bytes)
    for sent in (tensor, as_lists(tensor), from_numpy("x", array, copy=False)):
        back = to_numpy(sent)
        assert back.dtype == array.dtype
        assert back.shape == array.shape
        np.testing.assert_array_equal(back, array)


@given(any_array)
def test_every_array_survives_both_encodings(array: np.ndarray[Any, Any]) -> None:
    tensor = from_numpy("x", array)
    for encoding, sent in (("msgpack", tensor), ("json", as_lists(tensor))):
        message, _ = codec.decode(codec.encode(Inferred(model="m", outputs=(sent,)), encoding))  # type: ignore[arg-type]
        assert isinstance(message, Inferred)
        # JSON has neither infinity nor NaN: both are null there.
        lost = encoding == "json" and array.dtype.kind == "f"
        expected = np.where(np.isfinite(array), array, np.nan) if lost else array
        np.testing.assert_array_equal(to_numpy(message.outputs[0]), expected)


def test_big_endian_and_strided_arrays_are_sent_little_endian_in_c_order() -> None:
    array = np.arange(12, dtype=">f4").reshape(3, 4).T
    tensor = from_numpy("x", array)
    assert tensor.data == array.astype("<f4").tobytes(order="C") == bytes(from_numpy("x", array, copy=False).data)
    np.testing.assert_array_equal(to_numpy(tensor), array)


def test_text_travels_as_a_list() -> None:
    tensor = from_numpy("t", np.array([["a", "b"], ["c", "é"]]))
    assert tensor.datatype == "BYTES"
    assert tensor.data == ["a", "b", "c", "é"]
    assert to_numpy(tensor).tolist() == [["a", "b"], ["c", "é"]]
    assert to_numpy(Tensor(name="t", datatype="BYTES", shape=(2,), data=[["a"], ["b"]])).tolist() == ["a", "b"]


def test_nested_lists_are_welcome() -> None:
    tensor = Tensor(name="x", datatype="FP32", shape=(2, 2), data=[[1, 2], [3, 4.5]])
    np.testing.assert_array_equal(to_numpy(tensor), np.array([[1, 2], [3, 4.5]], dtype="<f4"))


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "told"),
    [
        ("FP32", (2,), b"1234", "is 8 bytes, but data has 4"),
        ("FP32", (2,), [1.0], "needs 2 values, but data has 1"),
        ("FP32", (2, 2), [[1.0, 2.0], [3.0]], "does not fit FP32"),
        ("UINT8", (1,), [300], "does not fit UINT8"),
        ("UINT8", (1,), [-1], "does not fit UINT8"),
        ("FP32", (1,), ["a"], "does not fit FP32"),
        ("FP32", (1,), [{"a": 1}], "does not fit FP32"),
        ("FP32", (1, 1), [["1.5"]], "it has texts"),
        ("INT32", (2,), [" 5", 1], "it has texts"),
        ("INT32", (1,), [b"5"], "it has texts"),
        ("FP32", (2,), [[1.0], [1e39]], "a number is too large"),
        ("FP16", (1,), [70_000], "a number is too large"),
        ("FLOAT", (1,), [1.0], "unknown datatype 'FLOAT'"),
        ("BYTES", (1,), b"a", "must be a list of strings"),
        ("FP32", (1,), BlobRef(sha256="a" * 64, size=4), "is a blob"),
        ("FP32", (2**40, 2**40), b"", "too large"),
        ("FP32", (2**53,) * 400, b"", "too large"),
        ("FP32", (0,) * 70, [], "too large"),
    ],
)
def test_data_that_does_not_fit_is_named(datatype: str, shape: tuple[int, ...], data: Any, told: str) -> None:
    with pytest.raises(InvalidRequest, match=told) as refused:
        to_numpy(Tensor(name="pixels", datatype=datatype, shape=shape, data=data))
    assert "tensor 'pixels'" in str(refused.value)


def test_what_is_infinite_stays_so_and_null_is_no_number() -> None:
    data: list[Any] = [float("inf"), None, 1.0]
    found = to_numpy(Tensor(name="t", datatype="FP32", shape=(3,), data=data))
    assert found[0] == np.inf
    assert np.isnan(found[1])


def test_dtypes_that_no_client_could_read_are_refused() -> None:
    for dtype in (np.complex64, "datetime64[s]", np.longdouble):
        with pytest.raises(InvalidRequest, match="cannot be sent"):
            datatype_of(np.dtype(dtype))


@given(st.lists(st.binary(max_size=5), max_size=4))
def test_texts_and_bytes_survive_as_bytes_alone(items: list[bytes]) -> None:
    tensor = from_numpy("x", np.array([*items, None], object)[:-1])
    assert {type(item) for item in tensor.data} <= {str} or tensor.data == items  # type: ignore[union-attr]
    raw = packed(tensor)
    assert unpacked("x", "BYTES", raw) == tensor.data
    for end in range(1, len(raw)):
        try:
            found = unpacked("x", "BYTES", raw[:end])
        except InvalidRequest as error:
            assert "goes beyond" in error.message  # noqa: PT017 - some ends are those of an item
        else:
            assert len(found) < len(items)


@given(any_array)
def test_numbers_as_bytes_alone_are_their_memory(array: np.ndarray[Any, Any]) -> None:
    tensor = as_lists(from_numpy("x", array))
    assert packed(tensor) == array.tobytes() == unpacked("x", tensor.datatype, array.tobytes())
