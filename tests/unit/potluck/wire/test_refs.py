"""Blobs in messages: all are found, and each is told who has it; what a field's type says is looked at, and not each value."""

from __future__ import annotations

import typing
from typing import Any

import pytest
from msgspec import Struct
from msgspec.structs import fields, replace

from potluck.wire.commands import LeaseHints, LeaseShard
from potluck.wire.messages import AnyMessage
from potluck.wire.refs import _ways, blob_refs, hinted, hints_for, locate
from potluck.wire.tasks import ConvertTask, ExportTask
from potluck.wire.values import BlobRef, DataFormat, DataSlice


def ref(number: int, *holders: str) -> BlobRef:
    return BlobRef(sha256=f"{number:064x}", size=1, holders=holders)


CONVERT = ConvertTask(
    model=ref(1), slices=(DataSlice(blob=ref(2), start=0, stop=1), DataSlice(blob=ref(1), start=1, stop=2)),
    format=DataFormat(kind="images", classes=("a", "b")), image=None, quantize="int8",
)  # fmt: skip


def test_all_are_found_in_order_and_however_often_they_are_named() -> None:
    assert [int(found.sha256, 16) for found in blob_refs(CONVERT)] == [1, 2, 1]
    assert list(blob_refs(DataFormat(kind="images", classes=("a", "b")))) == []
    assert list(blob_refs((ref(3), (ref(4),)))) == [ref(3), ref(4)]


def test_who_is_named_already_comes_first_and_nothing_else_changes() -> None:
    task = replace(CONVERT, model=ref(1, "old"))
    found = locate(task, lambda sha256: ("new", "old"))
    assert found.model.holders == ("old", "new")
    assert found.slices[0].blob.holders == ("new", "old")
    assert found.format is task.format
    assert task.model.holders == ("old",)
    nothing = DataFormat(kind="images", classes=("a", "b"))
    assert locate(nothing, lambda sha256: ("new",)) is nothing


def test_hints_are_for_the_blobs_that_they_name_and_the_coordinator_has_all() -> None:
    two = BlobRef(sha256="2" * 64, size=1, holders=("old",))
    lease = LeaseShard(
        epoch=1, job_id="j", shard_id="s", attempt_id="a", lease_seconds=1.0, task=ExportTask(model=ref(1), weights=two),
        hints=LeaseHints(http=("coordinator",), holders={two.sha256[-16:]: ("node",), "3" * 16: ("other",)}),
    )  # fmt: skip
    task: Any = hinted(lease).task
    everybody = replace(two, holders=("old", "node", "coordinator"))
    assert task == ExportTask(model=ref(1, "coordinator"), weights=everybody)
    told = hints_for(lease.task, lambda sha256: ("node",) if sha256 == two.sha256 else (), ("coordinator",))
    assert told == LeaseHints(http=("coordinator",), holders={two.sha256[-16:]: ("node",)})
    assert hinted(replace(lease, hints=told)) == replace(hinted(lease), hints=told)


def structs(kind: Any, seen: set[type[Struct]]) -> set[type[Struct]]:
    """All that a value of this type may contain, at any depth."""
    if isinstance(kind, type) and issubclass(kind, Struct) and kind not in seen:
        seen.add(kind)
        for field in fields(kind):
            structs(field.type, seen)
    for part in typing.get_args(kind):
        structs(part, seen)
    return seen


def maps(kind: Any) -> list[Any]:
    found = [kind] if typing.get_origin(kind) is dict else []
    return found + [one for part in typing.get_args(kind) for one in maps(part)]


@pytest.mark.parametrize("kind", sorted(structs(AnyMessage, set()), key=lambda kind: kind.__name__))
def test_no_field_that_may_hold_a_blob_is_passed_over(kind: type[Struct]) -> None:
    """Maps are not looked into, so there may be no blobs in any."""
    for field in fields(kind):
        assert (field.name in _ways(kind)) == (BlobRef in structs(field.type, set()))
        assert all(BlobRef not in structs(one, set()) for one in maps(field.type))
