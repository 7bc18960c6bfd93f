"""Data as a user has it (a registered name, files, arrays) made into a data set of the cluster."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from potluck import codec
from potluck.client.arguments import shown
from potluck.client.connection import Connection
from potluck.errors import Cancelled, InvalidData, InvalidRequest
from potluck.messages import AddDataset, BlobRef, DatasetAdded, DatasetInfo

Arrays = Mapping[str, np.ndarray[Any, Any]]
Progress = Callable[[str, int, int], None]
"""`(what, done, total)`: "packing" counts items, "sending" bytes. May be called in another thread."""

_FILE_SUFFIXES = (".npz", ".csv", ".parquet", ".tfrecord", ".tfrecords", ".npy")
_PACKED_NAME = "data"


log = logging.getLogger(__name__)

_NAMED = 5
"""Items that a warning names."""


def as_name(data: object) -> str | None:
    """`data`, when it is the name of a registered data set rather than files or arrays: text that is no path here."""
    if not isinstance(data, str) or "/" in data or data.startswith(".") or data.endswith(_FILE_SUFFIXES):
        return None
    try:
        return None if Path(data).exists() else data
    except OSError:  # too long, or in a folder that may not be read: `existing` says so
        return None


def takes_target(data: object) -> bool:
    """Whether a target may be named for `data`: a registered data set has its own, `(x, y)` says it, and `x` alone has none."""
    return isinstance(data, Path | Mapping) or (isinstance(data, str) and as_name(data) is None)


def as_arrays(data: object, target: str | None, argument: str = "data") -> tuple[Arrays, str | None]:
    """Named arrays and the name of the target among them, from `(x, y)`, `x`, or a map. Raises InvalidData."""
    try:
        if isinstance(data, Mapping):
            return {str(name): np.asarray(array) for name, array in data.items()}, target
        if isinstance(data, tuple) and len(data) == 2:
            inputs, labels = data
            named = (
                {str(k): np.asarray(v) for k, v in inputs.items()}
                if isinstance(inputs, Mapping)
                else {"x": np.asarray(inputs)}
            )
            name = next(name for name in ("y", "target", "potluck.target") if name not in named)
            return {**named, name: np.asarray(labels)}, name
        if isinstance(data, np.ndarray) or hasattr(data, "__array__"):
            return {"x": np.asarray(data)}, None
    except (ValueError, TypeError) as error:
        raise InvalidData(f"{argument} cannot be made into arrays: {error}") from error
    raise InvalidData(
        f"{argument} must be the name of a registered data set, a path, an array, arrays (x, y), or a map of arrays, "
        f"not {shown(data)}"
    )


def no_images(argument: str) -> InvalidRequest:
    """The error for image options with data that has no images: they would change nothing."""
    return InvalidRequest(
        f"image says how images become tensors, and {argument} holds no images: leave out image (--image), or give some"
    )


async def add(
    connection: Connection,
    data: object,
    *,
    name: str | None,
    target: str | None = None,
    shuffle: bool = True,
    labels: bool = True,
    only_images: bool = False,
    progress: Progress | None = None,
    argument: str = "data",
) -> DatasetInfo:
    """Pack `data`, push what the coordinator does not have, and register it; without a name it gets one from its content.

    `labels` False takes images without class folders, too; `only_images` refuses arrays before anything is sent. Errors call
    the data `argument`. Raises InvalidData, InvalidRequest.
    """
    source: Path | Arrays
    if isinstance(data, str | Path):
        source, stem = existing(data), path_name(data)
    else:
        (source, target), stem = as_arrays(data, target, argument), "arrays"
    from potluck.data.pack import pack  # here: it reads images and tables, which most clients do not need

    tell = progress or (lambda what, done, total: None)
    cancelled = threading.Event()

    def packing(done: int, total: int) -> None:
        if cancelled.is_set():
            raise Cancelled("packing was cancelled")
        tell("packing", done, total)

    try:
        dataset = await asyncio.to_thread(
            pack,
            source,
            _PACKED_NAME,
            connection.store,
            target=target,
            shuffle=shuffle,
            labels=labels,
            progress=packing,
        )
    except asyncio.CancelledError:
        cancelled.set()  # a thread cannot be cancelled: it looks at this
        raise
    if only_images and dataset.format.kind != "images":
        raise no_images(argument)
    if name is None:
        digest = hashlib.sha256(codec.pack(dataset)).hexdigest()[:12]
        name = f"{stem}-{digest}"
    if dataset.skipped:
        shown = ", ".join(dataset.skipped[:_NAMED]) + (", ..." if len(dataset.skipped) > _NAMED else "")
        log.warning(
            "%d of %d items cannot be read and are left out: %s",
            len(dataset.skipped),
            dataset.count + len(dataset.skipped),
            shown,
        )
    dataset = replace(dataset, name=name)
    refs = [*(shard.blob for shard in dataset.shards), *([dataset.keys] if dataset.keys else [])]
    await _push(connection, refs, tell)
    manifest = await connection.push(codec.pack(dataset))
    added = await connection.ask(AddDataset(name=name, manifest=manifest), DatasetAdded)
    return added.dataset


async def _push(connection: Connection, refs: list[BlobRef], tell: Progress) -> None:
    """Push the blobs of the local store, and drop each from it once it is there."""
    total = sum(ref.size for ref in refs)
    done = 0
    tell("sending", 0, total)

    def sent(ref: BlobRef) -> None:
        nonlocal done
        done += ref.size
        connection.store.delete(ref.sha256)
        tell("sending", done, total)

    await connection.push_blobs(list(dict.fromkeys(refs)), sent)


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


def plain_name(text: str) -> str:
    """`text` as a name may be written: letters, digits, '.', '_' and '-', at most 100."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:100] or "data"
