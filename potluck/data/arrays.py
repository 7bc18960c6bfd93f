"""Arrays in memory or from `.npz`, as safetensors shards: one tensor per input, and one for the target."""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from potluck.data.packing import CLASSES_LIMIT, WEIGHT_NAME, Array, Packing, Target, class_indexes, target_names
from potluck.errors import InvalidData
from potluck.wire.values import DataFormat, Dataset, DataShard

TARGET_NAMES = ("y", "y_train", "y_test", "y_val", "target", "targets", "label", "labels")
"""Usual names of targets, upper or lower case: used when the user names no target. `X` and `Y` are common."""
PARTS = ("train", "test", "val")
"""An `.npz` may hold several sets; `_train`, `_test` and `_val` at the end of the names tell them apart."""

INFLATION = 200
INFLATION_FROM_BYTES = 2**30
"""A file that unpacks to far more than its size, and to at least this, was made to fill memory."""
_MAGIC = (b"PK", b"\x93NUMPY")
_UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    SyntaxError,
    MemoryError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
"""Errors of numpy and zipfile for damaged files, and for unknown kinds of zip files."""


def pack(
    source: Mapping[str, Array],
    target: Target,
    packing: Packing,
    *,
    sample_weight: str | None = None,
    classes: Sequence[str] = (),
    remarks: Sequence[str] = (),
) -> Dataset:
    """Pack arrays. Raises InvalidData for unequal lengths, Python objects, no rows, or an unknown target or weight."""
    found = {key: np.asarray(array) for key, array in source.items()}
    if not found:
        raise InvalidData("there are no arrays")
    targets = target_names(target)
    for name in (*targets, *([sample_weight] if sample_weight else [])):
        if name not in found:
            use = "to learn" if name in targets else "of weights"
            raise InvalidData(f"there is no array {name!r} {use}: the arrays are {', '.join(found)}")
    targets = target_arrays(tuple(found), target)
    weight = sample_weight or (WEIGHT_NAME if targets and WEIGHT_NAME in found and WEIGHT_NAME not in targets else "")
    for key in targets:
        if not classes and found[key].dtype.kind in "US" and found[key].ndim == 1:
            if len(targets) > 1:
                raise InvalidData(
                    f"target {key!r} is text, and there are {len(targets)} targets: with several targets, classes must be numbers"
                )
            try:
                stored = found[key].tolist()
            except SystemError as error:  # numpy takes any number for a sign
                raise InvalidData(f"target {key!r} has texts that cannot be read") from error
            texts = [text.decode(errors="replace") if isinstance(text, bytes) else text for text in stored]
            found[key], classes = class_indexes(texts, f"target {key!r}")
    found = {key: _plain(key, array) for key, array in found.items()}
    if weight:
        found[weight] = _weights(weight, found[weight])
    inputs = tuple(key for key in found if key not in targets and key != weight)
    if not inputs:
        raise InvalidData(f"there is no input array, only the target {', '.join(map(repr, targets))}")
    lengths = {key: len(array) for key, array in found.items()}
    count = next(iter(lengths.values()))
    if len(set(lengths.values())) != 1:
        shown = ", ".join(f"{key!r} has {length}" for key, length in lengths.items())
        raise InvalidData(f"the arrays differ in their number of rows: {shown}")
    if not count:
        raise InvalidData("the arrays have no rows")
    labels = _labels(found[targets[0]], bool(classes)) if targets else None
    order = packing.order(labels, count)
    row_bytes = max(1, sum(array.nbytes for array in found.values()) // count)
    shards: list[DataShard] = []
    for start, stop in packing.cuts(np.full(count, row_bytes)):
        part = {key: np.ascontiguousarray(array[order[start:stop]]) for key, array in found.items()}
        shards.append(DataShard(blob=packing.put(save(part)), count=stop - start))
        packing.progress(stop, count)
    described = DataFormat(
        kind="arrays",
        inputs=inputs,
        target=targets[0] if len(targets) == 1 else "",
        targets=targets if len(targets) > 1 else (),
        weight=weight,
        classes=tuple(classes),
    )
    return packing.dataset(described, shards, order, labels, remarks=remarks)


def target_arrays(names: Sequence[str], target: Target) -> tuple[str, ...]:
    """The named targets; else, of several arrays, the one with a usual name: exactly as in TARGET_NAMES, or in another case."""
    if (targets := target_names(target)) or len(names) < 2:
        return targets
    named = sorted(names, key=lambda key: (key not in TARGET_NAMES, key))
    return tuple([key for name in TARGET_NAMES for key in named if key.lower() == name][:1])


def names_in(path: Path) -> tuple[str, ...]:
    """The names of the arrays in an `.npz` or `.npy` file that can be read."""
    with np.load(path, allow_pickle=False) as loaded:
        return tuple(loaded.files)


def read_file(
    path: Path, target: Target, sample_weight: str | None = None
) -> tuple[dict[str, Array], tuple[str, ...], str | None]:
    """The arrays of an `.npz` or `.npy` file, and the names of targets and weights among them.

    Refuses pickled objects: they are code. If a file holds several sets (`x_train`, `y_train`, `x_test`, ...), only the set that
    `target` belongs to is returned, with the endings cut off its names. Raises InvalidData.
    """
    targets = target_names(target)
    try:
        with path.open("rb") as file:
            if not file.peek(6).startswith(_MAGIC):
                raise InvalidData(f"{path} is not an {path.suffix} file: write it with numpy.savez")
            _check_archive(path, file)
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {"x": loaded}, targets, sample_weight
            names = list(loaded.files)
            part = _part(path, names, targets[0] if targets else None)
            found = {name.removesuffix(part): loaded[name] for name in names if name.endswith(part)}
            if (
                other := next((name for name, value in found.items() if not isinstance(value, np.ndarray)), None)
            ) is not None:
                raise InvalidData(f"{path} has something else than an array in it: {other[:100]!r}")
            return (
                found,
                tuple(name.removesuffix(part) for name in targets),
                sample_weight.removesuffix(part) if sample_weight else None,
            )
    except _UNREADABLE as error:
        if "pickle" in str(error):
            raise InvalidData(
                f"{path} holds Python objects, which are code: save plain arrays of numbers instead"
            ) from error
        raise InvalidData(f"{path} is not an {path.suffix} file that can be read: {error}") from error


def _check_archive(path: Path, file: BinaryIO) -> None:
    """Raises InvalidData for a zip file that was made to fill memory, BadZipFile for a damaged one. Announced sizes can be trusted."""
    if file.read(len(_MAGIC[0])) == _MAGIC[0]:
        file.seek(0)
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
        total, packed = sum(info.file_size for info in infos), path.stat().st_size
        if any(info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for info in infos):
            raise InvalidData(f"{path} is compressed as numpy never does: write it with numpy.savez")
        if total > max(INFLATION_FROM_BYTES, INFLATION * packed):
            raise InvalidData(
                f"{path} has {packed / 1e6:.1f} MB and unpacks to {total / 1e6:,.0f} MB: write it with numpy.savez, which does not compress"
            )
    file.seek(0)


def item_shape(shard: Path, name: str) -> tuple[int, ...]:
    """The shape of one item of an array in a shard."""
    with safe_open(shard, framework="numpy") as file:
        _, *shape = file.get_slice(name).get_shape()
    return tuple(shape)


def _part(path: Path, names: Sequence[str], target: str | None) -> str:
    """The ending of the names to use; empty for all names."""
    endings = [f"_{part}" for part in PARTS]
    found = [ending for ending in endings if any(name.endswith(ending) for name in names)]
    if not found or not all(name.endswith(tuple(endings)) for name in names):
        return ""
    if len(found) == 1:
        return found[0]
    chosen = next((ending for ending in found if target is not None and target.endswith(ending)), None)
    if chosen is None:
        choices = " or ".join(repr(name) for name in names if name.lower().startswith(("y_", "label"))) or repr(
            names[0]
        )
        raise InvalidData(f"{path} holds several sets ({', '.join(names)}): choose one by its target: {choices}")
    return chosen


def _plain(key: str, array: Array) -> Array:
    if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
        raise InvalidData(
            f"array {key!r} has dtype {array.dtype}: it must hold numbers of at most 64 bits (for texts use a folder of .txt files; "
            "for classes name it as the target, --target)"
        )
    if not array.ndim:
        raise InvalidData(f"array {key!r} is a single value: the first axis must be the rows")
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _weights(key: str, array: Array) -> Array:
    """The weights of the items: one number each, or one for each time step."""
    if not np.isfinite(array).all():
        raise InvalidData(
            f"the weights {key!r} are not all finite numbers: give each item a weight; 0 leaves an item out"
        )
    return array.astype(np.float32)


def _labels(target: Array, are_classes: bool) -> Array | None:
    """Class indexes to stratify by, where the target has them: few whole numbers, or one-hot columns; else None."""
    columns = target.reshape(len(target), -1) if target.size else target
    if columns.ndim != 2 or not columns.shape[1]:
        return None
    if columns.shape[1] > 1:
        hot = target.ndim == 2 and ((target == 0) | (target == 1)).all() and (target.sum(axis=1) == 1).all()
        return np.asarray(target.argmax(axis=1)) if hot else None
    values = columns[:, 0]
    if values.dtype.kind == "f" and not (np.isfinite(values).all() and (values == np.round(values)).all()):
        return None
    found = np.unique(values)
    few = len(found) <= min(CLASSES_LIMIT, max(2, len(values) // 2))
    return values.astype(np.int64) if few or are_classes else None
