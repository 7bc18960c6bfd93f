"""A connection that is three times as quick as aiomqtt's, and the only module that reaches into aiomqtt and paho.

Tested with aiomqtt 2.5.1 and paho 2.1.0 and 2.2.0. `PARTS` lists each private name that is used, and its purpose. If a name is
missing, `missing` returns it, and the bus uses a `PlainLink` instead.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Mapping
from typing import Any, Literal

import aiomqtt
from paho.mqtt import MQTTException
from paho.mqtt.client import MQTT_ERR_CONN_LOST, MQTT_ERR_SUCCESS, Client, error_string
from paho.mqtt.subscribeoptions import SubscribeOptions

from potluck.bus import packets
from potluck.bus.link import UNDER_WAY_LIMIT, Arrived, Link, Receipt, no_broker
from potluck.bus.properties import Mirrored, pack
from potluck.errors import BadMessage, PotluckError, Unavailable
from potluck.logs import fields

log = logging.getLogger(__name__)

PARTS: dict[str, dict[str, str]] = {
    "aiomqtt": {
        "_client": "paho's client: all that follows is done to it",
        "_loop": "the loop that the connection belongs to",
        "_connected": "done when the broker has let us in, or refused",
        "_disconnected": "done when the connection is over: `lost`",
        "_misc_task": "pings, which it ends when it closes",
        "_misc_loop": "pings",
        "_client_connect": "connects in a thread: overridden to know when that is over",
        "_wait_for": "waits for a grant for as long as it waits for all else",
        "_on_connect": "overridden to read how much may be under way",
        "_on_subscribe": "overridden: grants are looked at here",
        "_on_unsubscribe": "overridden: nobody waits",
        "_on_socket_open": "overridden: what arrives is read here",
        "_on_socket_register_write": "overridden: written when a turn of the loop is over, without a pipe",
    },
    "paho": {
        "_sock": "whether the connection is still there; what TLS has read already",
        "_sock_recv": "reads, over TLS too",
        "_sock_send": "writes, over TLS too",
        "_sock_close": "closes at once",
        "_out_packet": "what the socket did not take waits here with paho's own packets",
        "_in_packet": "a packet for paho to read is put here ...",
        "_packet_handle": "... and read",
        "_loop_rc_handle": "tells it that the connection is lost",
    },
}
"""Private names by library, and their purposes."""
_HEARD_AT = ("_last_bytes_received", "_last_msg_in")
"""The attribute with the time of the last arrival, for paho's pings: its name in 2.2, and before."""
_THREAD_SECONDS = 0.02
"""How often a caller that gave up checks whether the connecting thread has ended."""
_RECEIVE_BYTES = 1 << 17
_GATHERED_LIMIT_BYTES = 1 << 18
_OWN_IDS = range(0x8000, 0x10000)
"""Packet ids of our own messages. paho counts its ids, for subscriptions, from 1."""
_CONNACK = b"\x20"
_REFUSED = 0x80
"""Reason codes from here on mean a refusal (MQTT 5, section 2.4)."""


def missing(client: aiomqtt.Client) -> list[str]:
    """Private names that this version does not have, as `aiomqtt._loop`."""
    mqtt = getattr(client, "_client", None)
    found = [f"aiomqtt.{name}" for name in PARTS["aiomqtt"] if not hasattr(client, name)]
    found += [f"paho.{name}" for name in PARTS["paho"] if not hasattr(mqtt if mqtt is not None else Client, name)]
    if mqtt is not None and not any(hasattr(mqtt, name) for name in _HEARD_AT):
        found.append(f"paho.{_HEARD_AT[0]}")
    return found


class QuickLink(Link, aiomqtt.Client):
    """Passes messages on as they are read, and writes as soon as it can.

    aiomqtt queues each message, makes a task for each, and wakes the loop through a pipe for each write. paho calls the kernel
    three times for each packet that it reads, and makes a dozen objects for each that it writes. The overrides below avoid that:
    messages are read and written here, and paho does the rest (connecting, subscriptions, pings).
    """

    def __init__(
        self,
        address: tuple[str, int],
        version: aiomqtt.ProtocolVersion,
        arrived: Arrived,
        options: Mapping[str, Any],
        *,
        limit_bytes: int,
    ) -> None:
        """`options` of aiomqtt's client (`potluck.bus.connecting`). `limit_bytes`: limit of a received packet; 0: that of MQTT."""
        Link.__init__(self, address, version, arrived)
        self._receipts: dict[int, Receipt] = {}
        """Receipts of messages that the broker has not acknowledged yet, by packet id."""
        self._ids = itertools.cycle(_OWN_IDS)
        self._limit = UNDER_WAY_LIMIT
        self._grants: dict[int, asyncio.Future[None] | None] = {}
        self._flush_handle: asyncio.Handle | None = None
        self._gathered: list[bytes] = []
        """Packets that are written when this turn of the loop is over."""
        self._gathered_bytes = 0
        self._splitter = packets.Splitter(limit_bytes)
        self._in_loop = False
        self._thread: Literal["", "runs", "over"] = ""
        aiomqtt.Client.__init__(self, **options)
        self._client.connect_timeout = options["timeout"]

    async def open(self) -> None:
        opening = asyncio.create_task(self.__aenter__(), name="bus-open")
        try:
            await asyncio.shield(opening)
        except BaseException:
            await self._thread_over()
            opening.cancel()  # what is left is the broker's answer, which may never come
            await asyncio.wait([opening])
            if not opening.cancelled() and opening.exception() is None:
                await self.close()  # cancelled, but connected by now: after a goodbye the will is not sent
            else:
                self._drop()
            raise
        self._in_loop = True

    def _client_connect(self) -> None:
        """Runs in a thread."""
        self._thread = "runs"
        try:
            super()._client_connect()
        finally:
            self._thread = "over"

    async def _thread_over(self) -> None:
        """Return when the connecting thread has ended, and the loop has done what the thread asked for.

        The thread cannot be cancelled. It does not take long, because the broker was probed before.
        """
        await asyncio.sleep(_THREAD_SECONDS)
        while self._thread == "runs":  # noqa: ASYNC110 - a thread sets it
            await asyncio.sleep(_THREAD_SECONDS)
        await asyncio.sleep(0)

    @property
    def lost(self) -> asyncio.Future[None]:
        return self._disconnected

    async def close(self) -> None:
        try:
            await self.__aexit__(None, None, None)
        except (aiomqtt.MqttError, OSError, PotluckError) as error:
            # aiomqtt raises the error that ended the connection once more. It would replace a CancelledError.
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
        self._no_room_any_more()
        lost = ConnectionError("the connection was lost")
        for waiter in self._grants.values():
            if waiter is not None and not waiter.done():
                waiter.set_exception(lost)
                waiter.exception()
        for receipt in list(self._receipts.values()):
            receipt(lost)
        self._receipts.clear()

    # sending

    @property
    def places(self) -> int:
        if self._client.want_write() or self._disconnected.done():
            return 0
        return self._limit - len(self._receipts)

    def post(
        self, topic: str, payload: bytes, retain: bool, mirrored: Mirrored | None, receipt: Receipt | None = None
    ) -> bool:
        if self._client.want_write() or self._disconnected.done():
            return False
        if receipt is not None and len(self._receipts) >= self._limit:
            return False  # at QoS 0 nothing is counted
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

    def _write(self, packet: bytes) -> None:
        """The first packet in a turn of the loop is sent at once; later ones are sent together when the turn is over."""
        if self._flush_handle is not None:
            self._gathered.append(packet)
            self._gathered_bytes += len(packet)
            if self._gathered_bytes > _GATHERED_LIMIT_BYTES:
                self._push_gathered()
            return
        self._flush_handle = self._loop.call_soon(self._flush)
        self._push(packet)

    def _push(self, data: bytes) -> None:
        """Give bytes to the socket. The rest that it does not take waits at the end of paho's queue."""
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
            self._tell_room()
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
            self._tell_room()

    def _on_socket_register_write(self, client: Any, userdata: Any, sock: Any) -> None:
        if not self._in_loop:
            super()._on_socket_register_write(client, userdata, sock)
        elif self._flush_handle is None:  # no pipe, no poll: write when this turn of the loop is over
            self._flush_handle = self._loop.call_soon(self._flush)

    def _on_connect(self, client: Any, userdata: Any, flags: Any, reason_code: Any, properties: Any = None) -> None:
        self._limit = min(UNDER_WAY_LIMIT, getattr(properties, "ReceiveMaximum", UNDER_WAY_LIMIT))
        super()._on_connect(client, userdata, flags, reason_code, properties)

    def _on_puback(self, body: bytes) -> None:
        packet_id, code = packets.read_puback(body)
        receipt = self._receipts.pop(packet_id, None)
        if receipt is None:
            return  # a receipt that came twice
        receipt(Unavailable(f"the broker refused the message: 0x{code:02x}") if code >= _REFUSED else None)
        self._tell_room()

    # subscribing

    async def subscribe_all(self, filters: list[tuple[str, int]]) -> None:
        if filters:
            granted = self._loop.create_future()
            self._ask(filters, granted)
            await self._wait_for(granted, timeout=None)

    def subscribe_soon(self, filters: list[tuple[str, int]]) -> None:
        if filters:
            self._ask(filters, None)

    def _ask(self, filters: list[tuple[str, int]], granted: asyncio.Future[None] | None) -> None:
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
                for name in _HEARD_AT:
                    setattr(self._client, name, time.monotonic())
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
        except (OSError, BadMessage, MQTTException) as error:
            self._broken(error)

    def _received(self, message: packets.Publish) -> None:
        response_topic, correlation = "", None
        if message.properties:
            response_topic, correlation = packets.answer_to(message.properties)
        self._arrived(message.topic, message.payload, message.qos, message.retain, response_topic, correlation)
        if message.qos:
            self._write(packets.puback(message.packet_id))

    def _hand_on(self, first: int, body: bytes) -> None:
        """Let paho read a packet. Raises ConnectionError if this ended the connection."""
        packet: Any = self._client._in_packet
        packet |= {"command": first, "remaining_length": len(body), "packet": bytearray(body), "pos": 0}
        result = self._client._packet_handle()
        packet["command"] = 0
        if result > 0:
            raise ConnectionError(error_string(result))

    def _broken(self, error: Exception) -> None:
        """The connection is lost, for this reason."""
        if not self._connected.done():
            # The caller that waits for it gets the error at once.
            self._connected.set_exception(aiomqtt.MqttError(str(error)))
        self.give_up(error)
        self._client._loop_rc_handle(MQTT_ERR_CONN_LOST)
