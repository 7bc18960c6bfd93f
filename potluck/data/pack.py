"""Packs a data set into content-addressed shards, each with about the class mixture of the whole.

What may be packed: a folder of class folders with images, `.npz`, `.csv`, TFRecord files, and arrays in memory.
The formats of shards are those of `potluck.messages.DataFormat`; docs/data.md describes them for other programs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from potluck.blobs.store import BlobStore
from potluck.data import arrays, images, tables, tfrecords
from potluck.errors import InvalidData
from potluck.messages import Dataset

SHARD_BYTES = 8 * 2**20
Progress = Callable[[int, int], None]


def pack(
    source: Path | Mapping[str, np.ndarray[Any, Any]],
    name: str,
    store: BlobStore,
    *,
    target: str | None = None,
    shuffle: bool = True,
    labels: bool = True,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Dataset:
    """Write the shards of `source` to `store`; the same input gives the same shards.

    `target` names the array or column to learn. `shuffle` spreads the classes over all shards; without it the input's order
    is kept. `labels` False allows images without class folders, for prediction. `progress` gets (items done, items in all).
    Raises InvalidData, saying what is wrong with which file, row or array.
    """
    tell = progress or (lambda done, total: None)
    if isinstance(source, Mapping):
        return arrays.pack(source, name, store, target, shuffle, seed, shard_bytes, tell)
    if not source.exists():
        raise InvalidData(f"{source} does not exist: give a folder of images, or an .npz, .csv or .tfrecord file")
    suffix = source.suffix.lower()
    if source.is_dir():
        records = tfrecords.files_in(source)
        if records:
            return tfrecords.pack(records, name, store, target, shuffle, seed, shard_bytes, tell)
        return images.pack_folder(source, name, store, shuffle, labels, seed, shard_bytes, tell)
    if suffix == ".npz":
        return arrays.pack(arrays.read_npz(source), name, store, target, shuffle, seed, shard_bytes, tell)
    if suffix == ".csv":
        columns, classes, column = tables.read_csv(source, target)
        return arrays.pack(columns, name, store, column, shuffle, seed, shard_bytes, tell, classes=classes)
    if suffix in tfrecords.SUFFIXES:
        return tfrecords.pack([source], name, store, target, shuffle, seed, shard_bytes, tell)
    raise InvalidData(f"{source} is not a data set that can be packed: a folder of images, .npz, .csv or .tfrecord is")
