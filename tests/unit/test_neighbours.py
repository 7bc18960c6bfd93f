"""Of two coordinators of one name, which goes: never one that has something to lose, and never both."""

from __future__ import annotations

import itertools

import pytest
from msgspec.structs import replace

from coordinator.neighbours import gives_way
from potluck.discovery import Service, precedence
from potluck.messages import CoordinatorStatus
from potluck.network import refusal

OLD = CoordinatorStatus(session="a", epoch=1, state="online", cluster_id="0b", founded=100.0)
NEW = CoordinatorStatus(session="b", epoch=2, state="online", cluster_id="0a", founded=200.0)


@pytest.mark.parametrize(
    ("ours", "theirs", "goes"),
    [
        (replace(NEW, empty=True), OLD, True),
        (replace(OLD, empty=True), NEW, True),
        (replace(NEW, empty=True), replace(OLD, empty=True), True),
        (replace(OLD, empty=True), replace(NEW, empty=True), False),
        (NEW, OLD, False),
        (OLD, NEW, False),
        (NEW, replace(OLD, empty=True), False),
        (replace(NEW, empty=True), CoordinatorStatus(session="c", epoch=1, state="online"), True),
    ],
)
def test_who_has_nothing_to_lose_gives_way(ours: CoordinatorStatus, theirs: CoordinatorStatus, goes: bool) -> None:
    assert gives_way(ours, theirs) == goes


def test_two_never_give_way_to_each_other() -> None:
    some = [replace(one, empty=empty, founded=at) for one in (OLD, NEW) for empty in (True, False) for at in (1.0, 2.0)]
    for one, other in itertools.permutations(some, 2):
        assert one.cluster_id == other.cluster_id or not (gives_way(one, other) and gives_way(other, one))


def test_everybody_tries_the_same_coordinator_first() -> None:
    def service(id: str, founded: int, empty: bool) -> Service:
        return Service(id, "c", "coordinator", "127.0.0.1", 1, 1883, founded=founded, empty=empty)

    empty, young, old = service("a", 1, True), service("b", 9, False), service("c", 5, False)
    assert sorted([empty, young, old], key=precedence) == [old, young, empty]


async def test_a_forged_host_name_ends_nobody() -> None:
    for host in ("a\0b", "x" * 300):
        assert await refusal(host, 1883, 5.0) == "not the name of a host"
