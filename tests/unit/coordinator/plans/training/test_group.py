"""A synchronous group: who its members are, and whether it holds."""

from __future__ import annotations

from typing import Any

from coordinator.plans.training import group
from coordinator.plans.training.group import Group
from potluck.wire.tasks import SyncTask
from potluck.wire.values import BlobRef, DataFormat

BLOB = BlobRef(sha256="0" * 64, size=1)


def leased(of: Group, *names: str, **parts: Any) -> None:
    for rank, name in enumerate(names):
        task = SyncTask(
            model=BLOB, data=(), format=DataFormat(kind="arrays"), image=None, members=tuple(f"{one}:1" for one in names),
            batches=(4,) * len(names), rank=rank, first_step=0, steps=8, weights=None, optimizer=None,
            **{"formation": "0.0", "begins": True, **parts},
        )  # fmt: skip
        if rank == 0:
            of.opened(task)
        of.leased(name, task)


def test_a_group_is_formed_by_its_first_round_and_goes_on_with_the_next() -> None:
    found = Group()
    leased(found, "b", "a")
    assert (found.members, found.formation, found.formed, found.whole) == (("b", "a"), "0.0", 1, True)
    found.round_closed()
    leased(found, "b", "a", begins=False)
    assert (found.members, found.formed, found.begins) == (("b", "a"), 1, False)
    assert found.batches == {"a": 4, "b": 4}


def test_it_is_no_more_when_it_broke_off_and_the_first_reason_counts() -> None:
    found = Group()
    leased(found, "a", "b")
    found.breaks_off("node b was lost")
    found.breaks_off("another member of the group is gone")
    assert (found.broken, found.whole) == ("node b was lost", False)
    leased(found, "a", formation="0.1")
    assert (found.members, found.broken, found.tries, found.formed) == (("a",), "", 1, 2)


def test_a_round_that_came_to_its_end_forgets_what_broke_off_before() -> None:
    found = Group()
    leased(found, "a", "b")
    found.breaks_off("node b was lost")
    leased(found, "a")
    found.round_closed()
    assert (found.members, found.tries) == (("a",), 0)
    found.breaks_off("node a was lost")
    found.round_closed()  # its checkpoint was written before
    assert (found.members, found.broken) == ((), "")


def test_shares_stay_until_one_is_off_by_a_tenth() -> None:
    assert group.shares(60, {"a": 20.0, "b": 10.0}, {}) == {"a": 40, "b": 20}
    assert group.shares(60, {"a": 21.0, "b": 10.0}, {"a": 40, "b": 20}) == {"a": 40, "b": 20}
    assert group.shares(60, {"a": 30.0, "b": 10.0}, {"a": 40, "b": 20}) == {"a": 45, "b": 15}
    assert group.shares(60, {"a": 20.0}, {"a": 40, "b": 20}) == {"a": 60}
    assert group.shares(4, {"a": 2.0, "b": 1.9}, {"a": 3, "b": 1}) == {"a": 3, "b": 1}, "one item is no tenth of so few"
