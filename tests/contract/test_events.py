"""Events followed over MQTT, with a real broker, and over HTTP: each once and in order, whatever restarts."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from coordinator.control import Control
from coordinator.events.stream import FOLLOWERS_EACH, Events
from coordinator.gateway.answers import in_words
from coordinator.gateway.events import FollowedEvents
from coordinator.journal import Journal
from coordinator.requests import Requests
from potluck.blobs.store import BlobStore
from potluck.bus.mqtt import Bus, MqttBus
from potluck.bus.outbox import Outbox
from potluck.client import AsyncClient, Client
from potluck.credentials import Credentials
from potluck.errors import Overloaded
from potluck.net.http import serve_http
from potluck.settings import BusTimings
from potluck.wire import codec
from potluck.wire.births import CoordinatorStatus
from potluck.wire.questions import ClusterEvent, EventsListed, FollowEvents
from potluck.wire.topics import Topics
from potluck.wire.values import Message
from support.brokers import TestBroker, some_kind
from support.eventually import eventually
from support.fake_bus import FakeBroker, FakeBus

TOPICS = Topics("events")
QUICK = BusTimings(connect_timeout_seconds=5.0, reconnect_min_seconds=0.05, reconnect_max_seconds=0.2)
Follow = Callable[[int | None], AsyncGenerator[ClusterEvent, None]]


class Core:
    """As much of a coordinator as events need; `start` and `stop` it as often as you like."""

    def __init__(self, make_bus: Callable[[], Bus], folder: Path) -> None:
        self._make_bus = make_bus
        self._folder = folder
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._sock.getsockname()[1]}"

    async def start(self) -> None:
        self._stack = AsyncExitStack()
        self.journal = Journal(self._folder / "journal")
        self._stack.callback(self.journal.close)
        self.events = Events(self.journal, lambda job_id: None)
        nothing: Any = None
        control = Control(
            dispatcher=nothing, registry=nothing, serving=nothing, membership=nothing, deletion=nothing, packed=nothing, holders=nothing,
            store=BlobStore(self._folder / "blobs", 1), urls=tuple, sync=self.journal.sync, events=self.events,
        )  # fmt: skip
        self.bus = self._make_bus()
        outbox = Outbox(self.bus, before=self.journal.flush)
        requests = Requests(outbox, control, self.bus.reply)
        self.bus.subscribe(TOPICS.coordinator_inbox, requests.on_request)

        async def announce() -> None:
            status = CoordinatorStatus(session=f"s{self.journal.epoch}", epoch=self.journal.epoch, state="online")
            await self.bus.publish(TOPICS.coordinator_status, status, retain=True)

        self.bus.on_connect(announce)
        running = [asyncio.create_task(part, name="core") for part in (self.bus.run(), outbox.run(), requests.run())]

        async def end() -> None:
            for task in running:
                task.cancel()
            await asyncio.wait(running)

        self._stack.push_async_callback(end)
        sock = self._sock.dup()
        await self._stack.enter_async_context(
            serve_http(sock, FollowedEvents(control).routes(), Credentials(), (in_words,))
        )
        await self.bus.connected(10)

    async def stop(self) -> None:
        self.events.close()
        await self._stack.aclose()

    def tell(self, *names: str) -> None:
        for name in names:
            self.events.tell("node", name, "joined")


@asynccontextmanager
async def started(core: Core) -> AsyncIterator[Core]:
    await core.start()
    try:
        yield core
    finally:
        await core.stop()
        core._sock.close()


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[TestBroker]:
    started = TestBroker(some_kind(), tmp_path)
    await started.start()
    yield started
    await started.stop()


@pytest.fixture
async def core(broker: TestBroker, tmp_path: Path) -> AsyncIterator[Core]:
    made = Core(
        lambda: MqttBus(broker.address, TOPICS, Credentials(), client_id="coordinator", timings=QUICK), tmp_path
    )
    async with started(made):
        yield made


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("potluck.client.events.ASK_SECONDS", 0.2)
    monkeypatch.setattr("coordinator.gateway.events.KEEP_ALIVE_SECONDS", 0.2)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


@pytest.fixture
async def client(core: Core, broker: TestBroker) -> AsyncIterator[AsyncClient]:
    bus = MqttBus(broker.address, TOPICS, Credentials(), client_id="me", timings=QUICK)
    async with AsyncClient(timeout=5, cluster="events", bus=bus) as connected:
        yield connected


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as opened:
        yield opened


def as_browsers_do(core: Core, session: aiohttp.ClientSession, comments: list[str] | None = None) -> Follow:
    """An EventSource (WHATWG HTML, 9.2): when it is cut off, it reconnects with the last id that it had."""

    async def follow(after: int | None) -> AsyncGenerator[ClusterEvent, None]:
        last = "" if after is None else str(after)
        while True:
            headers = {"Last-Event-ID": last} if last else {}
            try:
                async with session.get(f"{core.url}/v1/events", headers=headers) as response:
                    assert (response.status, response.content_type) == (200, "text/event-stream")
                    data = ""
                    async for line in response.content:
                        name, _, text = line.decode().rstrip("\n").partition(": ")
                        if name == "id":
                            last = text
                        elif name == "data":
                            data = text
                        elif not name and text and comments is not None:
                            comments.append(text)
                        elif not name and data:
                            yield ClusterEvent(**json.loads(data))
                            data = ""
            except aiohttp.ClientError:
                await asyncio.sleep(0.05)  # as an EventSource waits before it connects anew

    return follow


@pytest.fixture(params=["mqtt", "http"])
def follow(request: pytest.FixtureRequest, core: Core, client: AsyncClient, session: aiohttp.ClientSession) -> Follow:
    async def over_mqtt(after: int | None) -> AsyncGenerator[ClusterEvent, None]:
        async with aclosing(await client.events(after, follow=True)) as events:
            async for event in events:
                yield event

    return over_mqtt if request.param == "mqtt" else as_browsers_do(core, session)


class Heard:
    """What a follower has received, in its own task."""

    def __init__(self, source: AsyncGenerator[ClusterEvent, None]) -> None:
        self.events: list[ClusterEvent] = []
        self._task = asyncio.create_task(self._hear(source), name="follower")

    async def _hear(self, source: AsyncGenerator[ClusterEvent, None]) -> None:
        async with aclosing(source):
            async for event in source:
                self.events.append(event)

    @property
    def names(self) -> list[str]:
        return [event.name or event.what for event in self.events]

    async def end(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])


async def test_what_happens_is_told_as_it_happens(core: Core, follow: Follow) -> None:
    core.tell("before")
    heard = Heard(follow(None))
    await eventually(lambda: len(core.events._followers) == 1)
    core.tell("a", "b")
    await eventually(lambda: heard.names == ["a", "b"])
    core.tell("c")
    await eventually(lambda: heard.names == ["a", "b", "c"])
    assert [event.number for event in heard.events] == [2, 3, 4]
    await heard.end()
    await eventually(lambda: not core.events._followers)


async def test_a_follower_that_comes_back_continues_where_it_was(core: Core, follow: Follow) -> None:
    core.tell(*(f"n{number}" for number in range(1, 251)))
    heard = Heard(follow(7))
    await eventually(lambda: heard.names == [f"n{number}" for number in range(8, 251)])
    await heard.end()


async def test_a_coordinator_that_is_started_anew_tells_nothing_twice_and_leaves_nothing_out(
    core: Core, follow: Follow
) -> None:
    heard = Heard(follow(0))
    core.tell("a", "b")
    await eventually(lambda: heard.names == ["a", "b"])
    await core.stop()
    await core.start()
    core.tell("c", "d")
    await eventually(lambda: heard.names == ["a", "b", "c", "d"], 20)
    core.tell("e")
    await eventually(lambda: heard.names == ["a", "b", "c", "d", "e"])
    await heard.end()


async def test_who_was_away_for_too_long_is_told_so(
    core: Core, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.journal.TOLD_KEPT", 3)
    for number in range(1, 11):
        core.tell(f"n{number}")
        core.journal.flush()
    heard = Heard(follow(2))
    await eventually(lambda: heard.names == ["missed", "n8", "n9", "n10"])
    assert heard.events[0].text == "3 to 7 are not kept any more"
    await heard.end()


async def test_a_connection_that_is_lost_costs_no_event(core: Core, client: AsyncClient, broker: TestBroker) -> None:
    heard = Heard(await client.events(0, follow=True))
    core.tell("a")
    await eventually(lambda: heard.names == ["a"])
    await broker.kill()
    core.tell("b")
    await broker.start()
    core.tell("c")
    await eventually(lambda: heard.names == ["a", "b", "c"], 20)
    await heard.end()


async def test_an_answer_that_is_lost_or_comes_twice_changes_nothing(tmp_path: Path) -> None:
    broker = FakeBroker()
    lost: list[bytes] = []

    def loses(topic: str, payload: bytes) -> bool:
        """Whether an answer is lost: every second one that has events. The first one is delivered twice."""
        told = codec.decode(payload)[0]
        if not isinstance(told, EventsListed) or not told.events:
            return False
        lost.append(payload)
        if len(lost) == 1:
            broker.drop = lambda topic, payload: False
            broker.publish(topic, payload, 1, False, None)
            broker.drop = loses
        return len(lost) % 2 == 0

    broker.drop = loses
    async with started(Core(lambda: FakeBus(broker, TOPICS, client_id="coordinator"), tmp_path)) as core:
        bus = FakeBus(broker, TOPICS, client_id="me")
        async with AsyncClient(timeout=5, cluster="events", bus=bus) as client:
            heard = Heard(await client.events(0, follow=True))
            names = [f"n{number}" for number in range(1, 11)]
            for count, name in enumerate(names, 1):
                core.tell(name)
                await eventually(lambda: len(heard.events) == count)  # noqa: B023
            assert heard.names == names
            assert len(lost) > len(names)
            await heard.end()


async def test_a_follower_that_is_gone_is_told_nothing_more(core: Core, broker: TestBroker) -> None:
    bus = MqttBus(broker.address, TOPICS, Credentials(), client_id="foreign", timings=QUICK)
    running = asyncio.create_task(bus.run(), name="foreign")
    await bus.connected(5)
    answers: list[Message] = []
    bus.subscribe("answers/me", lambda envelope: answers.append(envelope.message))
    question = FollowEvents(id="q-1", reply_to="answers/me", after=0, seconds=0.5)
    await bus.publish(TOPICS.coordinator_inbox, question, encoding="json")
    await eventually(lambda: answers == [EventsListed(id="q-1", after=0, last=0)])
    core.tell("a")
    await eventually(lambda: len(answers) == 2)
    await eventually(lambda: not core.events._followers)
    core.tell("b")
    await bus.publish(TOPICS.coordinator_inbox, FollowEvents(id="q-2", reply_to="answers/me", after=1, seconds=0.2))
    await eventually(lambda: len(answers) == 3)
    assert [answer.id for answer in answers] == ["q-1", "q-1", "q-2"]
    running.cancel()
    await asyncio.wait([running])


async def test_events_that_are_kept(core: Core, client: AsyncClient) -> None:
    core.tell(*(f"n{number}" for number in range(1, 251)))

    async def names(**options: Any) -> list[str]:
        return [event.name async for event in await client.events(**options)]

    assert await names() == [f"n{number}" for number in range(1, 251)]
    assert await names(after=248) == ["n249", "n250"]
    assert await names(last=2) == ["n249", "n250"]
    assert await names(after=249, last=5) == ["n250"]
    assert len(await names(last=150)) == 150


async def test_a_program_without_asyncio_follows_too(core: Core, broker: TestBroker) -> None:
    core.tell("a", "b")

    def work() -> tuple[list[str], list[str]]:
        with Client(f"127.0.0.1:{broker.port}", cluster="events", timeout=5) as client:
            kept = [event.name for event in client.events()]
            following = client.events(follow=True, last=1)
            return kept, [next(following).name, next(following).name]

    working = asyncio.create_task(asyncio.to_thread(work))
    await eventually(lambda: len(core.events._followers) == 1)
    core.tell("c")
    assert await working == (["a", "b"], ["b", "c"])


async def test_the_command_line_shows_and_follows(core: Core, broker: TestBroker) -> None:
    core.tell("a", "b", "c")

    @asynccontextmanager
    async def run(*options: str) -> AsyncIterator[asyncio.subprocess.Process]:
        command = ("-m", "potluck.cli.main", "--seed", f"127.0.0.1:{broker.port}", "--cluster", "events", "events")
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command, *options, stdout=asyncio.subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's background ignores it
        )  # fmt: skip
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    async with run("--last", "2", "--json") as once:
        said, _ = await once.communicate()
    assert [event["name"] for event in json.loads(said)] == ["b", "c"]
    async with run("--after", "1") as once:
        said, _ = await once.communicate()
    assert [line.split()[:1] for line in said.decode().splitlines()] == [["number"], ["2"], ["3"]]
    async with (
        run("-f", "-n", "1", "--json") as following,
        run("-f", "-n", "0", "--after", "1", "--json") as only_new,
    ):
        assert following.stdout is not None
        assert json.loads(await following.stdout.readline())["name"] == "c"
        await eventually(lambda: len(core.events._followers) == 2)
        core.tell("d")
        for process in (following, only_new):
            assert process.stdout is not None
            assert json.loads(await process.stdout.readline())["name"] == "d"
            process.send_signal(signal.SIGINT)
            assert await asyncio.wait_for(process.wait(), 20) == 130
    await eventually(lambda: not core.events._followers)


async def test_the_number_of_followers_is_limited(
    core: Core, client: AsyncClient, session: aiohttp.ClientSession
) -> None:
    for number in range(FOLLOWERS_EACH):
        core.events.follow(None, 30, ("http 127.0.0.1", str(number)))
    async with session.get(f"{core.url}/v1/events") as response:
        assert (response.status, response.headers["Retry-After"]) == (429, "5")
        assert f"{FOLLOWERS_EACH} of them are yours" in (await response.json())["error"]
    for number in range(64 - FOLLOWERS_EACH):
        core.events.follow(None, 30, (f"other {number}", "q"))
    with pytest.raises(Overloaded):
        await anext(await client.events(follow=True))


async def test_over_http_signs_of_life_come_when_nothing_happens(core: Core, session: aiohttp.ClientSession) -> None:
    comments: list[str] = []
    heard = Heard(as_browsers_do(core, session, comments)(None))
    await eventually(lambda: len(comments) >= 3)
    assert set(comments) == {"nothing has happened"}
    core.tell("a")
    await eventually(lambda: heard.names == ["a"])
    await heard.end()


@pytest.mark.parametrize("query", ["?after=-1", "?after=x", "?after=1e3", f"?after={10**15}"])
async def test_an_invalid_event_number_is_refused(core: Core, session: aiohttp.ClientSession, query: str) -> None:
    async with session.get(f"{core.url}/v1/events{query}") as response:
        assert response.status == 400
        assert "is not the number of an event" in (await response.json())["error"]


async def test_the_query_says_where_to_begin_until_an_event_came(core: Core, session: aiohttp.ClientSession) -> None:
    core.tell("a", "b", "c")
    for headers, first in (({}, b"id: 2\n"), ({"Last-Event-ID": "2"}, b"id: 3\n")):
        async with session.get(f"{core.url}/v1/events?after=1", headers=headers) as response:
            assert await response.content.readline() == first
    async with session.head(f"{core.url}/v1/events") as response:
        assert response.status == 405


async def test_a_coordinator_that_stops_ends_its_streams_properly(core: Core, session: aiohttp.ClientSession) -> None:
    async with session.get(f"{core.url}/v1/events") as response:
        assert await response.content.readline() == b": nothing has happened\n"
        await core.stop()
        await response.content.read()  # raises where it was cut off
    await core.start()
