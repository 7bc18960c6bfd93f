"""Data shards as files: tars of images, texts or recordings, and safetensors of arrays. Only the wanted items are read."""

from __future__ import annotations

import math
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from potluck import tars
from potluck.errors import InvalidData
from potluck.wording import counted

Array = np.ndarray[Any, Any]
NO_CLASS = -1
INDEXES_KEPT = 64
ALIGNMENT = 64
"""TensorFlow takes over foreign memory without a copy if it begins at a multiple of this (EIGEN_MAX_ALIGN_BYTES)."""


@dataclass(frozen=True)
class ShardPart:
    """Items `start` to `stop` (exclusive) of the shard at `path`."""

    path: Path
    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.stop - self.start

    @property
    def label(self) -> str:
        return f"data shard {self.path.name[:12]}"


@dataclass(frozen=True)
class FileIndex:
    """Where the items' files lie in a tar, and their class indexes (NO_CLASS without one)."""

    offsets: Array
    sizes: Array
    classes: Array


@lru_cache(maxsize=INDEXES_KEPT)
def file_index(path: Path) -> FileIndex:
    """Reads the tar's headers and its `.cls` members. Raises InvalidData. A shard's name is its hash, so it never changes."""
    places: list[tuple[int, int]] = []
    classes: list[int] = []
    key: str | None = None
    size = path.stat().st_size
    try:
        with tars.opened(path) as members:
            for tar, member in members:
                if not member.isfile():
                    continue
                stem, _, suffix = member.name.rpartition(".")
                if stem != key:
                    key = stem
                    places.append((0, 0))
                    classes.append(NO_CLASS)
                if suffix == "cls":
                    file = tar.extractfile(member)
                    classes[-1] = int(file.read(20) if file else b"")
                elif places[-1][0]:  # never 0: a header stands before it
                    raise ValueError(f"item '{stem}' has two files")
                elif member.offset_data + member.size > size:
                    raise ValueError(f"it ends in the middle of '{member.name}'")
                else:
                    places[-1] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise InvalidData(f"data shard {path.name[:12]} cannot be read: {error}: add the data set again") from error
    if any(not offset for offset, _ in places):
        raise InvalidData(f"data shard {path.name[:12]} has an item without a file: add the data set again")
    table = np.array(places, np.int64).reshape(-1, 2)
    return FileIndex(table[:, 0], table[:, 1], np.array(classes, np.int64))


def item_classes(part: ShardPart) -> Array:
    """Class indexes of its items. Raises InvalidData, also when the shard has fewer items."""
    index = file_index(part.path)
    _check_count(part, len(index.classes))
    return index.classes[part.start : part.stop]


def item_files(part: ShardPart) -> Iterator[bytes]:
    """The items' files, one after the other. Raises InvalidData."""
    index = file_index(part.path)
    _check_count(part, len(index.classes))
    with part.path.open("rb") as file:
        for offset, size in zip(
            index.offsets[part.start : part.stop].tolist(), index.sizes[part.start : part.stop].tolist(), strict=True
        ):
            file.seek(offset)
            yield file.read(size)


def files_bytes(part: ShardPart) -> int:
    """The size of its items' files. Raises InvalidData."""
    return int(file_index(part.path).sizes[part.start : part.stop].sum())


def load_arrays(parts: Sequence[ShardPart], names: Sequence[str]) -> dict[str, Array]:
    """Arrays by name, joined over the parts. Raises InvalidData."""
    found: dict[str, list[Array]] = {name: [] for name in names}
    for part in parts:
        try:
            with safe_open(part.path, framework="numpy") as file:
                missing = set(names) - set(file.keys())
                if missing:
                    raise InvalidData(f"{part.label} has no array {', '.join(sorted(missing))}")
                for name in names:
                    piece = file.get_slice(name)
                    _check_count(part, (piece.get_shape() or [0])[0])
                    found[name].append(piece[part.start : part.stop])
        except (SafetensorError, OSError) as error:
            raise InvalidData(f"{part.label} cannot be read: {error}: add the data set again") from error
    return {name: arrays[0] if len(arrays) == 1 else _joined(arrays) for name, arrays in found.items() if arrays}


def aligned(shape: tuple[int, ...], dtype: Any) -> Array:
    """An array, not filled, that `keras_models.held` takes without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    found: Array = memory[start : start + size].view(dtype).reshape(shape)
    return found


def _joined(arrays: Sequence[Array]) -> Array:
    shape = (sum(map(len, arrays)), *arrays[0].shape[1:])
    return np.concatenate(arrays, out=aligned(shape, arrays[0].dtype))


def _check_count(part: ShardPart, count: int) -> None:
    if part.stop > count or part.start > part.stop:
        raise InvalidData(
            f"{part.label} has {counted(count, 'item')}, but items {part.start} to {part.stop} are wanted: add the data set again"
        )
