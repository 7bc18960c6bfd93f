"""MQTT's packets as bytes: writes and reads PUBLISH, which is nearly all traffic, and cuts the stream into packets.

MQTT 3.1.1 and 5, sections 2 and 3.3. All other packets are left to paho.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from potluck.errors import BadMessage

PUBLISH = 0x30
PUBACK = 0x40
PACKET_LIMIT_BYTES = 2 * 2**20
"""Above the limit of a message: a sender of a message that is too large gets an answer, and keeps the connection."""
_QOS_1 = 0x02
_LENGTH_BYTES = 4
"""The most bytes of a remaining length."""


class Publish(NamedTuple):
    """`topic` is "" if it is not UTF-8. `properties` are those of MQTT 5, with their length. `packet_id` is set at QoS 1."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    packet_id: bytes = b""
    properties: bytes = b""


def publish(topic: str, payload: bytes, retain: bool, properties: bytes, packet_id: bytes = b"") -> bytes:
    """A PUBLISH, at QoS 1 if it has a packet id. `properties` with their length, as in MQTT 5; empty in 3.1.1.

    Raises ValueError for a bad topic.
    """
    head = _topic(topic)
    first = PUBLISH | retain | (_QOS_1 if packet_id else 0)
    return b"".join(
        (
            bytes((first,)),
            length(len(head) + len(packet_id) + len(properties) + len(payload)),
            head,
            packet_id,
            properties,
            payload,
        )
    )


def puback(packet_id: bytes) -> bytes:
    """The receipt of a PUBLISH at QoS 1."""
    return b"\x40\x02" + packet_id


def read_puback(body: bytes) -> tuple[int, int]:
    """The packet id of a receipt, and the reason code: from 0x80 on, the broker refused the packet (MQTT 5, section 3.4.2)."""
    if len(body) < 2:
        raise BadMessage("a PUBACK names no packet")
    return int.from_bytes(body[:2], "big"), body[2] if len(body) > 2 else 0


def read_publish(first: int, body: bytes, *, v5: bool) -> Publish:
    """Read a PUBLISH from its first byte and the bytes after its length. Raises BadMessage."""
    qos = first >> 1 & 3
    if qos > 1:  # we subscribe at QoS 0 and 1
        raise BadMessage(f"a PUBLISH came at QoS {qos}")
    at = 2 + int.from_bytes(body[:2], "big")
    topic = _text(body[2:at])
    packet_id, properties = b"", b""
    if qos:
        packet_id = body[at : at + 2]
        at += 2
    if v5:
        size, start = _read_length(body, at)
        if size:
            properties = body[at : start + size]
        at = start + size
    if at > len(body):
        raise BadMessage("a PUBLISH ends before its payload begins")
    return Publish(topic, body[at:], qos, bool(first & 1), packet_id, properties)


def answer_to(properties: bytes) -> tuple[str, bytes | None]:
    """Response topic ("": none, or not UTF-8) and correlation data among the properties of a PUBLISH, their length before them.

    MQTT 5, sections 2.2.2 and 3.3.2.3. Raises BadMessage for a property that does not belong there, or is cut off.
    """
    response_topic, correlation = "", None
    _, at = _read_length(properties, 0)
    end = len(properties)
    while at < end:
        kind = properties[at]
        at += 1
        if kind in _NUMBERS:
            at += _NUMBERS[kind]
        elif kind in _SIZED:
            for _ in range(_SIZED[kind]):
                start = at + 2
                at = start + int.from_bytes(properties[at:start], "big")
            if kind == _CORRELATION_DATA:
                correlation = properties[start:at]
            elif kind == _RESPONSE_TOPIC:
                response_topic = _text(properties[start:at])
        elif kind == _SUBSCRIPTION_IDENTIFIER:
            _, at = _read_length(properties, at)
        else:
            raise BadMessage(f"a PUBLISH has a property 0x{kind:02x}, which does not belong there")
    if at > end:
        raise BadMessage("a property is cut off")
    return response_topic, correlation


def length(size: int) -> bytes:
    """A variable byte integer (MQTT 5, section 1.5.5)."""
    if size < 0x80:
        return _SMALL[size]
    packed = bytearray()
    while size >= 0x80:
        packed.append(size & 0x7F | 0x80)
        size >>= 7
    packed.append(size)
    return bytes(packed)


class Splitter:
    """Cuts a stream into packets, in whatever pieces it arrives. `limit_bytes`: limit of a packet's body; 0: that of MQTT."""

    def __init__(self, limit_bytes: int = 0) -> None:
        self._limit_bytes = limit_bytes
        self._pieces: list[bytes] = []
        """Pieces of an incomplete packet. They are joined once, when it is whole."""
        self._missing = 0

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """First byte and body of each packet that is whole now. Raises BadMessage for a bad or too large packet."""
        if self._pieces:
            self._pieces.append(data)
            self._missing -= len(data)
            if self._missing > 0:
                return []
            data = b"".join(self._pieces)
            self._pieces.clear()
        found: list[tuple[int, bytes]] = []
        at, end = 0, len(data)
        while end - at >= 2:
            size, start = data[at + 1], at + 2
            if size >= 0x80:
                if end - at < 1 + _LENGTH_BYTES and data[end - 1] >= 0x80:
                    break  # the length is not whole
                size, start = _read_length(data, at + 1)
                if self._limit_bytes and size > self._limit_bytes:
                    raise BadMessage(f"a packet of {size} bytes came, {self._limit_bytes} are allowed")
            if start + size > end:
                self._missing = start + size - end
                break
            found.append((data[at], data[start : start + size]))
            at = start + size
        if at < end:
            self._missing = max(1, self._missing)
            self._pieces.append(data[at:])
        else:
            self._missing = 0
        return found


def _text(data: bytes) -> str:
    """The text; "": it is not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return ""


def _read_length(data: bytes, at: int) -> tuple[int, int]:
    """A variable byte integer and where it ends. Raises BadMessage."""
    size = 0
    for place in range(_LENGTH_BYTES):
        if at + place >= len(data):
            raise BadMessage("a length is cut off")
        byte = data[at + place]
        size |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return size, at + place + 1
    raise BadMessage("a length has more than four bytes")


_RESPONSE_TOPIC, _CORRELATION_DATA, _SUBSCRIPTION_IDENTIFIER = 0x08, 0x09, 0x0B
_NUMBERS = {0x01: 1, 0x02: 4, 0x23: 2}
"""Bytes of payload format indicator, message expiry interval, topic alias."""
_SIZED = {0x03: 1, _RESPONSE_TOPIC: 1, _CORRELATION_DATA: 1, 0x26: 2}
"""Properties of texts or bytes with a length before each, and how many: content type, ..., a user property's name and value."""

_SMALL = [bytes((size,)) for size in range(0x80)]


@lru_cache(maxsize=1024)  # clients have an inbox each, nodes and models a few topics
def _topic(topic: str) -> bytes:
    encoded = topic.encode()
    if not encoded or len(encoded) > 0xFFFF or "+" in topic or "#" in topic:
        raise ValueError(f"{topic[:80]!r} is not a topic")
    return len(encoded).to_bytes(2, "big") + encoded
