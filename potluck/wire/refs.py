"""Finds the blobs that messages refer to, and adds their holders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeVar, get_args

from msgspec import Struct
from msgspec.structs import fields, replace

from potluck.wire.commands import LeaseHints, LeaseShard
from potluck.wire.tasks import AnyTask
from potluck.wire.values import BlobRef

S = TypeVar("S")

_DIGITS = 16
"""Hints give only this many last digits of a hash, so that a lease on a large data set fits into a message. A wrong match only
costs a request in vain."""


def blob_refs(value: Any) -> Iterator[BlobRef]:
    """All blobs that a message, or a part of one, refers to."""
    if isinstance(value, BlobRef):
        yield value
    elif isinstance(value, Struct):
        for name in _ways(type(value)):
            yield from blob_refs(getattr(value, name))
    elif isinstance(value, tuple):
        for item in value:
            yield from blob_refs(item)


def locate(value: S, holders_of: Callable[[str], tuple[str, ...]]) -> S:
    """The same message, with holders in each blob reference; holders that it already names come first."""
    if isinstance(value, BlobRef):
        found = dict.fromkeys((*value.holders, *holders_of(value.sha256)))
        return replace(value, holders=tuple(found))
    if isinstance(value, Struct):
        changed = {}
        for name in _ways(type(value)):
            before = getattr(value, name)
            after = locate(before, holders_of)
            if after is not before:
                changed[name] = after
        return replace(value, **changed) if changed else value
    if isinstance(value, tuple) and value:
        return tuple(locate(item, holders_of) for item in value)  # type: ignore[return-value]
    return value


def hints_for(task: AnyTask, nodes_with: Callable[[str], tuple[str, ...]], http: tuple[str, ...]) -> LeaseHints:
    """The hints of a lease: which nodes have the blobs of its task. `http`: addresses that have all of them."""
    found = {ref.sha256[-_DIGITS:]: nodes for ref in blob_refs(task) if (nodes := nodes_with(ref.sha256))}
    return LeaseHints(http=http, holders=found)


def hinted(lease: LeaseShard) -> LeaseShard:
    """The same lease, with the holders of its hints in the blob references of its task."""
    hints = lease.hints
    return replace(
        lease, task=locate(lease.task, lambda sha256: (*hints.holders.get(sha256[-_DIGITS:], ()), *hints.http))
    )


@cache
def _ways(kind: type[Struct]) -> tuple[str, ...]:
    """The fields of a struct that may lead to a blob. Others, such as the names of ten thousand classes, are skipped."""
    return tuple(field.name for field in fields(kind) if _leads(field.type))


def _leads(kind: Any) -> bool:
    if isinstance(kind, type) and issubclass(kind, Struct):
        return issubclass(kind, BlobRef) or bool(_ways(kind))
    return any(_leads(part) for part in get_args(kind))
