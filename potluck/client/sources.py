"""Data as a user has it (a registered name, files, arrays) made into a data set of the cluster."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from potluck.blobs.store import BlobStore
from potluck.client.arguments import name as checked_name
from potluck.client.arguments import shown
from potluck.client.connection import Connection
from potluck.client.matching import ANYTHING, Wanted
from potluck.client.models import MODEL_FIRST, is_model
from potluck.data.packing import WEIGHT_NAME, Target, remarks
from potluck.errors import Cancelled, InvalidData, InvalidRequest
from potluck.wire import codec
from potluck.wire.messages import NODE_DATA, AddDataset, BlobRef, Dataset, DatasetAdded, DatasetInfo
from potluck.wording import printable

Arrays = Mapping[str, np.ndarray[Any, Any]]
Progress = Callable[[str, int, int], None]
"""`(what, done, total)`: "packing" counts items, "sending" bytes. May be called in another thread."""

_FILE_SUFFIXES = (".npz", ".csv", ".parquet", ".tfrecord", ".tfrecords", ".npy")
_PACKED_NAME = "data"


log = logging.getLogger(__name__)


def as_name(data: object) -> str | None:
    """`data`, when it names a data set (registered, or `node:name`) rather than files or arrays: text that is no path here."""
    if isinstance(data, str) and data.startswith(NODE_DATA):
        return data
    if not isinstance(data, str) or "/" in data or data.startswith(".") or data.endswith(_FILE_SUFFIXES):
        return None
    try:
        return None if Path(data).exists() else data
    except OSError:  # too long, or in a folder that may not be read: `existing` says so
        return None


def is_data_file(name: str) -> bool:
    """Whether a file of this name could only be data."""
    return name.endswith(_FILE_SUFFIXES)


def is_here(name: str) -> bool:
    """Whether there is a file or folder of this name."""
    try:
        return Path(name).exists()
    except OSError:
        return False


def takes_target(data: object) -> bool:
    """Whether a target may be named for `data`: a registered data set has its own, `(x, y)` says it, and `x` alone has none."""
    return isinstance(data, Path | Mapping) or (isinstance(data, str) and as_name(data) is None)


@dataclass(frozen=True)
class Given:
    """Data to be packed, as they were given, and what in them has which part. `stem` begins the name that they get without one."""

    source: Path | Arrays
    target: Target
    sample_weight: str | None
    stem: str = "arrays"
    name: str = ""
    """The path, where a data set could have the same name."""

    @property
    def item_shape(self) -> tuple[int, ...] | None:
        """That of the only input, where the data are arrays and it is known which of them that is."""
        if not isinstance(self.source, Mapping):
            return None
        targets = (self.target,) if isinstance(self.target, str) else self.target or ()
        inputs = [array for name, array in self.source.items() if name not in (*targets, self.sample_weight)]
        return inputs[0].shape[1:] if len(inputs) == 1 and inputs[0].ndim else None


def given(data: object, target: Target, sample_weight: str | None = None, argument: str = "data") -> Given | str:
    """The name of a data set that is registered (or lives on nodes), or what is to be packed. Looks, and reads nothing.

    Raises InvalidData for what can be neither, a model above all; errors call the data `argument`.
    """
    if is_model(data):
        raise InvalidData(f"{argument} is a model, {shown(data)}: {MODEL_FIRST}")
    name = as_name(data)
    if name is None:
        if isinstance(data, str | Path):
            return Given(existing(data), target, sample_weight, path_name(data), _plain(data))
        return as_arrays(data, target, sample_weight, argument)
    try:
        checked_name(argument, name.removeprefix(NODE_DATA))
    except InvalidRequest as error:
        raise InvalidData(f"there is no file or folder {name!r} here, and no data set has such a name") from error
    return name


def as_arrays(data: object, target: Target, sample_weight: str | None = None, argument: str = "data") -> Given:
    """Named arrays, from `(x, y)`, `(x, y, sample_weight)`, `x`, or a map. Raises InvalidData.

    `y` may be several: a map by the names of a model's outputs, or a list of arrays in their order.
    """
    try:
        if isinstance(data, Mapping):
            return Given(_named(data), target, sample_weight)
        if isinstance(data, tuple) and len(data) in (2, 3):
            inputs, labels = data[:2]
            named = _named(inputs) if isinstance(inputs, Mapping) else {"x": np.asarray(inputs)}
            targets = _targets(labels, named)
            if both := sorted(set(targets) & set(named)):
                raise InvalidData(f"{argument} has {both[0]!r} both as input and as target: name one of them otherwise")
            found, weight = named | targets, None
            if len(data) == 3 and data[2] is not None:
                weight = next(name for name in (WEIGHT_NAME, f"potluck.{WEIGHT_NAME}") if name not in found)
                found[weight] = np.asarray(data[2])
                if found[weight].dtype.kind not in "fiub":
                    raise InvalidData(
                        f"the third of {argument} is sample_weight, one array with the weight of each item, not {shown(data[2])}"
                    )
            return Given(found, tuple(targets), weight)
        if isinstance(data, np.ndarray) or hasattr(data, "__array__"):
            return Given({"x": np.asarray(data)}, None, None)
    except (ValueError, TypeError) as error:
        raise InvalidData(f"{argument} cannot be made into arrays: {error}") from error
    raise InvalidData(
        f"{argument} must be the name of a registered data set, a path, an array, arrays (x, y) or (x, y, sample_weight), "
        f"or a map of arrays, not {shown(data)}"
    )


def _named(arrays: Mapping[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    return {str(name): np.asarray(array) for name, array in arrays.items()}


def _targets(y: object, inputs: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """By name: those of outputs, `y_0`, `y_1`, ... of several in order, or one that no input has."""
    if isinstance(y, Mapping):
        return _named(y)
    if isinstance(y, list | tuple) and len(y) > 1 and all(getattr(each, "ndim", 0) for each in y):
        return {f"y_{place}": np.asarray(each) for place, each in enumerate(y)}
    name = next(name for name in ("y", "target", "potluck.target") if name not in inputs)
    return {name: np.asarray(y)}


async def add(
    connection: Connection,
    given: Given,
    *,
    name: str | None,
    for_job: bool = False,
    shuffle: bool = True,
    labels: bool = True,
    wanted: Wanted = ANYTHING,
    progress: Progress | None = None,
    argument: str = "data",
) -> DatasetInfo:
    """Pack data, push what the coordinator does not have, and register it; without a name it gets one from its content.

    `for_job`: a job that uses it is asked for next, and it is forgotten with that. `labels` False takes images without class
    folders, too. What is not as `wanted` is refused before anything is sent; errors call the data `argument`.
    Raises InvalidData, InvalidRequest, InvalidModel.
    """
    from potluck.data.arrays import item_shape
    from potluck.data.pack import pack, roles  # here: it reads images and tables, which most clients do not need

    tell = progress or (lambda what, done, total: None)
    cancelled = threading.Event()

    def packing(done: int, total: int) -> None:
        if cancelled.is_set():
            raise Cancelled("packing was cancelled")
        tell("packing", done, total)

    # A store of its own: who sends the same data at the same time throws nothing away that is still wanted here.
    with connection.packing_store() as store:
        try:
            dataset = await asyncio.to_thread(
                pack,
                given.source,
                _PACKED_NAME,
                store,
                target=given.target,
                sample_weight=given.sample_weight,
                shuffle=shuffle,
                labels=labels,
                progress=packing,
            )
        except asyncio.CancelledError:
            cancelled.set()  # a thread cannot be cancelled: it looks at this
            raise
        inputs, item = dataset.format.inputs, None
        if dataset.format.kind == "arrays" and len(inputs) == 1:
            item = item_shape(store.path(dataset.shards[0].blob.sha256), inputs[0])
        wanted.check_packed(argument, dataset, item, lambda: roles(given.source, given.target))
        if name is None:
            digest = hashlib.sha256(codec.pack(dataset)).hexdigest()[:12]
            name = f"{given.stem}-{digest}"
        _remark(dataset, argument)
        dataset = replace(dataset, name=name)
        refs = [*(shard.blob for shard in dataset.shards), *([dataset.keys] if dataset.keys else [])]
        await _push(connection, store, refs, tell)
    manifest = await connection.push(codec.pack(dataset))
    added = await connection.ask(AddDataset(name=name, manifest=manifest, packed=for_job), DatasetAdded)
    return added.dataset


def _remark(dataset: Dataset, argument: str) -> None:
    """Warn of what was left out, and of what whoever gave the data may not have meant."""
    for remark in remarks(dataset):
        log.warning("%s: %s", argument, printable(remark))


def remark_hidden(argument: str, name: str) -> None:
    """Warn that a file or folder here was taken, and not the data set of the same name."""
    log.warning(
        "%s: %r is packed from what lies here by that name, and the data set %r of the cluster is not used: "
        "write ./%s to mean that, or work in another folder to use this",
        *(argument, name, name, name),
    )


async def _push(connection: Connection, store: BlobStore, refs: list[BlobRef], tell: Progress) -> None:
    """Push the blobs of a local store, and drop each from it once it is there."""
    total = sum(ref.size for ref in refs)
    done = 0
    tell("sending", 0, total)

    def sent(ref: BlobRef) -> None:
        nonlocal done
        done += ref.size
        store.delete(ref.sha256)
        tell("sending", done, total)

    await connection.push_blobs(store, list(dict.fromkeys(refs)), sent)


def existing(data: str | Path) -> Path:
    """Raises InvalidData where nothing is, or may be looked at."""
    try:
        if not Path(data).exists():
            raise InvalidData(f"there is no file or folder {str(data)!r} here")
    except OSError as error:
        raise InvalidData(f"the file or folder {str(data)[:100]!r} cannot be read: {error.strerror}") from error
    return Path(data)


def path_name(data: str | Path) -> str:
    """A name for what lies at a path: its own, without the suffix of a file."""
    path = Path(data).resolve()
    return plain_name(path.stem if path.suffix in _FILE_SUFFIXES else path.name)


def _plain(data: str | Path) -> str:
    """The path, where it is written as the name of a data set would be; else empty."""
    try:
        return (isinstance(data, str) and checked_name("data", data)) or ""
    except InvalidRequest:
        return ""


def plain_name(text: str) -> str:
    """`text` as a name may be written: letters, digits, '.', '_' and '-', at most 100."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:100] or "data"
