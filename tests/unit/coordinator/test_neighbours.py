"""Which of two coordinators with one name gives way: never one that has something to lose, and never both."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace as replace_service
from typing import cast

import pytest
from msgspec.structs import replace

from coordinator.neighbours import ASKED_AT_ONCE, OTHERS_NAMED, Neighbours, gives_way
from potluck.bus.connecting import refusal
from potluck.credentials import Credentials
from potluck.net.discovery import Discovery, Service, precedence
from potluck.settings import BusTimings
from potluck.wire.births import CoordinatorStatus
from potluck.wire.topics import Topics

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


def around(*hosts: str) -> list[Service]:
    return [Service(host, "c", "coordinator", host, 1, 1883) for host in hosts]


class Seen:
    """The services that mDNS shows."""

    def __init__(self, *hosts: str) -> None:
        self.hosts = list(hosts)

    def services(self, role: str) -> list[Service]:
        return around(*self.hosts)


def watching(seen: Seen, answers: dict[str, CoordinatorStatus]) -> tuple[Neighbours, list[str]]:
    """The hosts in the order in which they are asked."""
    asked: list[str] = []

    class Asking(Neighbours):
        async def _ask(self, place: tuple[str, int]) -> CoordinatorStatus | None:
            asked.append(place[0])
            return answers.get(place[0])

    mine = Service("me", "c", "coordinator", "me", 1, 1883)
    return Asking(cast(Discovery, seen), mine, Topics("c"), lambda: OLD, Credentials(), BusTimings()), asked


async def test_names_that_are_made_up_starve_nobody_and_fill_nothing() -> None:
    seen = Seen("me", "real", *(f"forged-{number}" for number in range(100)))
    neighbours, asked = watching(seen, {"real": NEW})
    now = time.monotonic()
    for _ in range(60):  # the real one is drawn sooner or later: on average all come within 13 times
        chosen = neighbours._choose(now)
        assert len(chosen) <= ASKED_AT_ONCE
        for place in chosen:
            await neighbours._look(place)
    assert neighbours.others == ("real:1883",)
    assert "me" not in asked
    assert len(asked) == len(set(asked)) == 101
    seen.hosts[2:] = [f"again-{number}" for number in range(1000)]
    assert neighbours._choose(now + 31)[0] == ("real", 1883), "whoever is known to be there comes first"
    assert len(neighbours._due) <= 1
    answers = dict.fromkeys(seen.hosts[1:], NEW)
    many, _ = watching(seen, answers)
    for host in answers:
        await many._look((host, 1883))
    assert len(many.others) == OTHERS_NAMED


def of_clusters(mine: str, **others: str) -> Neighbours:
    """Neighbours of a cluster with this CA, where coordinators of others with these CAs are around, by host."""

    class Around(Seen):
        def services(self, role: str) -> list[Service]:
            return [replace_service(one, ca=others[one.host], client_port=8884) for one in around(*others)]

    own = Service("me", "c", "coordinator", "me", 1, 1883, ca=mine, client_port=8884)
    seen = cast(Discovery, Around())
    return Neighbours(seen, own, Topics("c"), lambda: OLD, Credentials(), BusTimings())


def test_nobody_visits_a_bus_of_another_ca(caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = "0123456789abcdef", "fedcba9876543210"
    found = of_clusters(ours, copied=ours, other=theirs, plain="")._choose(time.monotonic())
    # on the port for clients: on the other one we would end the connection of a coordinator with our name
    assert found == [("copied", 8884)]
    named = [one.message for one in caplog.records if "another CA" in one.message]
    assert [("host=other" in one, theirs in one, "it is open" in one) for one in sorted(named)] == [
        (True, True, False),
        (False, False, True),
    ]
    assert of_clusters("", closed=ours, plain="")._choose(time.monotonic()) == [("plain", 1883)]


async def test_who_does_not_answer_is_asked_again_soon_then_less_often() -> None:
    seen = Seen("gone")
    neighbours, asked = watching(seen, {})
    now, times = time.monotonic(), []
    for second in range(120):
        for place in neighbours._choose(now + second):
            times.append(second)
            await neighbours._look(place)
            due, waited = neighbours._due[place]
            neighbours._due[place] = due + second, waited  # by the test's clock instead of the machine's
    assert asked == ["gone"] * len(times)
    assert [later - sooner for sooner, later in itertools.pairwise(times)][:4] == [
        pytest.approx(gap, abs=1) for gap in (5, 10, 20, 30)
    ]


def test_everybody_tries_the_same_coordinator_first() -> None:
    def service(id: str, founded: int, empty: bool) -> Service:
        return Service(id, "c", "coordinator", "127.0.0.1", 1, 1883, founded=founded, empty=empty)

    empty, young, old = service("a", 1, True), service("b", 9, False), service("c", 5, False)
    assert sorted([empty, young, old], key=precedence) == [old, young, empty]


async def test_a_forged_host_name_ends_nobody() -> None:
    for host in ("a\0b", "x" * 300):
        assert await refusal(host, 1883, Credentials(), 5.0) == "not the name of a host"
