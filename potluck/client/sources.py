"""Makes a data set of the cluster from a user's data: a registered name, files or arrays."""

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
from potluck.wire.jobs import NODE_DATA
from potluck.wire.questions import AddDataset, DatasetAdded, DatasetInfo
from potluck.wire.values import BlobRef, Dataset
from potluck.wording import printable

Arrays = Mapping[str, np.ndarray[Any, Any]]
Progress = Callable[[str, int, int], None]
"""`(what, done, total)`: "packing" counts items, "sending" bytes. Can be called in another thread."""

_FILE_SUFFIXES = (".npz", ".csv", ".parquet", ".tfrecord", ".tfrecords", ".npy")
_PACKED_NAME = "data"


log = logging.getLogger(__name__)


def as_name(data: object) -> str | None:
    """`data`, if it names a data set (registered, or `node:name`) rather than files or arrays: a text that is no path here; else None."""
    if isinstance(data, str) and data.startswith(NODE_DATA):
        return data
    if not isinstance(data, str) or "/" in data or data.startswith(".") or data.endswith(_FILE_SUFFIXES):
        return None
    try:
        return None if Path(data).exists() else data
    except OSError:  # the name is too long, or its folder may not be read: `existing` reports that
        return None


def is_data_file(name: str) -> bool:
    """Whether a file with this name can only be data."""
    return name.endswith(_FILE_SUFFIXES)


def is_here(name: str) -> bool:
    """Whether there is a file or folder of this name."""
    try:
        return Path(name).exists()
    except OSError:
        return False


def takes_target(data: object) -> bool:
    """Whether `data` may come with a target: a registered data set has its own, `(x, y)` has it as y, and `x` alone has none."""
    return isinstance(data, Path | Mapping) or (isinstance(data, str) and as_name(data) is None)


@dataclass(frozen=True)
class GivenData:
    """Data to pack, as the user gave them, and the roles of their parts. `stem`: the start of the name where the user gives none."""

    source: Path | Arrays
    target: Target
    sample_weight: str | None
    stem: str = "arrays"
    name: str = ""
    """The path, where a data set could have the same name; else empty."""

    @property
    def item_shape(self) -> tuple[int, ...] | None:
        """The shape of one item, where the data are arrays and exactly one of them is the input; else None."""
        if not isinstance(self.source, Mapping):
            return None
        targets = (self.target,) if isinstance(self.target, str) else self.target or ()
        inputs = [array for name, array in self.source.items() if name not in (*targets, self.sample_weight)]
        return inputs[0].shape[1:] if len(inputs) == 1 and inputs[0].ndim else None


def given(data: object, target: Target, sample_weight: str | None = None, argument: str = "data") -> GivenData | str:
    """The name of a data set that is registered (or lives on nodes), or the data to pack. Reads no data.

    Raises InvalidData for anything else, such as a model; errors call the data `argument`.
    """
    if is_model(data):
        raise InvalidData(f"{argument} is a model, {shown(data)}: {MODEL_FIRST}")
    name = as_name(data)
    if name is None:
        if isinstance(data, str | Path):
            return GivenData(existing(data), target, sample_weight, path_name(data), _plain(data))
        return as_arrays(data, target, sample_weight, argument)
    try:
        checked_name(argument, name.removeprefix(NODE_DATA))
    except InvalidRequest as error:
        raise InvalidData(
            f"there is no file or folder {name!r} here, and it cannot be the name of a data set"
        ) from error
    return name


def as_arrays(data: object, target: Target, sample_weight: str | None = None, argument: str = "data") -> GivenData:
    """Named arrays, from `(x, y)`, `(x, y, sample_weight)`, `x`, or a map. Raises InvalidData.

    `y` may be several targets: a map by the names of the model's outputs, or a list of arrays in their order.
    """
    try:
        if isinstance(data, Mapping):
            return GivenData(_named(data), target, sample_weight)
        if isinstance(data, tuple) and len(data) in (2, 3):
            inputs, labels = data[:2]
            named = _named(inputs) if isinstance(inputs, Mapping) else {"x": np.asarray(inputs)}
            targets = _targets(labels, named)
            if both := sorted(set(targets) & set(named)):
                raise InvalidData(f"{argument} has {both[0]!r} both as input and as target: rename one of them")
            found, weight = named | targets, None
            if len(data) == 3 and data[2] is not None:
                weight = next(name for name in (WEIGHT_NAME, f"potluck.{WEIGHT_NAME}") if name not in found)
                found[weight] = np.asarray(data[2])
                if found[weight].dtype.kind not in "fiub":
                    raise InvalidData(
                        f"the third part of {argument} must be sample_weight, one array with the weight of each item, not {shown(data[2])}"
                    )
            return GivenData(found, tuple(targets), weight)
        if isinstance(data, np.ndarray) or hasattr(data, "__array__"):
            return GivenData({"x": np.asarray(data)}, None, None)
    except (ValueError, TypeError) as error:
        raise InvalidData(f"{argument} cannot be made into arrays: {error}") from error
    raise InvalidData(
        f"{argument} must be the name of a registered data set, a path, an array, arrays (x, y) or (x, y, sample_weight), "
        f"or a map of arrays, not {shown(data)}"
    )


def _named(arrays: Mapping[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    return {str(name): np.asarray(array) for name, array in arrays.items()}


def _targets(y: object, inputs: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Targets by name: the given names; for several without names `y_0`, `y_1`, ...; for one, a name that no input has."""
    if isinstance(y, Mapping):
        return _named(y)
    if isinstance(y, list | tuple) and len(y) > 1 and all(getattr(each, "ndim", 0) for each in y):
        return {f"y_{place}": np.asarray(each) for place, each in enumerate(y)}
    name = next(name for name in ("y", "target", "potluck.target") if name not in inputs)
    return {name: np.asarray(y)}


async def add(
    connection: Connection,
    given: GivenData,
    *,
    name: str | None,
    for_job: bool = False,
    shuffle: bool = True,
    labels: bool = True,
    wanted: Wanted = ANYTHING,
    progress: Progress | None = None,
    argument: str = "data",
) -> DatasetInfo:
    """Pack data, push the shards that the coordinator lacks, and register the data set; without `name` it gets one from its content.

    `for_job`: a job that uses the data set is submitted next; the data set is removed with that job. `labels` False: images need no
    class folders. Data that do not fit `wanted` are refused before anything is sent; errors call the data `argument`.
    Raises InvalidData, InvalidRequest, InvalidModel.
    """
    # Imported here: these read images and tables, which most clients do not need.
    from potluck.data.arrays import item_shape
    from potluck.data.pack import pack, roles

    tell = progress or (lambda what, done, total: None)
    cancelled = threading.Event()

    def packing(done: int, total: int) -> None:
        if cancelled.is_set():
            raise Cancelled("packing was cancelled")
        tell("packing", done, total)

    # A store of its own: another user who sends the same data at the same time cannot delete blobs that are still needed here.
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
            cancelled.set()  # a thread cannot be cancelled: it checks this event
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
    """Warn of items that were left out, and of data that the user may not have meant."""
    for remark in remarks(dataset):
        log.warning("%s: %s", argument, printable(remark))


def remark_hidden(argument: str, name: str) -> None:
    """Warn that a local file or folder was used, and not the data set with the same name."""
    log.warning(
        "%s: there is a file or folder %r here, and it is used instead of the cluster's data set %r: "
        "to use the file or folder, write ./%s; to use the data set, work in another folder",
        *(argument, name, name, name),
    )


async def _push(connection: Connection, store: BlobStore, refs: list[BlobRef], tell: Progress) -> None:
    """Push the blobs of a local store, and delete each from the store when it was sent."""
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
    """`data` as a path. Raises InvalidData where there is nothing, or where it cannot be looked at."""
    try:
        if not Path(data).exists():
            raise InvalidData(f"there is no file or folder {str(data)!r} here")
    except OSError as error:
        raise InvalidData(f"the file or folder {str(data)[:100]!r} cannot be read: {error.strerror}") from error
    return Path(data)


def path_name(data: str | Path) -> str:
    """A name for a file or folder: its own, without a data file's suffix."""
    path = Path(data).resolve()
    return plain_name(path.stem if path.suffix in _FILE_SUFFIXES else path.name)


def _plain(data: str | Path) -> str:
    """`data`, where it could also be the name of a data set; else empty."""
    try:
        return (isinstance(data, str) and checked_name("data", data)) or ""
    except InvalidRequest:
        return ""


def plain_name(text: str) -> str:
    """`text` with only the characters of a name: letters, digits, '.', '_' and '-', at most 100."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:100] or "data"
