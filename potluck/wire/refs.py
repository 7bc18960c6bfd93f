"""Finds the blobs that messages refer to, and adds their holders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from potluck.wire.messages import BlobRef

S = TypeVar("S")


def blob_refs(value: Any) -> Iterator[BlobRef]:
    """Every blob that a message, or a part of one, names."""
    if isinstance(value, BlobRef):
        yield value
    elif isinstance(value, Struct):
        for name in value.__struct_fields__:
            yield from blob_refs(getattr(value, name))
    elif isinstance(value, tuple):
        for item in value:
            yield from blob_refs(item)


def locate(value: S, holders_of: Callable[[str], tuple[str, ...]]) -> S:
    """The same message, with holders in every blob reference; those that it already named come first."""
    if isinstance(value, BlobRef):
        found = dict.fromkeys((*value.holders, *holders_of(value.sha256)))
        return replace(value, holders=tuple(found))
    if isinstance(value, Struct):
        changed = {}
        for name in value.__struct_fields__:
            before = getattr(value, name)
            if isinstance(before, Struct | tuple):
                after = locate(before, holders_of)
                if after is not before:
                    changed[name] = after
        return replace(value, **changed) if changed else value
    if isinstance(value, tuple) and any(isinstance(item, Struct | tuple) for item in value):
        return tuple(locate(item, holders_of) for item in value)  # type: ignore[return-value]
    return value
