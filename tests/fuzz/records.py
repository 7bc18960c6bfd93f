"""TFRecord files of `tf.train.Example`, written by hand (length, masked CRC, data, masked CRC)."""

from __future__ import annotations

import struct
from collections.abc import Iterable

import google_crc32c


def written(records: Iterable[bytes]) -> bytes:
    """A file of these records."""
    return b"".join((head := struct.pack("<Q", len(one))) + _crc(head) + one + _crc(one) for one in records)


def split(data: bytes) -> list[bytes]:
    """The records of a file, whatever their checksums are."""
    found, place = [], 0
    while place + 16 <= len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        if place + 16 + length > len(data):
            break
        found.append(data[place + 12 : place + 12 + length])
        place += 16 + length
    return found


def example(**features: list[bytes] | list[int] | list[float]) -> bytes:
    """A `tf.train.Example` (protobuf's wire format; the numbers of feature.proto)."""
    entries = b""
    for name, values in features.items():
        if isinstance(values[0], bytes):
            inner = _sized(1, b"".join(_sized(1, one) for one in values if isinstance(one, bytes)))
        elif isinstance(values[0], float):
            inner = _sized(2, _sized(1, struct.pack(f"<{len(values)}f", *values)))
        else:
            inner = _sized(3, _sized(1, b"".join(_varint(int(one) & 2**64 - 1) for one in values)))
        entries += _sized(1, _sized(1, name.encode()) + _sized(2, inner))
    return _sized(1, entries)


def _sized(number: int, body: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(body)) + body


def _varint(value: int) -> bytes:
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def _crc(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
