"""What is the same for every source when packing: order, size and place of shards, and progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from potluck.data.order import cuts, shuffled
from potluck.errors import InvalidData
from potluck.wire import codec
from potluck.wire.values import CLASS_NAMES_LIMIT_BYTES, BlobRef, DataFormat, Dataset, DataShard
from potluck.wording import be, counted

Array = np.ndarray[Any, Any]
Target = str | Sequence[str] | None
"""The name of the target, or several names; None: the source's part with a usual name."""
WEIGHT_NAME = "sample_weight"
"""The usual name of the items' weights in the loss, when the user names none."""
_NAMED = 5
_ROWS_AT_ONCE = 1 << 18
NAME_LIMIT = 500
"""How many characters of a skipped item's description are kept."""
CLASSES_LIMIT = 10_000
"""More different labels than this are not taken for classes."""


@dataclass(frozen=True)
class Roles:
    """The parts of a source, for errors: `what` they are ("columns", "arrays"), their `names`, which of them are `targets`, and the
    `usual` names of targets.
    """

    what: str
    names: tuple[str, ...]
    targets: tuple[str, ...]
    usual: tuple[str, ...]


@dataclass(frozen=True)
class Packing:
    """How a data set is packed. `put` stores a blob, `progress` gets (items done, items in all)."""

    name: str
    put: Callable[[bytes], BlobRef]
    progress: Callable[[int, int], None]
    shuffle: bool
    seed: int
    shard_bytes: int

    def order(self, labels: Array | None, count: int) -> Array:
        """Indexes of the items in packing order."""
        return shuffled(labels, count, self.seed) if self.shuffle else np.arange(count)

    def cuts(self, sizes: Sequence[int] | Array) -> list[tuple[int, int]]:
        """(start, stop) of each shard, from the sizes in bytes of the items in packing order."""
        return cuts(sizes, self.shard_bytes)

    def dataset(
        self,
        format: DataFormat,
        shards: Sequence[DataShard],
        keys: Sequence[str] | Array,
        labels: Array | None,
        skipped: Sequence[str] = (),
        remarks: Sequence[str] = (),
    ) -> Dataset:
        """The manifest. `keys` are in packing order, names or row numbers; `labels` are the class indexes of all items in any order, None without classes."""
        counts: tuple[int, ...] = ()
        if format.classes and labels is not None:
            counts = tuple(np.bincount(labels[labels >= 0], minlength=len(format.classes)).tolist())
        return Dataset(
            name=self.name,
            format=format,
            count=sum(shard.count for shard in shards),
            shards=tuple(shards),
            class_counts=counts,
            skipped=tuple(text[:NAME_LIMIT] for text in skipped),
            keys=self.put(_numbers(keys) if isinstance(keys, np.ndarray) else codec.pack(list(keys), "json")),
            remarks=tuple(remarks),
        )


def _numbers(rows: Array) -> bytes:
    """A JSON list of whole numbers. As objects of Python they would take ten times the memory, so only a part of them is at a time."""
    parts = [
        msgspec.json.encode(rows[at : at + _ROWS_AT_ONCE].tolist())[1:-1] for at in range(0, len(rows), _ROWS_AT_ONCE)
    ]
    return b"[" + b",".join(parts) + b"]"


def remarks(dataset: Dataset) -> tuple[str, ...]:
    """Sentences for users: what packing left out, and what the user may not have meant."""
    skipped = dataset.skipped
    if not skipped:
        return dataset.remarks
    total = dataset.count + len(skipped)
    return (
        f"{len(skipped)} of {counted(total, 'item')} cannot be used and {be(len(skipped))} left out: {some(skipped)}",
        *dataset.remarks,
    )


def some(names: Sequence[str]) -> str:
    """The first few names, for people."""
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def target_names(target: Target) -> tuple[str, ...]:
    """The names of a target; empty for None."""
    return (target,) if isinstance(target, str) else tuple(dict.fromkeys(target or ()))


def check_class_names(classes: Sequence[str], what: str) -> None:
    """Raises InvalidData where the names are too long for a lease and a listing; `what` has the classes."""
    if (size := sum(len(name.encode()) for name in classes)) > CLASS_NAMES_LIMIT_BYTES:
        raise InvalidData(
            f"{what}: the names of the {len(classes)} classes have {size} bytes, but only {CLASS_NAMES_LIMIT_BYTES} are allowed: "
            "give them shorter names, or numbers"
        )


def class_indexes(texts: Sequence[str], what: str) -> tuple[Array, tuple[str, ...]]:
    """(index of each text, the classes in alphabetical order). Raises InvalidData for too many classes; `what` has them."""
    classes = tuple(sorted(set(texts)))
    if not all(map(_is_sendable, classes)):
        raise InvalidData(f"{what} has texts that are not UTF-8: give its classes other names, or numbers")
    if len(classes) > CLASSES_LIMIT:
        raise InvalidData(f"{what} has {len(classes)} different texts (first: {classes[0]!r}): these cannot be classes")
    check_class_names(classes, what)
    index_of = {label: index for index, label in enumerate(classes)}
    return np.fromiter((index_of[text] for text in texts), np.int64, len(texts)), classes


def _is_sendable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns an OSError in the block into InvalidData that names the file."""
    try:
        yield
    except OSError as error:
        raise InvalidData(f"{error.filename or path} cannot be read: {error.strerror or error}") from error
