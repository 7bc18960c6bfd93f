"""The events of the cluster, kept and followed: the journal keeps them, and each follower reads them there at its own pace.

So a follower needs no queue. A slow follower falls behind. If it falls behind by more than is kept, it is told that it missed
events. A follower costs one read for each message that it takes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from msgspec import Struct
from msgspec.structs import replace

from coordinator.events.telling import made, told
from coordinator.journal import Journal
from coordinator.plans.job import Job
from potluck.errors import Overloaded, Unavailable
from potluck.surviving import as_defect
from potluck.wire import codec
from potluck.wire.questions import ClusterEvent, EventsListed

PAGE_EVENTS = 100
"""Events in one message: this many fit, with texts in any language."""
FOLLOWERS_LIMIT = 64
FOLLOWERS_EACH = 8
"""Followers of one caller."""
RETRY_SECONDS = 5.0

Key = tuple[str, str]
"""The caller that follows, and the id of its question."""


@dataclass
class _Follower:
    """`until` is a time of the loop's clock."""

    until: float
    _over: bool = False
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def over(self) -> bool:
        """Whether it was ended."""
        return self._over

    def end(self) -> None:
        self._over = True
        self.news.set()


class Events:
    """The events of the cluster, from the journal's events and from `tell`."""

    def __init__(
        self, journal: Journal, job: Callable[[str], Job | None], clock: Callable[[], float] = time.time
    ) -> None:
        """`job` returns a job by its id."""
        self._journal = journal
        self._job = job
        self._clock = clock
        self._followers: dict[Key, _Follower] = {}
        self._closed = False
        journal.watch(self._appended)

    def tell(self, subject: str, name: str, what: str, text: str = "") -> None:
        """Add an event that is not in the journal otherwise."""
        self._tell(made(self._clock(), subject, name, what, text))

    async def listed(self, after: int, last: int = 0) -> EventsListed:
        """A page of the events after the number `after`: the oldest of them, or with `last`, the oldest of that many newest ones.

        If events are not kept any more, a special event says so. Raises Unavailable as the journal does.
        """
        found = await self._journal.told(after, PAGE_EVENTS)
        if last and found.newest - after > last:
            after = max(found.newest - last, found.oldest - 1)
            found = await self._journal.told(after, PAGE_EVENTS)
        events = [replace(codec.unpack(body, ClusterEvent), number=number) for number, body in found.rows]
        if after > found.newest:  # the number is from a lost journal
            text = f"{after} is not reached: the journal is another one, or lost its end"
            events = [replace(made(self._clock(), "events", "", "missed", text), number=found.newest)]
        elif events and events[0].number > after + 1 and after:
            gone = events[0].number - 1
            text = f"{after + 1} to {gone} are not kept any more"
            events = [replace(made(self._clock(), "events", "", "missed", text), number=gone), *events]
        reached = events[-1].number if events else after
        return EventsListed(after=after, last=reached, events=tuple(events), more=reached < found.newest)

    def follow(self, after: int | None, seconds: float, key: Key) -> AsyncGenerator[EventsListed, None]:
        """Pages of the events after the number `after` (None: from now on) as they happen; the first at once, even if empty.

        It ends after `seconds`, when the same `key` asks again, and when the coordinator stops. Raises Overloaded, Unavailable.
        """
        if self._closed:
            raise Unavailable("the coordinator stops: ask again when it is back")
        now = asyncio.get_running_loop().time()
        if (before := self._followers.pop(key, None)) is not None:
            before.end()
        self._followers = {one: follower for one, follower in self._followers.items() if follower.until > now}
        mine = sum(caller == key[0] for caller, _ in self._followers)
        if len(self._followers) >= FOLLOWERS_LIMIT or mine >= FOLLOWERS_EACH:
            raise Overloaded(
                f"events are followed by {len(self._followers)} already, and {mine} of them are yours: "
                f"{FOLLOWERS_LIMIT} are allowed, {FOLLOWERS_EACH} of each",
                retry_after_seconds=RETRY_SECONDS,
            )
        follower = self._followers[key] = _Follower(now + seconds)
        return self._pages(after, key, follower)

    def close(self) -> None:
        """End all followers."""
        self._closed = True
        for follower in self._followers.values():
            follower.end()

    async def _pages(self, after: int | None, key: Key, follower: _Follower) -> AsyncGenerator[EventsListed, None]:
        loop = asyncio.get_running_loop()
        try:
            if after is None:
                after = (await self._journal.told(0, 0)).newest
            first = True
            while not follower.over() and loop.time() < follower.until:
                follower.news.clear()
                page = await self.listed(after)
                if follower.over():  # whoever asked again gets it there
                    return
                if page.events or first:
                    yield page
                after, first = page.last, False
                if not page.more and not follower.over():
                    await _within(follower.news, follower.until)
        finally:
            if self._followers.get(key) is follower:
                del self._followers[key]

    def _appended(self, stream: str, events: Sequence[Struct]) -> None:
        """The journal is about to write these."""
        job = self._job(stream.removeprefix("job/")) if stream.startswith("job/") else None
        for event in events:
            try:
                if (said := told(event, job, self._clock())) is not None:
                    self._tell(said)
            except Exception as error:  # noqa: BLE001 - what cannot be told still happens
                as_defect(error, f"telling of {type(event).__name__}")

    def _tell(self, event: ClusterEvent) -> None:
        self._journal.tell_soon(event)
        for follower in self._followers.values():
            follower.news.set()


async def _within(news: asyncio.Event, until: float) -> None:
    """Return when there is something new, or at that time of the loop."""
    try:
        async with asyncio.timeout_at(until):
            await news.wait()
    except TimeoutError:
        return
