"""Arrays in memory or from `.npz`, as safetensors shards: one tensor an input, and one for the target."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from potluck import codec
from potluck.blobs.store import BlobStore
from potluck.data.order import cuts, shuffled
from potluck.errors import InvalidData
from potluck.messages import DataFormat, Dataset, DataShard

Array = np.ndarray[Any, Any]
Progress = Callable[[int, int], None]

TARGET_NAMES = ("y", "y_train", "y_test", "target", "targets", "label", "labels")
"""Names that are taken for the target when none is named."""
CLASSES_LIMIT = 10_000


def pack(
    source: Mapping[str, Array],
    name: str,
    store: BlobStore,
    target: str | None,
    shuffle: bool,
    seed: int,
    shard_bytes: int,
    progress: Progress,
    *,
    classes: Sequence[str] = (),
) -> Dataset:
    """Raises InvalidData for arrays of unequal lengths, of objects or text, or without rows; and for an unknown target."""
    found = {key: _plain(key, np.asarray(array)) for key, array in source.items()}
    if target is not None and target not in found:
        raise InvalidData(f"there is no array {target!r} to learn: the arrays are {', '.join(found)}")
    if target is None and len(found) > 1:
        target = next((key for key in TARGET_NAMES if key in found), None)
    inputs = tuple(key for key in found if key != target)
    if not inputs:
        raise InvalidData("there is no input array, only the target")
    lengths = {key: len(array) for key, array in found.items()}
    if len(set(lengths.values())) != 1:
        shown = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        raise InvalidData(f"the arrays differ in their number of rows: {shown}")
    count = next(iter(lengths.values()))
    if not count:
        raise InvalidData("the arrays have no rows")
    labels = _labels(found[target]) if target is not None else None
    order = shuffled(labels, count, seed) if shuffle else np.arange(count)
    row_bytes = sum(max(1, array.nbytes // count) for array in found.values())
    shards: list[DataShard] = []
    for start, stop in cuts(np.full(count, row_bytes), shard_bytes):
        rows = order[start:stop]
        part = {key: np.ascontiguousarray(array[rows]) for key, array in found.items()}
        shards.append(DataShard(blob=store.put_bytes(save(part)), count=stop - start))
        progress(stop, count)
    counts: tuple[int, ...] = ()
    if classes and labels is not None:
        counts = tuple(int((labels == index).sum()) for index in range(len(classes)))
    return Dataset(
        name=name,
        format=DataFormat(kind="arrays", inputs=inputs, target=target or "", classes=tuple(classes)),
        count=count,
        shards=tuple(shards),
        class_counts=counts,
        keys=store.put_bytes(codec.pack(order.tolist(), "json")),
    )


def read_npz(path: Path) -> dict[str, Array]:
    """The arrays of an `.npz` file; pickled objects in it are refused, since they are code. Raises InvalidData."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        if "pickle" in str(error):
            raise InvalidData(f"{path} holds Python objects, which are code: save plain arrays of numbers") from error
        raise InvalidData(f"{path} is not an .npz file that can be read: {error}") from error


def _plain(key: str, array: Array) -> Array:
    if array.dtype.kind not in "fiub":
        raise InvalidData(f"array {key!r} has dtype {array.dtype}: numbers are needed (classes as 0, 1, 2, ...)")
    if not array.ndim:
        raise InvalidData(f"array {key!r} is a single value: the first axis must be the rows")
    return array


def _labels(target: Array) -> Array | None:
    """Class indexes to stratify by, where the target is such."""
    if (
        target.ndim == 2
        and target.shape[1] > 1
        and ((target == 0) | (target == 1)).all()
        and (target.sum(1) == 1).all()
    ):
        return np.asarray(target.argmax(axis=1))
    flat = target.reshape(len(target), -1)
    if flat.shape[1] == 1 and flat.dtype.kind in "iub" and len(np.unique(flat)) <= CLASSES_LIMIT:
        return np.asarray(flat[:, 0])
    return None
