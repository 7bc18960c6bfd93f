"""Events as they are kept and followed: each once, in order, over restarts, by as many as are allowed, and at nobody's cost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import pytest

from coordinator import journal as journal_module
from coordinator.events import stream
from coordinator.events.stream import FOLLOWERS_EACH, FOLLOWERS_LIMIT, PAGE_EVENTS, Events
from coordinator.journal import Journal
from coordinator.plans.events import JobStarted, JobSubmitted
from coordinator.plans.job import Job
from coordinator.registry import Registry
from potluck.errors import Overloaded, Unavailable
from potluck.wire import codec
from potluck.wire.jobs import Deploy
from potluck.wire.questions import ClusterEvent, EventsListed
from potluck.wire.values import BlobRef

KEY = ("me", "q-1")
SOON = 5.0
"""No test waits for so long."""


class House:
    """A journal with what is told of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.open()

    def open(self) -> None:
        self.journal = Journal(self.folder / "journal")
        self.jobs: dict[str, Job] = {}
        self.events = Events(self.journal, self.jobs.get, lambda: 7.0)

    def restart(self) -> None:
        self.events.close()
        self.journal.close()
        self.open()

    def tell(self, *names: str) -> None:
        for name in names:
            self.events.tell("node", name, "joined")

    async def names(self, after: int = 0, last: int = 0) -> list[str]:
        return [event.name or event.what for event in (await self.events.listed(after, last)).events]


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    made = House(tmp_path)
    yield made
    made.journal.close()


async def taken(answers: AsyncGenerator[EventsListed, None]) -> EventsListed:
    async with asyncio.timeout(SOON):
        return await anext(answers)


async def test_what_is_journaled_is_told_with_it(house: House) -> None:
    registry = Registry(house.journal)
    registry.add_model("m", BlobRef(sha256="0" * 64, size=1), source="a file", now=1.0)
    submitted = JobSubmitted(at=1.0, job_id="j", request_id="", spec=Deploy(model="m:1"))
    house.journal.append("job/j", submitted)
    house.jobs["j"] = Job(submitted, None)
    house.journal.append_soon("job/j", JobStarted(at=2.0))
    assert (await house.events.listed(0)).events == (
        ClusterEvent(number=1, at=7.0, subject="model", name="m:1", what="registered", text="a file"),
        ClusterEvent(number=2, at=7.0, subject="job", name="j", what="submitted", text="deploy m:1"),
        ClusterEvent(number=3, at=7.0, subject="job", name="j", what="started", text="deploy"),
    )


async def test_of_what_could_not_be_written_nothing_is_told(house: House) -> None:
    registry = Registry(house.journal)
    pages = house.journal._db.execute("PRAGMA page_count").fetchone()[0]
    house.journal._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(Unavailable):
        registry.add_model("m", BlobRef(sha256="0" * 64, size=1), source="s" * 50_000, now=1.0)
    house.journal._db.execute(f"PRAGMA max_page_count = {pages + 99}")
    house.tell("a")
    assert await house.names() == ["a"]


async def test_a_full_disk_fails_nothing_that_is_only_told(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does what is told take the room of the journal's own events; the newest of it waits."""
    monkeypatch.setattr(journal_module, "TOLD_WAITING", 20)
    full = house.journal._db.execute("PRAGMA page_count").fetchone()[0] + 1
    house.journal._db.execute(f"PRAGMA max_page_count = {full}")
    for number in range(100):
        house.events.tell("node", f"n{number}", "joined", "x" * 200)
        house.journal.flush()
    assert house.journal.empty
    house.journal.append("job/j", JobStarted(at=2.0))
    assert not house.journal.empty
    house.journal._db.execute(f"PRAGMA max_page_count = {full + 99}")
    house.journal.flush()
    assert (await house.names())[-2:] == ["n98", "n99"]


async def test_one_that_was_asked_again_while_it_read_says_nothing(house: House) -> None:
    house.tell("a")
    before = house.events.follow(0, 30, KEY)
    reading = asyncio.create_task(taken(before), name="reading")
    await asyncio.sleep(0)  # it is on its way to the journal
    again = house.events.follow(0, 30, KEY)
    with pytest.raises(StopAsyncIteration):
        await reading
    assert [event.name for event in (await taken(again)).events] == ["a"]
    await again.aclose()


async def test_what_cannot_be_told_still_happens(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(*_: object) -> None:
        raise ValueError("a defect")

    monkeypatch.setattr(stream, "told", told)
    registry = Registry(house.journal)
    registry.add_model("m", BlobRef(sha256="0" * 64, size=1), now=1.0)
    assert registry.model("m").version == 1
    assert await house.names() == []


async def test_nothing_that_is_told_makes_a_journal_one_that_keeps_something(house: House) -> None:
    house.tell("a")
    assert house.journal.empty


async def test_pages_of_what_has_happened(house: House) -> None:
    house.tell(*(f"n{number}" for number in range(1, 251)))
    first = await house.events.listed(0)
    assert (first.after, first.last, first.more, len(first.events)) == (0, PAGE_EVENTS, True, PAGE_EVENTS)
    found, after = list(first.events), first.last
    while first.more:
        first = await house.events.listed(after)
        found, after = [*found, *first.events], first.last
    assert [event.number for event in found] == list(range(1, 251))
    newest = await house.events.listed(0, 3)
    assert (newest.after, newest.last, newest.more) == (247, 250, False)
    assert [event.name for event in newest.events] == ["n248", "n249", "n250"]
    assert await house.names(250) == []


async def test_a_page_of_the_longest_events_fits_into_a_message(house: House) -> None:
    for _ in range(PAGE_EVENTS):
        house.events.tell("deployment", "n" * 140, "undeployed", "\x00" * 1000)
    for encoding in codec.CONTENT_TYPES:
        assert len(codec.encode(await house.events.listed(0), encoding)) > 30_000


async def test_who_follows_is_told_once_and_in_order_over_a_restart(house: House) -> None:
    house.tell("a", "b")
    answers = house.events.follow(None, 30, KEY)
    assert await taken(answers) == EventsListed(after=2, last=2)
    waiting = asyncio.create_task(taken(answers))
    await asyncio.sleep(0)
    house.tell("c", "d")
    page = await waiting
    assert [(event.number, event.name) for event in page.events] == [(3, "c"), (4, "d")]
    house.restart()
    with pytest.raises(StopAsyncIteration):
        await taken(answers)
    house.tell("e")
    again = house.events.follow(page.last, 30, KEY)
    assert [(event.number, event.name) for event in (await taken(again)).events] == [(5, "e")]
    await again.aclose()


async def test_what_happens_while_a_follower_looks_away_is_told_when_it_looks(house: House) -> None:
    answers = house.events.follow(0, 30, KEY)
    assert (await taken(answers)).events == ()
    house.tell(*(f"n{number}" for number in range(1, 151)))
    pages = [await taken(answers), await taken(answers)]
    assert [(page.after, page.last, page.more) for page in pages] == [(0, 100, True), (100, 150, False)]
    await answers.aclose()


async def test_who_is_too_far_behind_is_told_so(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.journal.TOLD_KEPT", 5)
    house.tell("a", "b")
    answers = house.events.follow(0, 30, KEY)
    assert [event.name for event in (await taken(answers)).events] == ["a", "b"]
    for number in range(3, 21):
        house.tell(f"n{number}")
        house.journal.flush()
    page = await taken(answers)
    missed, *kept = page.events
    assert (missed.subject, missed.what, missed.number) == ("events", "missed", 15)
    assert missed.text == "3 to 15 are not kept any more"
    assert [event.number for event in kept] == [16, 17, 18, 19, 20]
    assert await house.names() == ["n16", "n17", "n18", "n19", "n20"], "who asks for all that is kept misses nothing"
    assert await house.names(0, 10) == ["n16", "n17", "n18", "n19", "n20"]
    assert await house.names(missed.number) == ["n16", "n17", "n18", "n19", "n20"]
    await answers.aclose()


async def test_who_comes_from_a_journal_that_is_lost_goes_on_with_this_one(house: House) -> None:
    house.tell("a", "b")
    answers = house.events.follow(500, 30, KEY)
    page = await taken(answers)
    assert [(event.what, event.number) for event in page.events] == [("missed", 2)]
    assert (page.after, page.last) == (500, 2)
    house.tell("c")
    assert [event.name for event in (await taken(answers)).events] == ["c"]
    await answers.aclose()


async def test_it_ends_by_itself_and_leaves_nothing(house: House) -> None:
    answers = house.events.follow(None, 0.05, KEY)
    assert await taken(answers) == EventsListed(after=0, last=0)
    with pytest.raises(StopAsyncIteration):
        await taken(answers)
    assert house.events._followers == {}


async def test_asked_again_it_goes_on_and_what_was_before_ends(house: House) -> None:
    house.tell("a")
    before = house.events.follow(0, 30, KEY)
    assert (await taken(before)).last == 1
    waiting = asyncio.create_task(taken(before))
    await asyncio.sleep(0)
    after = house.events.follow(1, 30, KEY)
    with pytest.raises(StopAsyncIteration):
        await waiting
    house.tell("b")
    assert [event.name for event in (await taken(after)).events] == ["b"]
    ended = house.events.follow(1, 0, KEY)
    for answers in (after, ended):
        with pytest.raises(StopAsyncIteration):
            await taken(answers)
    assert house.events._followers == {}


async def test_only_so_many_follow(house: House) -> None:
    for number in range(FOLLOWERS_EACH):
        house.events.follow(None, 30, ("me", str(number)))
    with pytest.raises(Overloaded, match=f"{FOLLOWERS_EACH} of them are yours"):
        house.events.follow(None, 30, ("me", "one more"))
    house.events.follow(None, 30, ("me", "0"))
    for number in range(FOLLOWERS_LIMIT - FOLLOWERS_EACH):
        house.events.follow(None, 30, (f"other {number}", "q"))
    with pytest.raises(Overloaded):
        house.events.follow(None, 30, ("another", "q"))


async def test_who_asked_and_never_took_an_answer_makes_room_when_its_time_is_over(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "FOLLOWERS_LIMIT", 1)
    house.events.follow(None, 0, KEY)
    await house.events.follow(None, 30, ("another", "q")).aclose()


async def test_nobody_follows_a_coordinator_that_stops(house: House) -> None:
    answers = house.events.follow(None, 30, KEY)
    await taken(answers)
    house.events.close()
    with pytest.raises(StopAsyncIteration):
        await taken(answers)
    with pytest.raises(Unavailable, match="the coordinator stops"):
        house.events.follow(None, 30, KEY)
