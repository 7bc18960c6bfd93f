"""Turns the tensors of a request into the arrays that a model takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from potluck.data.items import are_pixels
from potluck.errors import InvalidRequest
from potluck.wire import tensors
from potluck.wire.specs import matched, shape_for
from potluck.wire.values import Tensor, TensorSpec

Array = np.ndarray[Any, Any]


def fit(
    request: Sequence[Tensor],
    specs: Sequence[TensorSpec],
    dtypes: Sequence[np.dtype[Any]],
    pixel_scale: float = 1.0,
) -> list[Array]:
    """A request's arrays in the order of the model's inputs. Raises InvalidRequest, naming expected and given.

    Pixels (`potluck.data.items.are_pixels`) are multiplied by `pixel_scale`, like image files, and refused if that is 0.
    """
    arrays = []
    for spec, dtype, tensor in zip(specs, dtypes, matched(request, specs), strict=True):
        array = tensors.to_numpy(tensor).reshape(shape_for(tensor, spec))
        if pixel_scale != 1.0 and are_pixels(array, dtype):
            array = _scaled(array, pixel_scale, spec)
        arrays.append(array if array.dtype == dtype else _cast(array, dtype, spec, tensor.datatype))
    return arrays


def invented(
    specs: Sequence[TensorSpec], dtypes: Sequence[np.dtype[Any]], rows: int, value: Literal[0, 1] = 0
) -> list[Array]:
    """A made-up input of `rows` rows, with `value` everywhere (empty texts, or "1"); free dimensions are 1.

    A model may refuse it: only its users know what inputs it is for.
    """
    shapes = [(rows, *(1 if d < 0 else d for d in spec.shape[1:])) for spec in specs]
    return [
        np.full(shape, ("", "1")[value] if dtype.kind == "O" else value, dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]


def padded(array: Array, rows: int) -> Array:
    """The array padded to `rows` rows with copies of its last row. The model might not take zeros."""
    if len(array) == rows:
        return array
    found = np.empty((rows, *array.shape[1:]), array.dtype)
    found[: len(array)], found[len(array) :] = array, array[-1]
    return found


def _scaled(array: Array, pixel_scale: float, spec: TensorSpec) -> Array:
    if not pixel_scale:
        raise InvalidRequest(
            f"input '{spec.name}' takes {spec.datatype}, the request has pixels of 8 bits, and nothing says whether the model takes them "
            "as 0 to 255 or as 0 to 1: send floats, as in its training, or register it with image options that name the scale "
            "(ImageOptions(..., scale=...), --image HxW:SCALE)"
        )
    found: Array = array * np.float32(pixel_scale)
    return found


def _cast(array: Array, dtype: np.dtype[Any], spec: TensorSpec, datatype: str) -> Array:
    """Cast numbers to floats, and whole numbers to types that can hold them. Raises InvalidRequest."""
    if array.dtype.kind in "fiub" and dtype.kind == "f":
        return array.astype(dtype)
    if array.dtype.kind in "iub" and dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if not array.size or (int(array.min()) >= limits.min and int(array.max()) <= limits.max):
            return array.astype(dtype)
    raise InvalidRequest(
        f"input '{spec.name}' takes {spec.datatype}, but the request has {datatype}, which cannot be cast without loss"
    )
