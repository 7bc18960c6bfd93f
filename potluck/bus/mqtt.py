"""The bus over MQTT: connect, publish, subscribe, connect again."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import random
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import aiomqtt

from potluck.bus import packets, quick_link
from potluck.bus.connecting import client_options, reach
from potluck.bus.exchange import Bus, Envelope, Handler, Will, request_failed
from potluck.bus.link import Link, PlainLink, no_broker
from potluck.bus.properties import Mirrored
from potluck.bus.quick_link import QuickLink
from potluck.credentials import Credentials
from potluck.errors import PotluckError, Unavailable
from potluck.logs import fields
from potluck.settings import BusTimings
from potluck.wire.topics import Topics

__all__ = ["Addresses", "Bus", "Envelope", "Handler", "MqttBus", "Will", "in_turn", "request_failed"]

log = logging.getLogger(__name__)

Addresses = Callable[[], Awaitable[tuple[str, int]]]
"""Gives the next address to connect to, before each attempt. Raises Unavailable while no address is known."""

_PROBE = bytes((0x10, 13, 0, 4)) + b"MQTT" + bytes((5, 2, 0, 5, 0, 0, 0))
"""CONNECT: MQTT 5, clean start, keep alive 5 s, no properties, empty client id."""


@dataclass(eq=False, slots=True)
class _UnderWay:
    """A message that was sent. It is sent again on the next connection, unless the broker has acknowledged it."""

    topic: str
    payload: bytes
    retain: bool
    mirrored: Mirrored | None
    given_up_at: float
    """On the monotonic clock."""


def in_turn(addresses: Sequence[tuple[str, int]]) -> Addresses:
    """These addresses, one after the other, and then again from the first."""
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
        credentials: Credentials,
        *,
        client_id: str,
        will: Will | None = None,
        timings: BusTimings = BusTimings(),  # noqa: B008 - frozen
        highest_version: Literal[4, 5] = 5,
        visiting: bool = False,
    ) -> None:
        """`visiting`: the broker may be a stranger's. Connects and losses are logged at DEBUG, and packets have a limit."""
        super().__init__(topics, client_id)
        self._addresses = addresses
        self._credentials = credentials
        self._will = will
        self._timings = timings
        self._highest_version = highest_version
        self._visiting = visiting
        self._versions: dict[tuple[str, int], aiomqtt.ProtocolVersion] = {}
        self._tried: dict[str, str] = {}
        self._trying = ""
        """The address of the present attempt."""
        self._callbacks: list[Callable[[], Awaitable[None]]] = []
        self._link: Link | None = None
        self._moves_by = time.monotonic()
        """By when this connects, or takes the next step towards it: an attempt has steps, and a pause after it."""
        self._ready = asyncio.Event()
        self._under_way: dict[_UnderWay, None] = {}
        self._again: deque[_UnderWay] = deque()
        """Those messages that a lost connection left, and that were not sent on the present one yet."""
        self._newest: dict[str, _UnderWay] = {}
        """The last retained message for each topic, since some message has been under way."""

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
            started = self._moves_by = time.monotonic()
            try:
                address = await self._addresses()
                self._trying = f"{address[0]}:{address[1]}"
                link = await self._open(address)
                await self._serve(link, address)
            except (PotluckError, OSError, ValueError, aiomqtt.MqttError) as error:  # ValueError: a host name
                self._note(address, error)
            if time.monotonic() - started > self._timings.reconnect_max_seconds:
                delay = self._timings.reconnect_min_seconds  # the connection held for a while: this is a new problem
            pause_seconds = random.uniform(delay / 2, delay)
            self._moves_by = time.monotonic() + pause_seconds
            await asyncio.sleep(pause_seconds)
            delay = min(2 * delay, self._timings.reconnect_max_seconds)

    async def _open(self, address: tuple[str, int]) -> Link:
        known = self._versions.pop(address, None)  # kept only when it worked
        self._may_take_a_step()
        version = await self._find_version(address, known)
        link = self._make(address, version)
        self._may_take_a_step()
        await link.open()
        self._versions[address] = version
        return link

    def _make(self, address: tuple[str, int], version: aiomqtt.ProtocolVersion) -> Link:
        options = client_options(
            address, version, self._credentials, client_id=self.client_id, will=self._will, timings=self._timings
        )
        if self._timings.plain or _unknown_parts():
            if self._visiting:
                raise Unavailable(
                    "a broker that may be anybody's is not visited on a plain connection: it has no limit"
                )
            return PlainLink(address, version, self._on_arrived, options)
        limit_bytes = packets.PACKET_LIMIT_BYTES if self._visiting else 0
        return QuickLink(address, version, self._on_arrived, options, limit_bytes=limit_bytes)

    def _on_arrived(
        self, topic: str, payload: bytes, qos: int, retained: bool, response_topic: str, correlation: bytes | None
    ) -> None:
        if topic:
            self._dispatch(topic, payload, qos, retained, response_topic, correlation)
        else:
            self.counters["malformed"] += 1

    async def _serve(self, link: Link, address: tuple[str, int]) -> None:
        """Use `link` until it is lost, which raises, or until cancelled."""
        self._may_take_a_step(self._timings.keepalive_seconds)  # before that, a silent broker is not noticed
        try:
            wanted = self._wanted()
            subscribing = asyncio.create_task(link.subscribe_all(wanted), name="bus-subscribe")
            try:
                await asyncio.wait({subscribing, link.lost}, return_when=asyncio.FIRST_COMPLETED)
                if not subscribing.done():
                    raise Unavailable(f"the connection was lost: {link.lost.exception() or 'the broker closed it'}")
                subscribing.result()
            finally:
                subscribing.cancel()
                await asyncio.wait({subscribing})
            link.subscribe_soon([pair for pair in self._wanted() if pair not in wanted])  # subscribed in the meantime
            self._link = link
            self._again = deque(self._under_way)
            link.on_room = self._send_again
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
            self._may_take_a_step()
            self._link = None
            self._ready.clear()
            await link.close()

    def _may_take_a_step(self, more_seconds: float = 0.0) -> None:
        self._moves_by = time.monotonic() + self._timings.connect_timeout_seconds + more_seconds

    def _wanted(self) -> list[tuple[str, int]]:
        return [(key, value[0]) for key in self._subscriptions if (value := self._subscriptions.get(key))]

    async def _call_back(self) -> None:
        for callback in self._callbacks:
            await callback()

    def _note(self, address: tuple[str, int] | None, error: Exception) -> None:
        place = f"{address[0]}:{address[1]}" if address else "discovery"
        if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) and error.errno and error.errno > 0:
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
        return Unavailable(f"{what} ({self._what_was_tried()}): is `potluck up` (or the broker) running there?")

    def _what_was_tried(self) -> str:
        return "; ".join(f"{place}: {reason}" for place, reason in self._tried.items()) or (
            f"{self._trying} has not answered yet" if self._trying else "where it is, is not known yet"
        )

    @property
    def address(self) -> tuple[str, int] | None:
        return None if self._link is None else self._link.address

    def stalled_seconds(self) -> float:
        return 0.0 if self._link is not None else max(0.0, time.monotonic() - self._moves_by)

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
                    while self._again and link is self._link:  # these messages came first
                        await link.room()
                    await link.send(topic, payload, qos, retain, mirrored)
            except TimeoutError:
                raise self._unavailable(f"the broker did not take a message within {limit_seconds:g} s") from None
            except (OSError, aiomqtt.MqttError) as error:
                log.info("sending again %s", fields(topic=topic, reason=str(error)))
                link.give_up(error)
                if link is self._link:  # the loss was noticed here first
                    self._may_take_a_step()
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
            if retain:
                self._newest[topic] = message
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
                while (link := self._link) is not None:
                    self._send_again()
                    if not self._again and link.places:
                        break
                    await link.room()
        except TimeoutError:
            raise self._unavailable(f"the broker did not take a message within {limit_seconds:g} s") from None
        except OSError as error:
            log.debug("no room on a connection that is lost %s", fields(reason=str(error)))
        await asyncio.sleep(0)

    def _hand_over(self, link: Link, message: _UnderWay) -> bool:
        return link.post(
            message.topic, message.payload, message.retain, message.mirrored, partial(self._on_receipt, message)
        )

    def _on_receipt(self, message: _UnderWay, error: Exception | None) -> None:
        if isinstance(error, OSError):
            return  # it is sent again on the next connection
        self._under_way.pop(message, None)
        if not self._under_way:
            self._newest.clear()
        if error is not None:
            log.info("message dropped %s", fields(topic=message.topic, reason=error))
        self._send_again()

    def _send_again(self) -> None:
        """Send what the last connection left, as far as this one takes it. Messages that are too old are dropped."""
        while self._again and self._link is not None:
            message = self._again[0]
            if message.retain and self._newest.get(message.topic) is not message:
                del self._under_way[message]  # the broker may have a later message, which this one must not undo
            elif message.given_up_at < time.monotonic():
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
        """Reach the broker. If its version is not known, ask with a bare MQTT 5 CONNECT.

        This waits in asyncio, where it can be cancelled; aiomqtt connects in a thread, which cannot. A 3.1.1 broker answers
        with a CONNACK of two bytes or hangs up (amqtt may do neither when the CONNECT has a will).
        """
        writer = None
        try:
            async with asyncio.timeout(self._timings.connect_timeout_seconds):
                reader, writer = await reach(address, self._credentials)
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


@cache
def _unknown_parts() -> bool:
    """Whether the libraries lack names that `QuickLink` uses: then each connection is plain. Logged once."""
    unknown = quick_link.missing(aiomqtt.Client("localhost"))
    if unknown:
        names = fields(missing=", ".join(unknown), tested="aiomqtt 2.5.1, paho-mqtt 2.1.0 to 2.2.0")
        log.warning("these versions of aiomqtt and paho are not known: the bus is slower %s", names)
    return bool(unknown)
