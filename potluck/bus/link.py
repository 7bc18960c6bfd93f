"""One connection to a broker: the base of both kinds, and the kind that uses only public names.

At QoS 1 several messages are under way at once: the broker keeps their order (MQTT 5, section 4.6).
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import aiomqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from potluck.bus.properties import Mirrored
from potluck.errors import Overloaded, PotluckError, Unavailable
from potluck.logs import fields
from potluck.settings import BROKER_PORT, GATEWAY_PORT

log = logging.getLogger(__name__)

Receipt = Callable[[Exception | None], None]
"""Called with None when the broker has a message, or with the error if it has not."""
Arrived = Callable[[str, bytes, int, bool, str, bytes | None], None]
"""Called with each message: topic ("": unreadable), payload, QoS, whether it was retained, response topic, correlation data."""

UNDER_WAY_LIMIT = 100
"""Messages at QoS 1 on one connection without a receipt yet; fewer if the broker asks for that (MQTT 5, Receive Maximum)."""
PLAIN_LIMIT = 20
"""The same on a plain connection: the receive maximum of mosquitto by default."""
WAITING_LIMIT = 2000
"""Callers that wait to send, on one connection."""


class Link(ABC):
    """A connection to the broker at `address`, from `open` to `close`; `arrived` is called with what comes."""

    def __init__(self, address: tuple[str, int], version: aiomqtt.ProtocolVersion, arrived: Arrived) -> None:
        self.address = address
        self._v5 = version is aiomqtt.ProtocolVersion.V5
        self._arrived = arrived
        self._room: deque[asyncio.Future[None]] = deque()
        """Callers that wait for room."""
        self.on_room: Callable[[], None] = lambda: None
        """Called when there may be room, before the waiting callers are woken."""

    @property
    def version_name(self) -> str:
        return "5" if self._v5 else "3.1.1"

    @abstractmethod
    async def open(self) -> None:
        """Raises MqttError or OSError. After an error or a cancellation, nothing is left open."""

    @property
    @abstractmethod
    def lost(self) -> asyncio.Future[None]:
        """Done when the connection has ended, with the reason as its exception. Do not await it: a cancellation would cancel it."""

    def give_up(self, reason: Exception) -> None:
        """Treat the connection as lost."""
        if not self.lost.done():
            self.lost.set_exception(reason)

    @abstractmethod
    async def close(self) -> None:
        """Say goodbye, unless the connection is lost already."""

    @abstractmethod
    async def subscribe_all(self, filters: list[tuple[str, int]]) -> None:
        """Return when the broker has granted all filters. Raises Unavailable if it refuses one."""

    @abstractmethod
    def subscribe_soon(self, filters: list[tuple[str, int]]) -> None: ...

    @abstractmethod
    def unsubscribe_soon(self, topic_filter: str) -> None: ...

    @property
    @abstractmethod
    def places(self) -> int:
        """How many messages `post` takes now."""

    @abstractmethod
    def post(
        self, topic: str, payload: bytes, retain: bool, mirrored: Mirrored | None, receipt: Receipt | None = None
    ) -> bool:
        """Write a message, at QoS 1 if a receipt is wanted. False: there is no room, and nothing was sent."""

    async def send(self, topic: str, payload: bytes, qos: int, retain: bool, mirrored: Mirrored | None) -> None:
        """Write, and at QoS 1 wait for the receipt. Raises OSError, Overloaded, Unavailable if the broker refuses the message."""
        received = asyncio.get_running_loop().create_future()

        def receipt(error: Exception | None) -> None:
            if received.done():
                return
            if error is None:
                received.set_result(None)
            else:
                received.set_exception(error)
                received.exception()

        wanted = receipt if qos else None
        if self._room or not self.post(topic, payload, retain, mirrored, wanted):
            await self.room()
            while not self.post(topic, payload, retain, mirrored, wanted):
                await self.room()
        if qos:
            await received

    async def room(self) -> None:
        """Return when there may be room. The first caller to wait is the first to return. Raises OSError, Overloaded."""
        if self.lost.done():
            raise ConnectionError("the connection is lost")
        if len(self._room) >= WAITING_LIMIT:
            raise Overloaded(f"{WAITING_LIMIT} messages wait for the broker: try again later", retry_after_seconds=1.0)
        waiter = asyncio.get_running_loop().create_future()
        self._room.append(waiter)
        try:
            await waiter
        finally:
            if waiter.cancelled():
                if waiter in self._room:
                    self._room.remove(waiter)
                self._tell_room()  # another caller may take its place

    def _tell_room(self) -> None:
        """There may be room again."""
        if self.places > 0:
            self.on_room()
        for _ in range(max(0, min(self.places, len(self._room)))):
            waiter = self._room.popleft()
            if not waiter.done():
                waiter.set_result(None)

    def _no_room_any_more(self) -> None:
        for waiter in self._room:
            _fail(waiter)
        self._room.clear()


class PlainLink(Link):
    """Uses only public names of aiomqtt and paho: for versions that lack the private names that `QuickLink` uses.

    It is slower, and does not know that a broker refused a message: aiomqtt does not say.
    """

    def __init__(
        self,
        address: tuple[str, int],
        version: aiomqtt.ProtocolVersion,
        arrived: Arrived,
        options: Mapping[str, Any],
    ) -> None:
        """`options` of aiomqtt's client (`potluck.bus.connecting`)."""
        super().__init__(address, version, arrived)
        self._mqtt = aiomqtt.Client(**options)
        self._mqtt.pending_calls_threshold = PLAIN_LIMIT + 10  # it warns of more
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reading: asyncio.Task[None] | None = None
        self._sending: set[asyncio.Task[None]] = set()
        self._asking: set[asyncio.Task[None]] = set()
        self._open = False

    async def open(self) -> None:
        opening = asyncio.create_task(self._mqtt.__aenter__(), name="bus-open")
        try:
            await asyncio.shield(opening)
        except BaseException:
            await asyncio.wait([opening])  # it connects in a thread, which cannot be cancelled; its time is bounded
            opening.exception()  # retrieved
            self._open = True  # or half open
            await self.close()
            raise
        self._open = True
        self._reading = asyncio.create_task(self._read(), name="bus-read")

    @property
    def lost(self) -> asyncio.Future[None]:
        return self._lost

    async def close(self) -> None:
        tasks = [task for task in (self._reading, *self._sending, *self._asking) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._no_room_any_more()
        if self._lost.done() and not self._lost.cancelled():
            self._lost.exception()  # retrieved: asyncio need not complain
        if self._open:
            self._open = False
            try:
                await self._mqtt.__aexit__(None, None, None)
            except (aiomqtt.MqttError, OSError, PotluckError) as error:
                log.info("no clean goodbye %s", fields(reason=str(error)))

    async def subscribe_all(self, filters: list[tuple[str, int]]) -> None:
        if not filters:
            return
        granted = await self._mqtt.subscribe([(key, self._qos(qos)) for key, qos in filters])
        refused = [code for code in granted if getattr(code, "is_failure", code == 0x80)]
        if refused:
            log.error("subscription refused %s", fields(reason=str(refused[0])))
            raise Unavailable(f"the broker refused a subscription: {refused[0]}")

    def subscribe_soon(self, filters: list[tuple[str, int]]) -> None:
        if filters:
            self._ask(lambda: self.subscribe_all(filters))

    def unsubscribe_soon(self, topic_filter: str) -> None:
        self._ask(lambda: self._mqtt.unsubscribe(topic_filter))

    @property
    def places(self) -> int:
        return 0 if self._lost.done() else max(0, PLAIN_LIMIT - len(self._sending))

    def post(
        self, topic: str, payload: bytes, retain: bool, mirrored: Mirrored | None, receipt: Receipt | None = None
    ) -> bool:
        if not self.places:
            return False
        if not topic or "+" in topic or "#" in topic:
            raise ValueError(f"{topic[:80]!r} is not a topic")
        task = asyncio.create_task(self._publish(topic, payload, retain, mirrored, receipt), name="bus-publish")
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)
        task.add_done_callback(lambda _: self._tell_room())
        return True

    async def _publish(
        self, topic: str, payload: bytes, retain: bool, mirrored: Mirrored | None, receipt: Receipt | None
    ) -> None:
        error: Exception | None = ConnectionError("the connection was lost")
        try:
            await self._mqtt.publish(
                topic, payload, 0 if receipt is None else 1, retain, _properties(mirrored) if self._v5 else None
            )
            error = None
        except (aiomqtt.MqttError, OSError, ValueError) as failure:
            self.give_up(failure)
        finally:
            if receipt is not None:
                receipt(error)

    async def _read(self) -> None:
        try:
            async for message in self._mqtt.messages:
                properties = message.properties
                self._arrived(
                    str(message.topic),
                    bytes(message.payload or b""),
                    message.qos,
                    message.retain,
                    getattr(properties, "ResponseTopic", ""),
                    getattr(properties, "CorrelationData", None),
                )
        except aiomqtt.MqttError as error:
            self.give_up(error)

    def _ask(self, question: Callable[[], Awaitable[object]]) -> None:
        """Run a question in the background: no caller waits for it."""

        async def asked() -> None:
            try:
                await question()
            except (PotluckError, aiomqtt.MqttError) as error:
                log.debug("not asked of the broker %s", fields(reason=error))

        task = asyncio.create_task(asked(), name="bus-subscribe")
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    def _qos(self, qos: int) -> Any:
        return SubscribeOptions(qos=qos) if self._v5 else qos


def no_broker(said: bytes) -> str:
    """The error text for an address that answers a CONNECT with these bytes; no bytes: it hung up."""
    ports = f"a broker's usual port is {BROKER_PORT}, a gateway's {GATEWAY_PORT}"
    if not said:
        return f"what is there hung up without a word, is it an MQTT broker? {ports}"
    what = "answers by HTTP" if said.startswith(b"HT") else "does not speak MQTT"
    return f"what is there {what}, and is no MQTT broker: {ports}"


def _properties(mirrored: Mirrored | None) -> Properties | None:
    """The properties (MQTT 5, section 3.3.2.3). A value that is too long for its property is only in the body."""
    if mirrored is None:
        return None
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    properties.ContentType = mirrored.content_type
    if mirrored.expiry_seconds is not None:
        properties.MessageExpiryInterval = mirrored.expiry_seconds
    if mirrored.response_topic and len(mirrored.response_topic.encode()) <= 0xFFFF:
        properties.ResponseTopic = mirrored.response_topic
    if mirrored.correlation is not None and len(mirrored.correlation) <= 0xFFFF:
        properties.CorrelationData = mirrored.correlation
    return properties


def _fail(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_exception(ConnectionError("the connection was lost"))
        waiter.exception()
