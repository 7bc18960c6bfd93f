"""What packing is the same for every source: where shards go, in which order, how large, and who is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from potluck.data.order import cuts, shuffled
from potluck.errors import InvalidData
from potluck.wire import codec
from potluck.wire.messages import CLASS_NAMES_LIMIT_BYTES, BlobRef, DataFormat, Dataset, DataShard
from potluck.wording import be, counted

Array = np.ndarray[Any, Any]
Target = str | Sequence[str] | None
"""The name of what is to be learned, or several of them; None: what has one of the usual names."""
WEIGHT_NAME = "sample_weight"
"""The name of what holds the weights of the items in the loss, when none is named."""
_NAMED = 5
NAME_LIMIT = 500
"""Signs that are kept of what is said of an item that was left out."""
CLASSES_LIMIT = 10_000
"""More classes than that are taken for something else than classes."""


@dataclass(frozen=True)
class Roles:
    """What a source has, for errors: its `what` ("columns", "arrays") by `names`, those of them that are the target, and `usual`, the
    names by which a target is known when none is named.
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
        """Indexes of the items in the order in which they are packed."""
        return shuffled(labels, count, self.seed) if self.shuffle else np.arange(count)

    def cuts(self, sizes: Sequence[int] | Array) -> list[tuple[int, int]]:
        """(start, stop) of each shard, for the sizes in bytes of items in packing order."""
        return cuts(sizes, self.shard_bytes)

    def dataset(
        self,
        format: DataFormat,
        shards: Sequence[DataShard],
        keys: Sequence[str | int],
        labels: Array | None,
        skipped: Sequence[str] = (),
        remarks: Sequence[str] = (),
    ) -> Dataset:
        """The manifest. `keys` in packing order; `labels` are class indexes of all items in any order, where they have classes."""
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
            keys=self.put(codec.pack(list(keys), "json")),
            remarks=tuple(remarks),
        )


def remarks(dataset: Dataset) -> tuple[str, ...]:
    """Sentences about all that packing left out, and what whoever gave the data may not have meant: what users are told."""
    skipped = dataset.skipped
    if not skipped:
        return dataset.remarks
    total = dataset.count + len(skipped)
    return (
        f"{len(skipped)} of {counted(total, 'item')} cannot be used and {be(len(skipped))} left out: {some(skipped)}",
        *dataset.remarks,
    )


def some(names: Sequence[str]) -> str:
    """For people: the first of them."""
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def target_names(target: Target) -> tuple[str, ...]:
    """The names of a target: none where it is None."""
    return (target,) if isinstance(target, str) else tuple(dict.fromkeys(target or ()))


def check_class_names(classes: Sequence[str], what: str) -> None:
    """Raises InvalidData where they do not go into a lease and a listing; `what` has them."""
    if (size := sum(len(name.encode()) for name in classes)) > CLASS_NAMES_LIMIT_BYTES:
        raise InvalidData(
            f"{what}: the names of the {len(classes)} classes have {size} bytes, {CLASS_NAMES_LIMIT_BYTES} are allowed: "
            "give them shorter names, or numbers"
        )


def class_indexes(texts: Sequence[str], what: str) -> tuple[Array, tuple[str, ...]]:
    """(index of each text, the classes in the order of the alphabet). Raises InvalidData for too many; `what` names them."""
    classes = tuple(sorted(set(texts)))
    if len(classes) > CLASSES_LIMIT:
        raise InvalidData(f"{what} has {len(classes)} different texts (first: {classes[0]!r}): these are no classes")
    check_class_names(classes, what)
    index_of = {label: index for index, label in enumerate(classes)}
    return np.fromiter((index_of[text] for text in texts), np.int64, len(texts)), classes


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raises InvalidData, naming the file, for an OSError within."""
    try:
        yield
    except OSError as error:
        raise InvalidData(f"{error.filename or path} cannot be read: {error.strerror or error}") from error
