"""Converts nested arrays in JSON to tensors and back, for TensorFlow Serving's REST and the plain routes.

Errors have TensorFlow Serving's words (`json_tensor.cc`), so that its users recognise them.
"""

from __future__ import annotations

import base64
import json
from itertools import chain
from typing import Any

import msgspec
import numpy as np

from potluck.errors import InvalidRequest
from potluck.wire.tensors import DTYPES, to_numpy
from potluck.wire.values import Tensor, TensorSpec

Array = np.ndarray[Any, Any]
BYTES_SUFFIX = "_bytes"
"""Text outputs whose name ends so are answered in base64: they may not be UTF-8."""
_B64 = "b64"
_TYPES: dict[str, str] = {
    "BOOL": "bool", "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64", "INT8": "int8",
    "INT16": "int16", "INT32": "int32", "INT64": "int64", "FP16": "half", "FP32": "float", "FP64": "double", "BYTES": "string",
}  # fmt: skip
"""TensorFlow's names of datatypes."""
_SHOWN = 60
_DEPTH_LIMIT = 32
"""Depth of nested lists: numpy has no more axes than this, or few more."""


def is_binary(value: object) -> bool:
    """Whether the value is a text in base64, `{"b64": "..."}`."""
    return isinstance(value, dict) and len(value) == 1 and isinstance(value.get(_B64), str)


def tensor(spec: TensorSpec, value: Any) -> Tensor:
    """`value`, a scalar or nested lists, as the input `spec`. Raises InvalidRequest, which names what does not fit."""
    if spec.datatype == "BYTES":
        shape = shape_of(value)
        flat: list[str | bytes] = []
        _gather(value, shape, 0, flat)
        return Tensor(name=spec.name, datatype="BYTES", shape=shape, data=flat)
    dtype = DTYPES[spec.datatype]
    try:
        found = _numbers(value)
        fits = found.dtype.kind in {"b": "b", "f": "iuf"}.get(dtype.kind, "iu")
        if not found.size and isinstance(value, list):
            fits = not _differs(value, found.shape, spec.datatype)  # an empty list has the dtype of floats
        with np.errstate(over="ignore"):  # values that are too large become infinite
            cast = found.astype(dtype) if fits else found
        if dtype.kind in "iu" and fits:
            fits = bool(np.array_equal(cast, found))
        elif dtype.kind == "f" and fits and found.dtype.kind != "f":
            fits = not found.size or int(np.abs(found.astype(np.float64)).max()) < 2 ** (np.finfo(dtype).nmant + 1)
        elif dtype.kind == "f" and fits:
            fits = bool((np.isfinite(cast) | ~np.isfinite(found)).all())
    except (ValueError, TypeError, OverflowError):
        fits = False
    if not fits:
        raise InvalidRequest(
            _differs(value, shape_of(value), spec.datatype)
            or f"JSON Value: {_shown(value)} cannot be {_TYPES[spec.datatype]}"
        )
    return Tensor(name=spec.name, datatype=spec.datatype, shape=cast.shape, data=cast.tobytes())


def _numbers(value: Any) -> Array:
    """The array of nested lists of numbers. Raises ValueError for other values before numpy sees them: with a text among them,
    numpy would give each number as much room as the longest text.
    """
    shape: list[int] = []
    level = [value]
    while (kinds := set(map(type, level))) == {list}:
        lengths = set(map(len, level))
        if len(lengths) > 1 or len(shape) == _DEPTH_LIMIT:
            raise ValueError
        shape.append(lengths.pop())
        level = list(chain.from_iterable(level))
    if not kinds <= {bool, int, float}:
        raise ValueError
    return np.asarray(level).reshape(shape)


def kind_of(value: object) -> str:
    """The kind of a JSON value, in TensorFlow Serving's words."""
    kinds = {bool: "Boolean", int: "Number", float: "Number", str: "String", dict: "Object", type(None): "Null"}
    return kinds.get(type(value), "Array")


def type_name(datatype: str) -> str:
    """TensorFlow's name of a datatype."""
    return _TYPES[datatype]


def nested(found: Tensor) -> Any:
    """The tensor's values in nested lists."""
    values = to_numpy(found).tolist()
    if found.datatype != "BYTES":
        return values
    return _texts(values, found.name.endswith(BYTES_SUFFIX))


def written(value: Any) -> bytes:
    """`value` as JSON, with NaN, Infinity and -Infinity as TensorFlow Serving writes them."""
    fast = msgspec.json.encode(value)
    if b"null" not in fast:  # msgspec writes null for numbers that are not finite
        return fast
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _texts(values: Any, binary: bool) -> Any:
    if isinstance(values, list):
        return [_texts(item, binary) for item in values]
    if not binary:
        return values.decode(errors="replace") if isinstance(values, bytes) else values
    raw = values if isinstance(values, bytes) else values.encode()
    return {_B64: base64.b64encode(raw).decode()}


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape, from the first item of each list."""
    sizes: list[int] = []
    while isinstance(value, list):
        sizes.append(len(value))
        if len(sizes) > _DEPTH_LIMIT:
            raise InvalidRequest(f"lists are nested deeper than {_DEPTH_LIMIT}")
        if not value:
            break
        value = value[0]
    return tuple(sizes)


def _gather(value: Any, shape: tuple[int, ...], level: int, flat: list[str | bytes]) -> None:
    if isinstance(value, list):
        if level >= len(shape) or len(value) != shape[level]:
            raise InvalidRequest(_unexpected(value, shape, level))
        for item in value:
            _gather(item, shape, level + 1, flat)
    elif level != len(shape):
        raise InvalidRequest(_too_shallow(value, shape, level))
    elif is_binary(value):
        try:
            flat.append(base64.b64decode(value[_B64], validate=True))
        except ValueError:  # and binascii.Error, which is one
            raise InvalidRequest("Unable to base64 decode") from None
    elif isinstance(value, str):
        flat.append(value)
    elif isinstance(value, dict):
        raise InvalidRequest(f"JSON Value: {_shown(value)} not formatted correctly for base64 data")
    else:
        raise InvalidRequest(_mistyped(value, "BYTES"))


def _differs(value: Any, shape: tuple[int, ...], datatype: str, level: int = 0) -> str:
    """What does not fit in a value that should have this shape and datatype; "": all fits."""
    if isinstance(value, list):
        if level >= len(shape) or len(value) != shape[level]:
            return _unexpected(value, shape, level)
        return next((why for item in value if (why := _differs(item, shape, datatype, level + 1))), "")
    if level != len(shape):
        return _too_shallow(value, shape, level)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    kind = DTYPES[datatype].kind
    if kind == "b" and isinstance(value, bool):
        return ""
    if kind == "f" and number:
        largest, digits = float(np.finfo(DTYPES[datatype]).max), np.finfo(DTYPES[datatype]).nmant + 1
        whole = isinstance(value, int) and abs(value) >= 2**digits
        if whole or (isinstance(value, float) and np.isfinite(value) and abs(value) > largest):
            return f"Cannot convert JSON value: {_shown(value)} to {_TYPES[datatype]} without loss of precision."
        return ""
    if kind in "iu" and number and isinstance(value, int):
        limits = np.iinfo(DTYPES[datatype])
        if limits.min <= value <= limits.max:
            return ""
    return _mistyped(value, datatype)


def _unexpected(value: list[Any], shape: tuple[int, ...], level: int) -> str:
    if level >= len(shape):
        return f"Encountered list at unexpected level: {level} expected < {len(shape)}"
    return f"Encountered list at unexpected size: {len(value)} at level: {level} expected size: {shape[level]}"


def _too_shallow(value: Any, shape: tuple[int, ...], level: int) -> str:
    return f"JSON Value: {_shown(value)} found at incorrect level: {level + 1} in the JSON DOM. Expected at level: {len(shape)}"


def _mistyped(value: Any, datatype: str) -> str:
    return f"JSON Value: {_shown(value)} Type: {kind_of(value)} is not of expected type: {_TYPES[datatype]}"


def _shown(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
