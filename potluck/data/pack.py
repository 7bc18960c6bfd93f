"""Packs a data set into content-addressed shards, each with about the class mixture of the whole.

Accepts a folder of class folders with images, texts or recordings, `.npz`, `.npy`, `.csv`, Parquet and TFRecord files, and arrays
in memory.
The formats of shards are those of `potluck.wire.values.DataFormat`; docs/data.md describes them for other programs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from potluck.blobs.store import BlobStore
from potluck.data import arrays, audio, folders, images, parquet, tables, texts, tfrecords
from potluck.data.packing import Packing, Roles, Target, reading, some, target_names
from potluck.errors import InvalidData
from potluck.wire.values import BlobRef, Dataset

SHARD_BYTES = 8 * 2**20
FILES = (images.KIND, texts.KIND, audio.KIND)
"""The kinds of files that class folders may hold."""
Progress = Callable[[int, int], None]


def pack(
    source: Path | Mapping[str, np.ndarray[Any, Any]],
    name: str,
    store: BlobStore,
    *,
    target: Target = None,
    sample_weight: str | None = None,
    shuffle: bool = True,
    labels: bool = True,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Dataset:
    """Write the shards of `source` to `store`; the same input gives the same shards.

    `target` names the array, column or feature to learn, or several: one for each output of a model. `sample_weight` names the array or
    column with the weight of each item in the loss. `shuffle` spreads the classes over all shards; without it, items keep the input's
    order. `labels` False, for prediction, takes all files in and below a folder, without classes. `progress` gets
    (items done, items in all). Raises InvalidData, naming the file, row or array that is wrong; DiskFull.
    """
    pinned: list[str] = []

    def put(data: bytes) -> BlobRef:
        ref = store.put_bytes(data)
        store.pin(ref.sha256)  # a later shard could make the store evict it
        pinned.append(ref.sha256)
        return ref

    packing = Packing(name, put, progress or (lambda done, total: None), shuffle, seed, shard_bytes)
    try:
        if isinstance(source, Mapping):
            return arrays.pack(source, target, packing, sample_weight=sample_weight)
        return _pack_path(Path(source), target, sample_weight, labels, packing)
    finally:
        for sha256 in pinned:
            store.unpin(sha256)


def roles(source: Path | Mapping[str, Any], target: Target = None) -> Roles | None:
    """What was packed, by name; None for a source without names, such as TFRecords and folders of files."""
    if isinstance(source, Mapping):
        return Roles("arrays", tuple(source), arrays.target_arrays(tuple(source), target), arrays.TARGET_NAMES)
    source = Path(source)
    suffix = source.suffix.lower()
    if suffix == ".npy":
        return Roles("arrays", ("x",), (), arrays.TARGET_NAMES)
    if suffix == ".npz":
        names = arrays.names_in(source)
        return Roles("arrays", names, arrays.target_arrays(names, target), arrays.TARGET_NAMES)
    parts = parquet.files_in(source) if source.is_dir() else [source] if suffix in parquet.SUFFIXES else []
    if not parts and suffix != ".csv":
        return None
    names = parquet.names_in(parts[0]) if parts else tables.names_in(source)
    return Roles("columns", names, tables.target_columns(names, target), tables.TARGET_NAMES)


def _pack_path(source: Path, target: Target, sample_weight: str | None, labels: bool, packing: Packing) -> Dataset:
    if not source.exists():
        raise InvalidData(
            f"{source} does not exist: give a folder of images, texts or recordings, or an .npz, .csv, .parquet or "
            ".tfrecord file"
        )
    if not source.is_dir() and not source.is_file():  # reading a pipe or a device might never end
        raise InvalidData(f"{source} is neither a folder nor a plain file")
    suffix = source.suffix.lower()
    if source.is_dir():
        with reading(source):
            records, parts = tfrecords.files_in(source), parquet.files_in(source)
            taken = {*records, *parts}
            beside = sorted(path.name for path in source.iterdir() if path not in taken and path.name[0] not in "._")
        if records and parts:
            raise InvalidData(
                f"{source} has TFRecord and Parquet files: a data set holds one kind; move the others to another folder"
            )
        about = [f"{len(beside)} beside the data files left out: {some(beside)}"] if beside else []
        if parts:
            table = parquet.read(parts, target, sample_weight)
            return _pack_table(replace(table, remarks=(*table.remarks, *about)), packing)
        only = _only_target(source, target, sample_weight)
        if records:
            return tfrecords.pack(records, only, packing, about)
        return folders.pack_folder(source, labels, packing, FILES)
    if suffix in (".npz", ".npy"):
        found, targets, weight = arrays.read_file(source, target, sample_weight)
        return arrays.pack(found, targets, packing, sample_weight=weight)
    if suffix == ".csv":
        return _pack_table(tables.read_csv(source, target, sample_weight), packing)
    if suffix in parquet.SUFFIXES:
        return _pack_table(parquet.read([source], target, sample_weight), packing)
    if suffix in tfrecords.SUFFIXES or ".tfrecord-" in source.name:
        return tfrecords.pack([source], _only_target(source, target, sample_weight), packing)
    raise InvalidData(
        f"{source} cannot be packed as a data set: give a folder of class folders with images, texts or "
        "recordings, an .npz, .npy, .csv or .parquet file, or TFRecords"
    )


def _pack_table(table: tables.Table, packing: Packing) -> Dataset:
    weight = table.sample_weight
    return arrays.pack(
        table.columns, table.target, packing, sample_weight=weight, classes=table.classes, remarks=table.remarks
    )


def _only_target(source: Path, target: Target, sample_weight: str | None) -> str | None:
    """The target, for data with at most one target and no weights. Raises InvalidData for more."""
    if sample_weight is not None or len(target_names(target)) > 1:
        what = "weights of items are" if sample_weight is not None else "several targets are"
        raise InvalidData(f"{source}: {what} read only from .npz, tables and arrays: save the data as one of these")
    return next(iter(target_names(target)), None)
