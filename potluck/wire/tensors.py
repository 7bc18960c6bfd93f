"""Tensors on the wire <-> numpy, with the datatypes of the Open Inference Protocol (V2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec.structs import replace

from potluck.errors import InvalidRequest
from potluck.wire.questions import Inferred, JobEnded
from potluck.wire.values import AXES_LIMIT, Tensor
from potluck.wording import counted

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
_LENGTH_BYTES = 4
_DATATYPES = {(dtype.kind, dtype.itemsize): name for name, dtype in DTYPES.items()}


def datatype_of(dtype: np.dtype[Any]) -> str:
    """The protocol's name for a numpy dtype; BYTES for text. Raises InvalidRequest for a dtype that it cannot carry."""
    if dtype.kind in "SUO":
        return "BYTES"
    try:
        return _DATATYPES[(dtype.kind, dtype.itemsize)]
    except KeyError:
        raise InvalidRequest(
            f"arrays of dtype {dtype} cannot be sent: use one of {', '.join(DTYPES)} or text"
        ) from None


def from_numpy(name: str, array: np.ndarray[Any, Any], *, copy: bool = True) -> Tensor:
    """A tensor with inline data: numbers as bytes; text as a list of strings, or of bytes where any text is not UTF-8.

    Without `copy`, numbers are a memoryview: of the array itself, if its memory has the wire's layout.
    """
    datatype = datatype_of(array.dtype)
    if datatype == "BYTES":
        flat = [item if isinstance(item, bytes) else str(item).encode() for item in array.ravel().tolist()]
        return Tensor(name=name, datatype=datatype, shape=array.shape, data=_as_texts(flat))
    whole = np.ascontiguousarray(array, dtype=DTYPES[datatype])
    data: Any = whole.tobytes() if copy else whole.reshape(-1).view(np.uint8).data
    return Tensor(name=name, datatype=datatype, shape=array.shape, data=data)


def plain(tensor: Tensor) -> Tensor:
    """The same tensor, with a list (flat or nested) turned into bytes, or for texts into a flat list.

    Raises InvalidRequest where data, datatype and shape do not fit together.
    """
    array = to_numpy(tensor)
    if not isinstance(tensor.data, list):
        return tensor
    return replace(tensor, data=array.ravel().tolist() if tensor.datatype == "BYTES" else array.tobytes())


def as_lists(tensor: Tensor) -> Tensor:
    """The same tensor with its data as a flat list, for answers in JSON."""
    if isinstance(tensor.data, bytes):
        return Tensor(
            name=tensor.name, datatype=tensor.datatype, shape=tensor.shape, data=to_numpy(tensor).ravel().tolist()
        )
    return tensor


def readable(message: Inferred | JobEnded) -> Inferred | JobEnded:
    """The same message with its tensors as lists, for JSON."""
    return replace(message, outputs=tuple(as_lists(tensor) for tensor in message.outputs))


def to_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The array with `tensor.shape`; read-only when the data came as bytes.

    Raises InvalidRequest for an unknown datatype, for data that do not fit the shape, and for a blob reference: the caller must pull
    the blob first.
    """
    label, data, count = tensor.name, tensor.data, _count(tensor)
    if tensor.datatype == "BYTES":
        if not isinstance(data, list):
            raise InvalidRequest(f"tensor '{label}': BYTES data must be a list of strings")
        flat = _flatten(data)
        if not all(isinstance(item, str | bytes) for item in flat):
            raise InvalidRequest(f"tensor '{label}': BYTES data must be a list of strings, but it has other values")
        array = np.empty(len(flat), dtype=object)
        array[:] = flat
        return _shaped(array, tensor)
    if tensor.datatype not in DTYPES:
        raise InvalidRequest(
            f"tensor '{label}': unknown datatype '{tensor.datatype}': use one of {', '.join(DTYPES)}, BYTES"
        )
    dtype = DTYPES[tensor.datatype]
    if isinstance(data, bytes | memoryview):  # a memoryview is of a file, in an engine
        if len(data) != count * dtype.itemsize:
            raise InvalidRequest(
                f"tensor '{label}': {tensor.datatype} of shape {list(tensor.shape)} is {counted(count * dtype.itemsize, 'byte')}, "
                f"but data has {len(data):,}"
            )
        return _shaped(np.frombuffer(data, dtype=dtype), tensor)
    if isinstance(data, list):
        try:
            with np.errstate(over="ignore"):  # checked below
                array = np.asarray(data, dtype=dtype)
            # A text could be read as a number; and without a dtype, numpy would make room for the longest text in every place.
            if _has_text(data):
                raise ValueError("it has texts")
            exact = dtype.kind == "f" or not array.size or np.asarray(data).dtype.kind in "iub"
        except (ValueError, TypeError, OverflowError) as error:
            raise InvalidRequest(f"tensor '{label}': data does not fit {tensor.datatype}: {error}") from error
        if (
            dtype.kind == "f"
            and (over := np.isinf(array)).any()
            and np.isfinite(np.asarray(data, np.float64)[over]).any()
        ):
            raise InvalidRequest(f"tensor '{label}': data does not fit {tensor.datatype}: a number is too large")
        if not exact and not np.array_equal(array, np.asarray(data)):  # numpy would cut off what does not fit
            raise InvalidRequest(f"tensor '{label}': data does not fit {tensor.datatype}: it has other numbers")
        return _shaped(array, tensor)
    raise InvalidRequest(f"tensor '{label}': its data is a blob, which must be pulled first")


def packed(tensor: Tensor) -> bytes:
    """The data of a tensor as bytes (not for a blob): little-endian in C order; each item of BYTES after its length in 4 bytes
    (binary tensor extension of the Open Inference Protocol). Raises InvalidRequest as `to_numpy` does.
    """
    if isinstance(tensor.data, bytes):
        return tensor.data
    array = to_numpy(tensor)
    if tensor.datatype != "BYTES":
        return array.tobytes()
    items = [item if isinstance(item, bytes) else str(item).encode() for item in array.ravel().tolist()]
    return b"".join([len(item).to_bytes(_LENGTH_BYTES, "little") + item for item in items])


def unpacked(name: str, datatype: str, data: bytes) -> bytes | list[Any]:
    """The data of a tensor from the bytes of `packed`: bytes; for BYTES a list of texts, or of bytes where any text is not UTF-8.

    Raises InvalidRequest for BYTES that are cut off.
    """
    if datatype != "BYTES":
        return data
    items: list[bytes] = []
    at = 0
    while at < len(data):
        start = at + _LENGTH_BYTES
        at = start + int.from_bytes(data[at:start], "little")
        if at > len(data):
            raise InvalidRequest(
                f"tensor '{name}': an item of BYTES goes beyond the tensor's {counted(len(data), 'byte')}"
            )
        items.append(data[start:at])
    return _as_texts(items)


def _as_texts(items: list[bytes]) -> list[Any]:
    try:
        return [item.decode() for item in items]
    except UnicodeDecodeError:
        return list(items)


def _count(tensor: Tensor) -> int:
    """How many values its shape has. Raises InvalidRequest for more than can be."""
    if len(tensor.shape) <= AXES_LIMIT and (count := math.prod(tensor.shape)) < 2**63:
        return count
    raise InvalidRequest(
        f"tensor '{tensor.name}': it cannot have shape {list(tensor.shape[:9])}{'...' if len(tensor.shape) > 9 else ''}: that is too large"
    )


def _shaped(array: np.ndarray[Any, Any], tensor: Tensor) -> np.ndarray[Any, Any]:
    count = _count(tensor)
    if array.size != count:
        raise InvalidRequest(
            f"tensor '{tensor.name}': shape {list(tensor.shape)} needs {counted(count, 'value')}, but data has {array.size:,}"
        )
    try:
        return array.reshape(tensor.shape)
    except ValueError as error:  # more dimensions than numpy has, or an empty dimension beside one that is too long
        raise InvalidRequest(
            f"tensor '{tensor.name}': it cannot have shape {list(tensor.shape)[:9]}: {error}"
        ) from error


def _has_text(data: list[Any]) -> bool:
    """Whether there is a text in the list or in lists inside it."""
    kinds = set(map(type, data))
    return bool(kinds & {str, bytes}) or (
        list in kinds and any(_has_text(item) for item in data if isinstance(item, list))
    )


def _flatten(data: list[Any]) -> list[Any]:
    """Everything in the list and the lists inside it, in order, at any depth. Each item is looked at once."""
    if list not in set(map(type, data)):
        return data
    found: list[Any] = []
    open_lists = [iter(data)]
    while open_lists:
        for item in open_lists[-1]:
            if isinstance(item, list):
                open_lists.append(iter(item))
                break
            found.append(item)
        else:
            open_lists.pop()
    return found


def shape_text(shape: Sequence[int | None]) -> str:
    """The shape of one item for people, from a shape with the batch axis: `(any, 4)`."""
    return f"({', '.join('any' if size is None else str(size) for size in shape[1:])})"
