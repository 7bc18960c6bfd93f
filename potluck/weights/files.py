"""Tensors in a safetensors file, written and read piece by piece (https://github.com/huggingface/safetensors).

The safetensors library is not used, for two reasons. Here, the same tensors give the same bytes on every machine, so a file's
hash tells whether two machines hold the same weights. And nobody needs memory for a whole file.
"""

from __future__ import annotations

import io
import json
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from potluck.errors import InvalidModel
from potluck.wire.values import AXES_LIMIT

Array = np.ndarray[Any, Any]
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("<u1"),
    "I8": np.dtype("<i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH = struct.Struct("<Q")
_HEADER_LIMIT_BYTES = 64 * 2**20
_ALIGNMENT = 8


@dataclass(frozen=True)
class Spec:
    """One tensor of a file."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.count * self.dtype.itemsize


class Writer:
    """Writes a file of the tensors in `specs`; a context manager. Their values follow with `write`, in order, in pieces of any size."""

    def __init__(self, path: Path, specs: Sequence[Spec]) -> None:
        self.path = path
        header: dict[str, Any] = {}
        position = 0
        for spec in specs:
            if spec.dtype not in _NAMES:
                raise InvalidModel(f"values of dtype {spec.dtype} cannot be stored")
            end = position + spec.size_bytes
            header[spec.name] = {
                "dtype": _NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [position, end],
            }
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        self._header = text + b" " * (-len(text) % _ALIGNMENT)
        self._missing = position
        self._file: io.BufferedWriter | None = None

    def __enter__(self) -> Self:
        self._file = self.path.open("wb")
        self._file.write(_LENGTH.pack(len(self._header)) + self._header)
        return self

    def write(self, values: Array) -> None:
        """Write the next values, in the dtype of their tensor."""
        assert self._file is not None
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self._missing -= data.nbytes
        self._file.write(data.data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._file.close()
        if kind is None and self._missing:
            raise ValueError(f"{self._missing} bytes were not written to {self.path.name}")


class Reader:
    """Reads the tensors of a file by name; a context manager. Raises InvalidModel for another file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.specs: dict[str, Spec] = {}
        self._offsets: dict[str, int] = {}
        self._file: io.BufferedReader | None = None

    def __enter__(self) -> Self:
        self._file = self.path.open("rb")
        try:
            self._read_header(self._file)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            self._file.close()
            raise InvalidModel(f"the weights {self.path.name[:12]} cannot be read: {error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._file.close()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Values from `start` to `stop` of the flattened tensor."""
        assert self._file is not None
        spec = self.specs[name]
        stop = spec.count if stop is None else min(stop, spec.count)
        values: Array = np.empty(stop - start, spec.dtype)
        self._file.seek(self._offsets[name] + start * spec.dtype.itemsize)
        if self._file.readinto(values.view(np.uint8).data) != values.nbytes:
            raise InvalidModel(f"the weights {self.path.name[:12]} end in the middle of {name}")
        return values

    def whole(self, name: str) -> Array:
        """The tensor with its shape."""
        return self.read(name).reshape(self.specs[name].shape)

    def _read_header(self, file: io.BufferedReader) -> None:
        (length,) = _LENGTH.unpack(file.read(_LENGTH.size).ljust(_LENGTH.size, b"\0"))
        if not 2 <= length <= _HEADER_LIMIT_BYTES:
            raise ValueError("it does not begin like a safetensors file")
        header = json.loads(file.read(length))
        base, size = _LENGTH.size + length, self.path.stat().st_size
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            name.encode()  # half of a surrogate pair could not be written again
            shape, (start, stop) = entry["shape"], entry["data_offsets"]
            if len(shape) > AXES_LIMIT or not all(
                type(one) is int and 0 <= one < 2**53 for one in (*shape, start, stop)
            ):
                raise ValueError(f"{name} has a shape or a place that cannot be")
            spec = Spec(name, DTYPES[entry["dtype"]], tuple(shape))
            if stop - start != spec.size_bytes or not start <= stop <= size - base:
                raise ValueError(f"{name} would be outside of it")
            self.specs[name], self._offsets[name] = spec, base + start
        if sum(spec.size_bytes for spec in self.specs.values()) > size - base:
            raise ValueError("its tensors lie over each other")


def save(path: Path, tensors: Iterable[tuple[str, Array]]) -> None:
    """Write whole tensors that are in memory."""
    kept = [(name, np.asarray(array)) for name, array in tensors]
    with Writer(path, [Spec(name, array.dtype, array.shape) for name, array in kept]) as writer:
        for _, array in kept:
            writer.write(array)


def load(path: Path) -> Iterator[tuple[str, Array]]:
    """All tensors of a file in its order. Raises InvalidModel."""
    with Reader(path) as reader:
        for name in reader.specs:
            yield name, reader.whole(name)
