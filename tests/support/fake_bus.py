"""A broker in memory, with retained messages, wills and message loss on demand; and a Bus on it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from potluck.bus.exchange import Bus, Will
from potluck.bus.filters import matches
from potluck.bus.properties import Mirrored
from potluck.errors import PotluckError, Unavailable
from potluck.settings import BusTimings
from potluck.wire import codec
from potluck.wire.topics import Topics
from potluck.wire.values import Message


class FakeBroker:
    """Delivers in order, each message in its own turn of the loop. `up` False: no client is or gets connected."""

    def __init__(self) -> None:
        self.retained: dict[str, tuple[bytes, int, Mirrored | None]] = {}
        self.published: list[tuple[str, bytes]] = []
        self.drop: Callable[[str, bytes], bool] = lambda topic, payload: False
        """Messages for which this returns true are lost after the broker has taken them."""
        self.up = True
        self._clients: dict[str, FakeBus] = {}

    def attach(self, bus: FakeBus) -> None:
        before = self._clients.pop(bus.client_id, None)
        if before is not None and before is not bus:
            before._lose()
        self._clients[bus.client_id] = bus

    def detach(self, bus: FakeBus, *, abruptly: bool) -> None:
        if self._clients.get(bus.client_id) is bus:
            del self._clients[bus.client_id]
            if abruptly and bus.will is not None:
                self.publish(bus.will.topic, codec.encode(bus.will.message), 1, True, None)

    def stop(self, *, forget_retained: bool = True) -> None:
        """Die: every connection is lost, no will is sent."""
        self.up = False
        if forget_retained:
            self.retained.clear()
        for bus in list(self._clients.values()):
            bus._lose()
        self._clients.clear()

    def start(self) -> None:
        self.up = True

    def publish(self, topic: str, payload: bytes, qos: int, retain: bool, mirrored: Mirrored | None) -> None:
        self.published.append((topic, payload))
        if retain:
            if payload:
                self.retained[topic] = (payload, qos, mirrored)
            else:
                self.retained.pop(topic, None)
        if self.drop(topic, payload):
            return
        for bus in list(self._clients.values()):
            granted = [q for key, q in bus._filters.items() if matches(key, topic)]
            if granted:
                bus._arrive(topic, payload, min(qos, max(granted)), False, mirrored)

    def messages(self, topic_filter: str) -> list[Message]:
        """Decoded messages that were published so far to matching topics; without those that do not decode."""
        return [
            codec.decode(payload)[0] for topic, payload in self.published if payload and matches(topic_filter, topic)
        ]


class FakeBus(Bus):
    """A Bus on a FakeBroker. `kill()` ends the connection without a goodbye, so that the will is published."""

    def __init__(
        self,
        broker: FakeBroker,
        topics: Topics | None = None,
        *,
        client_id: str,
        will: Will | None = None,
        timings: BusTimings = BusTimings(connect_timeout_seconds=0.5, reconnect_min_seconds=0.01),  # noqa: B008
    ) -> None:
        super().__init__(topics or Topics("default"), client_id)
        self.broker = broker
        self.will = will
        self._timings = timings
        self._filters: dict[str, int] = {}
        self._callbacks: list[Callable[[], Awaitable[None]]] = []
        self._ready = asyncio.Event()
        self._lost = asyncio.Event()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._answer_malformed())
            tasks.create_task(self._stay_connected())

    def kill(self) -> None:
        """Lose the connection like a crash. While `run()` runs, it connects again."""
        self.broker.detach(self, abruptly=True)
        self._lose()

    def on_connect(self, callback: Callable[[], Awaitable[None]]) -> None:
        self._callbacks.append(callback)

    async def connected(self, timeout_seconds: float) -> None:
        try:
            await asyncio.wait_for(self._ready.wait(), timeout_seconds)
        except TimeoutError:
            raise Unavailable(f"no connection to the broker within {timeout_seconds:g} s (fake: it is down)") from None

    async def _stay_connected(self) -> None:
        while True:
            if self.broker.up:
                self._lost.clear()
                self.broker.attach(self)
                try:
                    for key in self._subscriptions:
                        qos, _ = self._subscriptions.get(key) or (0, ())
                        self._subscribe_on_broker(key, qos)
                    self.counters["connects"] += 1
                    self._ready.set()
                    await asyncio.sleep(0)  # what the broker retains comes first, as from a real one
                    for callback in self._callbacks:
                        await callback()
                    await self._lost.wait()
                except PotluckError:
                    pass  # as in MqttBus: if a birth cannot be sent, the connection does not work
                finally:
                    self._ready.clear()
                    self._filters.clear()
                    self.broker.detach(self, abruptly=False)
            await asyncio.sleep(self._timings.reconnect_min_seconds)

    def _lose(self) -> None:
        self._ready.clear()
        self._filters.clear()
        self._lost.set()

    async def _send(self, topic: str, payload: bytes, qos: int, retain: bool, mirrored: Mirrored | None = None) -> None:
        if any(sign in topic for sign in "+#") or not topic:
            raise ValueError(f"{topic!r} is not a topic")
        if not self._ready.is_set():
            await self.connected(self._timings.connect_timeout_seconds)
        self.counters["published"] += 1
        self.broker.publish(topic, payload, qos, retain, mirrored)
        await asyncio.sleep(0)

    def _send_now(self, topic: str, payload: bytes, qos: int, retain: bool, mirrored: Mirrored | None) -> bool:
        if not self._ready.is_set():
            return False
        self.counters["published"] += 1
        self.broker.publish(topic, payload, qos, retain, mirrored)
        return True

    async def room(self) -> None:
        await self.connected(self._timings.connect_timeout_seconds)

    def trouble(self) -> str:
        return "" if self._ready.is_set() else "the connection to the broker is lost"

    def _subscribe_now(self, topic_filter: str, qos: int) -> None:
        if self._ready.is_set():
            self._subscribe_on_broker(topic_filter, qos)

    def _subscribe_on_broker(self, topic_filter: str, qos: int) -> None:
        self._filters[topic_filter] = qos
        for topic, (payload, retained_qos, mirrored) in self.broker.retained.items():
            if matches(topic_filter, topic):
                self._arrive(topic, payload, min(qos, retained_qos), True, mirrored)

    def _unsubscribe_now(self, topic_filter: str) -> None:
        self._filters.pop(topic_filter, None)

    def _arrive(self, topic: str, payload: bytes, qos: int, retained: bool, mirrored: Mirrored | None) -> None:
        response_topic = mirrored.response_topic if mirrored else ""
        correlation = mirrored.correlation if mirrored else None
        asyncio.get_running_loop().call_soon(self._dispatch, topic, payload, qos, retained, response_topic, correlation)

    async def publish_raw(self, topic: str, payload: bytes) -> None:
        """Publish bytes that need not be a message, like a foreign program."""
        await self._send(topic, payload, 1, False)
