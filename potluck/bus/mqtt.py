"""The bus over MQTT: connect, publish, subscribe, connect again. The only import of aiomqtt."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import random
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import aiomqtt
from paho.mqtt.client import (
    MQTT_CLEAN_START_FIRST_ONLY,
    MQTT_ERR_CONN_LOST,
    MQTT_ERR_SUCCESS,
    error_string,
)
from paho.mqtt.exception import MalformedPacket
from paho.mqtt.subscribeoptions import SubscribeOptions

from potluck.bus import packets
from potluck.bus.exchange import Bus, Envelope, Handler, Will, request_failed
from potluck.bus.properties import Mirrored, pack
from potluck.errors import BadMessage, Overloaded, PotluckError, Unavailable
from potluck.logs import fields
from potluck.settings import BROKER_PORT, GATEWAY_PORT, BusTimings
from potluck.wire import codec
from potluck.wire.topics import Topics

__all__ = ["Addresses", "Bus", "Envelope", "Handler", "MqttBus", "Will", "in_turn", "request_failed"]

log = logging.getLogger(__name__)

Addresses = Callable[[], Awaitable[tuple[str, int]]]
"""Where to connect next: asked before each attempt. Raises Unavailable while there is nowhere to go."""

_QUEUED_LIMIT = 2000
"""Callers that wait to send, on one connection."""
_UNDER_WAY_LIMIT = 100
"""Messages at QoS 1 that the broker has not acknowledged yet, on one connection; fewer where it says so (MQTT 5, Receive Maximum)."""
_GATHERED_LIMIT_BYTES = 1 << 18
_OWN_IDS = range(0x8000, 0x10000)
"""Packet ids of what is published here; paho counts its own, of subscriptions, from 1."""
_RECEIVE_BYTES = 1 << 17
_THREAD_SECONDS = 0.02
"""How often it is looked whether the thread that connects is over, for whoever does not want that any more."""


Receipt = Callable[[Exception | None], None]
"""Called when the broker has a message, or with the reason why it has not."""


@dataclass(eq=False, slots=True)
class _UnderWay:
    """A message that was handed over and goes again with the next connection unless the broker has it."""

    topic: str
    payload: bytes
    retain: bool
    mirrored: Mirrored | None
    given_up_at: float
    """On the monotonic clock."""


def in_turn(addresses: Sequence[tuple[str, int]]) -> Addresses:
    """These, one after the other, and again from the first."""
    endless = itertools.cycle(addresses)

    async def following() -> tuple[str, int]:
        return next(endless)

    return following


class MqttBus(Bus):
    """The bus over MQTT 5, or 3.1.1 where the broker speaks nothing newer."""

    def __init__(
        self,
        addresses: Addresses,
        topics: Topics,
        *,
        client_id: str,
        will: Will | None = None,
        timings: BusTimings = BusTimings(),  # noqa: B008 - frozen
        highest_version: Literal[4, 5] = 5,
        visiting: bool = False,
    ) -> None:
        """`visiting` a broker that may be anybody's: comings and goings are logged at DEBUG, and packets have a limit."""
        super().__init__(topics, client_id)
        self._addresses = addresses
        self._will = will
        self._timings = timings
        self._highest_version = highest_version
        self._visiting = visiting
        self._versions: dict[tuple[str, int], aiomqtt.ProtocolVersion] = {}
        self._tried: dict[str, str] = {}
        self._trying = ""
        """Where the attempt under way goes."""
        self._callbacks: list[Callable[[], Awaitable[None]]] = []
        self._link: _Link | None = None
        self._ready = asyncio.Event()
        self._under_way: dict[_UnderWay, None] = {}
        self._again: deque[_UnderWay] = deque()
        """Of these, what a connection that is lost has left, and the present one has not had yet."""

    def on_connect(self, callback: Callable[[], Awaitable[None]]) -> None:
        self._callbacks.append(callback)

    async def connected(self, timeout_seconds: float) -> None:
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._ready.wait()
        except TimeoutError:
            raise self._unavailable(f"no connection to the broker within {round(timeout_seconds, 2):g} s") from None

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._answer_malformed(), name="bus-answer-malformed")
            tasks.create_task(self._stay_connected(), name="bus-connect")

    async def _stay_connected(self) -> None:
        delay = self._timings.reconnect_min_seconds
        while True:
            address: tuple[str, int] | None = None
            started = time.monotonic()
            try:
                address = await self._addresses()
                self._trying = f"{address[0]}:{address[1]}"
                link = await self._open(address)
                await self._serve(link, address)
            except (PotluckError, OSError, ValueError, aiomqtt.MqttError) as error:  # ValueError: a host name
                self._note(address, error)
            if time.monotonic() - started > self._timings.reconnect_max_seconds:
                delay = self._timings.reconnect_min_seconds  # it held for a while: this is a new trouble
            await asyncio.sleep(random.uniform(delay / 2, delay))
            delay = min(2 * delay, self._timings.reconnect_max_seconds)

    async def _open(self, address: tuple[str, int]) -> _Link:
        known = self._versions.pop(address, None)  # kept only when it worked
        version = await self._find_version(address, known)
        link = _Link(
            self, address, version, self._will, self._timings, packets.PACKET_LIMIT_BYTES if self._visiting else 0
        )
        await link.open()
        self._versions[address] = version
        return link

    async def _serve(self, link: _Link, address: tuple[str, int]) -> None:
        """Use `link` until it is lost, which raises, or until cancelled."""
        try:
            wanted = self._wanted()
            await link.subscribe_all(wanted)
            link.subscribe_soon([pair for pair in self._wanted() if pair not in wanted])  # asked for in the meantime
            self._link = link
            self._again = deque(self._under_way)
            self._send_again()
            self._tried.clear()
            self.counters["connects"] += 1
            self._ready.set()
            shown = fields(broker=f"{address[0]}:{address[1]}", mqtt=link.version_name)
            log.log(logging.DEBUG if self._visiting else logging.INFO, "connected %s", shown)
            births = asyncio.create_task(self._call_back(), name="bus-on-connect")
            try:
                await asyncio.wait({births, link.lost}, return_when=asyncio.FIRST_COMPLETED)
                if births.done():
                    births.result()
                await asyncio.wait({link.lost})
                raise Unavailable(f"the connection was lost: {link.lost.exception() or 'the broker closed it'}")
            finally:
                births.cancel()
                await asyncio.wait({births})
        finally:
            self._link = None
            self._ready.clear()
            await link.close()

    def _wanted(self) -> list[tuple[str, int]]:
        return [(key, value[0]) for key in self._subscriptions if (value := self._subscriptions.get(key))]

    async def _call_back(self) -> None:
        for callback in self._callbacks:
            await callback()

    def _note(self, address: tuple[str, int] | None, error: Exception) -> None:
        place = f"{address[0]}:{address[1]}" if address else "discovery"
        if isinstance(error, OSError) and error.errno and error.errno > 0:
            reason = os.strerror(error.errno)
        else:
            reason = str(error) or type(error).__name__
        if self._tried.get(place) != reason:
            level = logging.DEBUG if self._visiting else logging.WARNING
            log.log(level, "not connected, trying again %s", fields(broker=place, reason=reason))
        self._tried[place] = reason
        while len(self._tried) > 8:
            del self._tried[next(iter(self._tried))]

    def _unavailable(self, what: str) -> Unavailable:
        return Unavailable(f"{what} ({self._what_was_tried()}): check that a broker runs there")

    def _what_was_tried(self) -> str:
        return "; ".join(f"{place}: {reason}" for place, reason in self._tried.items()) or (
            f"{self._trying} has not answered yet" if self._trying else "where it is, is not known yet"
        )

    @property
    def address(self) -> tuple[str, int] | None:
        return None if self._link is None else self._link.address

    def trouble(self) -> str:
        if self._link is not None:
            return ""
        return f"the connection to the broker is lost ({self._what_was_tried()}), check that it runs"

    async def _send(self, topic: str, payload: bytes, qos: int, retain: bool, mirrored: Mirrored | None = None) -> None:
        limit_seconds = self._timings.connect_timeout_seconds
        deadline = time.monotonic() + limit_seconds
        while True:
            await self.connected(max(0.0, deadline - time.monotonic()))
            link = self._link
            assert link is not None
            try:
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + deadline - time.monotonic()):
                    await link.send(topic, payload, qos, retain, mirrored)
            except TimeoutError:
                raise self._unavailable(f"the broker did not take a message within {limit_seconds:g} s") from None
            except (OSError, aiomqtt.MqttError) as error:
                log.info("sending again %s", fields(topic=topic, reason=str(error)))
                link.give_up(error)
                if link is self._link:  # noticed here first
                    self._ready.clear()
                    self._link = None
                continue
            self.counters["published"] += 1
            return

    def _send_now(self, topic: str, payload: bytes, qos: int, retain: bool, mirrored: Mirrored | None) -> bool:
        link = self._link
        if link is None or self._again:
            return False
        if qos:
            limit = time.monotonic() + self._timings.connect_timeout_seconds
            message = _UnderWay(topic, payload, retain, mirrored, limit)
            if not self._hand_over(link, message):
                return False
            self._under_way[message] = None
        elif not link.post(topic, payload, retain, mirrored):
            return False
        self.counters["published"] += 1
        return True

    async def room(self) -> None:
        limit_seconds = self._timings.connect_timeout_seconds
        deadline = asyncio.get_running_loop().time() + limit_seconds
        await self.connected(limit_seconds)
        try:
            async with asyncio.timeout_at(deadline):
                while (link := self._link) is not None and (self._again or not link.has_room):
                    await link.room()
        except TimeoutError:
            raise self._unavailable(f"the broker did not take a message within {limit_seconds:g} s") from None
        except OSError as error:
            log.debug("no room on a connection that is lost %s", fields(reason=str(error)))
        await asyncio.sleep(0)

    def _hand_over(self, link: _Link, message: _UnderWay) -> bool:
        return link.post(
            message.topic, message.payload, message.retain, message.mirrored, partial(self._on_receipt, message)
        )

    def _on_receipt(self, message: _UnderWay, error: Exception | None) -> None:
        if isinstance(error, OSError):
            return  # it goes again with the next connection
        self._under_way.pop(message, None)
        if error is not None:
            log.info("message dropped %s", fields(topic=message.topic, reason=error))
        self._send_again()

    def _send_again(self) -> None:
        """What the last connection has left, as far as this one takes it; not what is too old by now."""
        while self._again and self._link is not None:
            message = self._again[0]
            if message.given_up_at < time.monotonic():
                del self._under_way[message]
                log.info("message dropped %s", fields(topic=message.topic, reason="the broker has not taken it"))
            elif not self._hand_over(self._link, message):
                return
            self._again.popleft()

    def _subscribe_now(self, topic_filter: str, qos: int) -> None:
        if self._link is not None:
            self._link.subscribe_soon([(topic_filter, qos)])

    def _unsubscribe_now(self, topic_filter: str) -> None:
        if self._link is not None:
            self._link.unsubscribe_soon(topic_filter)

    async def _find_version(
        self, address: tuple[str, int], known: aiomqtt.ProtocolVersion | None
    ) -> aiomqtt.ProtocolVersion:
        """Reach the broker, and where its version is not known ask with a bare MQTT 5 CONNECT.

        This waits in asyncio, where it can be cancelled; aiomqtt connects in a thread, which cannot. A 3.1.1 broker answers
        with a CONNACK of two bytes or hangs up (amqtt may do neither when the CONNECT has a will).
        """
        writer = None
        try:
            async with asyncio.timeout(self._timings.connect_timeout_seconds):
                reader, writer = await asyncio.open_connection(*address)
                if self._highest_version < 5:
                    return aiomqtt.ProtocolVersion.V311
                if known is not None:
                    return known
                writer.write(_PROBE)
                try:
                    kind, length = await reader.readexactly(2)
                except (asyncio.IncompleteReadError, ConnectionError):
                    return aiomqtt.ProtocolVersion.V311
                if kind != 0x20:
                    raise Unavailable(no_broker(bytes((kind, length))))
                return aiomqtt.ProtocolVersion.V5 if length > 2 else aiomqtt.ProtocolVersion.V311
        except TimeoutError:
            raise Unavailable(f"no answer within {self._timings.connect_timeout_seconds:g} s") from None
        finally:
            if writer is not None:
                writer.close()


def no_broker(said: bytes) -> str:
    """What to say of an address whose answer to a CONNECT begins with these bytes; none: it hung up."""
    ports = f"a broker's usual port is {BROKER_PORT}, a gateway's {GATEWAY_PORT}"
    if not said:
        return f"what is there hung up without a word, is it an MQTT broker? {ports}"
    what = "answers by HTTP" if said.startswith(b"HT") else "does not speak MQTT"
    return f"what is there {what}, and is no MQTT broker: {ports}"


_CONNACK = b"\x20"
_REFUSED = 0x80
"""Reason codes from here on say so (MQTT 5, section 2.4)."""
_PROBE = bytes((0x10, 13, 0, 4)) + b"MQTT" + bytes((5, 2, 0, 5, 0, 0, 0))
"""CONNECT: MQTT 5, clean start, keep alive 5 s, no properties, empty client id."""


class _Link(aiomqtt.Client):
    """One connection. Hands messages to the bus as they are read, and writes as soon as it can.

    aiomqtt queues each message, makes a task for each, and wakes the loop through a pipe for each write; paho calls the kernel
    three times for a packet that it reads, and makes a dozen objects for one that it writes. The overrides below spare that:
    messages are read and written here, and paho has the rest (connecting, subscriptions, pings).
    They rest on private names of aiomqtt 2.5 and paho 2, which the contract tests hold in place.

    At QoS 1 several messages are under way at once: their order is the broker's to keep (MQTT 5, section 4.6).
    """

    def __init__(
        self,
        bus: MqttBus,
        address: tuple[str, int],
        version: aiomqtt.ProtocolVersion,
        will: Will | None,
        timings: BusTimings,
        limit_bytes: int,
    ) -> None:
        self._bus = bus
        self.address = address
        self._v5 = version is aiomqtt.ProtocolVersion.V5
        self._receipts: dict[int, Receipt] = {}
        """Of what the broker has not acknowledged yet, by packet id."""
        self._ids = itertools.cycle(_OWN_IDS)
        self._limit = _UNDER_WAY_LIMIT
        self._waiting: deque[asyncio.Future[None]] = deque()
        """Callers that wait until there is room."""
        self._grants: dict[int, asyncio.Future[None] | None] = {}
        self._flush_handle: asyncio.Handle | None = None
        self._gathered: list[bytes] = []
        """Packets that are written when this turn of the loop is over."""
        self._gathered_bytes = 0
        self._splitter = packets.Splitter(limit_bytes)
        self._in_loop = False
        self._thread: Literal["", "runs", "over"] = ""
        super().__init__(
            *address,
            identifier=bus.client_id,
            protocol=version,
            clean_session=None if self._v5 else True,
            clean_start=True if self._v5 else MQTT_CLEAN_START_FIRST_ONLY,
            # paho asks after one interval and gives up after the second: together they are the keepalive that was set
            keepalive=max(1, timings.keepalive_seconds // 2),
            timeout=timings.connect_timeout_seconds,
            will=None if will is None else aiomqtt.Will(will.topic, codec.encode(will.message), 1, True),
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
            logger=log.getChild("paho"),
        )
        self._client.connect_timeout = timings.connect_timeout_seconds

    @property
    def version_name(self) -> str:
        return "5" if self._v5 else "3.1.1"

    async def open(self) -> None:
        """Raises MqttError or OSError; nothing is left behind then, nor when cancelled."""
        opening = asyncio.create_task(self.__aenter__(), name="bus-open")
        try:
            await asyncio.shield(opening)
        except BaseException:
            await self._thread_over()
            opening.cancel()  # what is left is the broker's answer, which may never come
            await asyncio.wait([opening])
            if not opening.cancelled() and opening.exception() is None:
                await self.close()  # cancelled, but connected by now: a goodbye keeps the will from being sent
            else:
                self._drop()
            raise
        self._in_loop = True

    def _client_connect(self) -> None:
        """In a thread."""
        self._thread = "runs"
        try:
            super()._client_connect()
        finally:
            self._thread = "over"

    async def _thread_over(self) -> None:
        """Return when the thread that connects is not at work any more, and what it has asked the loop for is done.

        It cannot be cancelled once it has begun; the probe before it made sure that it will not take long.
        """
        await asyncio.sleep(_THREAD_SECONDS)
        while self._thread == "runs":  # noqa: ASYNC110 - a thread sets it
            await asyncio.sleep(_THREAD_SECONDS)
        await asyncio.sleep(0)

    @property
    def lost(self) -> asyncio.Future[None]:
        """Done when the connection has ended, with the reason as its exception. Not to be awaited: that would cancel it."""
        return self._disconnected

    def give_up(self, reason: Exception) -> None:
        """Treat the connection as lost."""
        if not self._disconnected.done():
            self._disconnected.set_exception(reason)

    async def close(self) -> None:
        """Say goodbye, unless the connection is gone already."""
        try:
            await self.__aexit__(None, None, None)
        except (aiomqtt.MqttError, OSError, PotluckError) as error:
            # aiomqtt raises again what ended the connection; from here it would take the place of a CancelledError.
            log.info("no clean goodbye %s", fields(reason=str(error)))
        finally:
            self._drop()

    def _drop(self) -> None:
        self._client._sock_close()
        if self._flush_handle is not None:
            self._flush_handle.cancel()
        for future in (self._disconnected, self._connected):
            if future.done() and not future.cancelled():
                future.exception()  # retrieved: asyncio need not complain
        lost = ConnectionError("the connection was lost")
        for waiter in (*self._waiting, *self._grants.values()):
            if waiter is not None and not waiter.done():
                waiter.set_exception(lost)
                waiter.exception()
        for receipt in list(self._receipts.values()):
            receipt(lost)
        self._receipts.clear()

    # sending

    @property
    def has_room(self) -> bool:
        """Whether `post` takes a message now."""
        return len(self._receipts) < self._limit and not self._client.want_write() and not self._disconnected.done()

    def post(
        self, topic: str, payload: bytes, retain: bool, mirrored: Mirrored | None, receipt: Receipt | None = None
    ) -> bool:
        """Write a message, at QoS 1 where somebody wants its receipt. False when there is no room: nothing was sent."""
        if not self.has_room:
            return False
        properties = b"" if not self._v5 else b"\0" if mirrored is None else pack(mirrored).payload
        packet_id = 0
        if receipt is not None:
            packet_id = next(self._ids)
            while packet_id in self._receipts:
                packet_id = next(self._ids)
        packet = packets.publish(topic, payload, retain, properties, packet_id.to_bytes(2, "big") if packet_id else b"")
        if receipt is not None:
            self._receipts[packet_id] = receipt
        self._write(packet)
        return True

    async def send(self, topic: str, payload: bytes, qos: int, retain: bool, mirrored: Mirrored | None) -> None:
        """Write, and at QoS 1 wait until the broker has it. Raises OSError, Overloaded, Unavailable when the broker refuses it."""
        received = self._loop.create_future()

        def receipt(error: Exception | None) -> None:
            if received.done():
                return
            if error is None:
                received.set_result(None)
            else:
                received.set_exception(error)
                received.exception()

        wanted = receipt if qos else None
        if self._waiting or not self.post(topic, payload, retain, mirrored, wanted):
            await self.room()
            while not self.post(topic, payload, retain, mirrored, wanted):
                await self.room()
        if qos:
            await received

    async def room(self) -> None:
        """Return when there may be room: whoever came first goes first. Raises OSError, Overloaded."""
        if self._disconnected.done():
            raise ConnectionError("the connection is lost")
        if len(self._waiting) >= _QUEUED_LIMIT:
            raise Overloaded(f"{_QUEUED_LIMIT} messages wait for the broker: try again later", retry_after_seconds=1.0)
        waiter = self._loop.create_future()
        self._waiting.append(waiter)
        try:
            await waiter
        finally:
            if not waiter.done() or waiter.cancelled():
                with suppress(ValueError):  # it was told already
                    self._waiting.remove(waiter)
                self._tell_waiting()

    def _tell_waiting(self) -> None:
        """There is room for so many."""
        if self._waiting and self.has_room:
            for _ in range(self._limit - len(self._receipts)):
                if not self._waiting:
                    return
                waiter = self._waiting.popleft()
                if not waiter.done():
                    waiter.set_result(None)

    def _write(self, packet: bytes) -> None:
        """The first packet in a turn of the loop goes out at once; those that follow go together when the turn is over."""
        if self._flush_handle is not None:
            self._gathered.append(packet)
            self._gathered_bytes += len(packet)
            if self._gathered_bytes > _GATHERED_LIMIT_BYTES:
                self._push_gathered()
            return
        self._flush_handle = self._loop.call_soon(self._flush)
        self._push(packet)

    def _push(self, data: bytes) -> None:
        """Hand bytes to the socket; what it does not take waits behind what paho's queue holds already."""
        taken = 0
        try:
            if not self._client.want_write():  # else a packet may be half written
                taken = self._client._sock_send(data)
        except BlockingIOError:
            pass  # the socket is full
        except OSError as error:
            self.give_up(error)
            return
        if taken < len(data):
            rest = data[taken:]
            self._client._out_packet.append(
                {"command": 0, "mid": 0, "qos": 1, "pos": 0, "to_process": len(rest), "packet": rest, "info": None}
            )

    def _push_gathered(self) -> None:
        gathered = b"".join(self._gathered)
        self._gathered.clear()
        self._gathered_bytes = 0
        self._push(gathered)

    def _flush(self) -> None:
        self._flush_handle = None
        if self._gathered:
            self._push_gathered()
        if not self._client.want_write():
            self._tell_waiting()
            return
        try:
            self._client.loop_write()
        except Exception as error:  # noqa: BLE001 - as aiomqtt does: whatever paho raises here, the connection is broken
            self.give_up(error)
            return
        sock = self._client.socket()
        if sock is not None and self._client.want_write():
            self._loop.add_writer(sock.fileno(), self._flush)
        else:
            self._tell_waiting()

    def _on_socket_register_write(self, client: Any, userdata: Any, sock: Any) -> None:
        if not self._in_loop:
            super()._on_socket_register_write(client, userdata, sock)
        elif self._flush_handle is None:  # no pipe, no poll: write when this turn of the loop is over
            self._flush_handle = self._loop.call_soon(self._flush)

    def _on_connect(self, client: Any, userdata: Any, flags: Any, reason_code: Any, properties: Any = None) -> None:
        self._limit = min(_UNDER_WAY_LIMIT, getattr(properties, "ReceiveMaximum", _UNDER_WAY_LIMIT))
        super()._on_connect(client, userdata, flags, reason_code, properties)

    def _on_puback(self, body: bytes) -> None:
        packet_id, code = packets.read_puback(body)
        receipt = self._receipts.pop(packet_id, None)
        if receipt is None:
            return  # a receipt that came twice
        receipt(Unavailable(f"the broker refused the message: 0x{code:02x}") if code >= _REFUSED else None)
        self._tell_waiting()

    # subscribing

    async def subscribe_all(self, filters: list[tuple[str, int]]) -> None:
        """Returns when the broker has granted them all. Raises Unavailable when it refuses one."""
        if filters:
            granted = self._loop.create_future()
            self.subscribe_soon(filters, granted)
            await self._wait_for(granted, timeout=None)

    def subscribe_soon(self, filters: list[tuple[str, int]], granted: asyncio.Future[None] | None = None) -> None:
        if not filters:
            return
        wanted = [(key, SubscribeOptions(qos=qos) if self._v5 else qos) for key, qos in filters]
        result, mid = self._client.subscribe(wanted)  # type: ignore[arg-type]
        if result == MQTT_ERR_SUCCESS and mid is not None:
            self._grants[mid] = granted
        elif granted is not None:
            granted.set_exception(ConnectionError("the connection is lost"))

    def unsubscribe_soon(self, topic_filter: str) -> None:
        self._client.unsubscribe(topic_filter)

    def _on_subscribe(self, client: Any, userdata: Any, mid: int, reason_codes: Any, properties: Any = None) -> None:
        granted = self._grants.pop(mid, None)
        refused = [code for code in reason_codes if code.is_failure]
        if refused:
            log.error("subscription refused %s", fields(reason=str(refused[0])))
        if granted is not None and not granted.done():
            if refused:
                granted.set_exception(Unavailable(f"the broker refused a subscription: {refused[0]}"))
            else:
                granted.set_result(None)

    def _on_unsubscribe(self, client: Any, userdata: Any, mid: int, reason_codes: Any, properties: Any = None) -> None:
        pass

    # receiving

    def _on_socket_open(self, client: Any, userdata: Any, sock: Any) -> None:
        def begin() -> None:
            self._loop.add_reader(sock.fileno(), self._read)
            self._misc_task = self._loop.create_task(self._misc_loop(), name="bus-keepalive")

        self._loop.call_soon_threadsafe(begin)  # paho connects in a thread

    def _read(self) -> None:
        """Take what has arrived."""
        try:
            while True:
                data = self._client._sock_recv(_RECEIVE_BYTES)
                if not self._connected.done() and not data.startswith(_CONNACK):
                    raise ConnectionError(no_broker(data))
                if not data:
                    raise ConnectionError("the broker closed the connection")
                self._client._last_bytes_received = time.monotonic()
                for first, body in self._splitter.feed(data):
                    if first & 0xF0 == packets.PUBLISH:
                        self._received(packets.read_publish(first, body, v5=self._v5))
                    elif first & 0xF0 == packets.PUBACK:
                        self._on_puback(body)
                    else:
                        self._hand_on(first, body)
                    if self._client._sock is None:
                        return
                if not getattr(self._client._sock, "pending", int)():  # TLS may hold what the loop does not see
                    return
        except BlockingIOError:
            return
        except (OSError, BadMessage, MalformedPacket) as error:
            self._broken(error)

    def _received(self, message: packets.Publish) -> None:
        response_topic, correlation = "", None
        if message.properties:
            response_topic, correlation = packets.answer_to(message.properties)
        if message.topic:
            self._bus._dispatch(
                message.topic, message.payload, message.qos, message.retain, response_topic, correlation
            )
        else:
            self._bus.counters["malformed"] += 1
        if message.qos:
            self._write(packets.puback(message.packet_id))

    def _hand_on(self, first: int, body: bytes) -> None:
        """Have paho read a packet. Raises ConnectionError when that was the end of the connection."""
        packet: Any = self._client._in_packet
        packet |= {"command": first, "remaining_length": len(body), "packet": bytearray(body), "pos": 0}
        result = self._client._packet_handle()
        packet["command"] = 0
        if result > 0:
            raise ConnectionError(error_string(result))

    def _broken(self, error: Exception) -> None:
        """The connection is no more, for this reason."""
        if not self._connected.done():
            self._connected.set_exception(aiomqtt.MqttError(str(error)))  # whoever waits for it hears of it at once
        self.give_up(error)
        self._client._loop_rc_handle(MQTT_ERR_CONN_LOST)
