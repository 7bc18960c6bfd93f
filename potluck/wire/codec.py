"""Bytes <-> messages: msgpack or JSON, recognised by the first byte, checked against `potluck.wire.messages`.

msgpack maps begin with 0x80-0x8F, 0xDE or 0xDF, JSON objects with `{` (0x7B), so neither needs a label.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from typing import Any, Literal, TypeVar

import msgpack
import msgspec

from potluck.errors import BadMessage, TooLarge
from potluck.wire.messages import AnyMessage
from potluck.wire.values import INLINE_LIMIT_BYTES, Message

Encoding = Literal["msgpack", "json"]
CONTENT_TYPES: dict[Encoding, str] = {"msgpack": "application/msgpack", "json": "application/json"}

_LONG_NUMBER = re.compile(rb"[0-9]{19}")
_IN_JSON = {key: re.compile(rb'"%s"\s*:\s*("(?:[^"\\]|\\.)*")' % key.encode(), re.DOTALL) for key in ("id", "reply_to")}
_UNREADABLE = (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException)
"""Errors of the parsers. TypeError: a msgpack map may have a list as a key; our messages never have."""
_NATIVE = {"msgpack": (bytes,), "json": ()}
_WHOLE = msgspec.msgpack.Decoder(msgspec.Raw)
_PACKER = msgspec.msgpack.Encoder()
T = TypeVar("T")


def encode(message: Message, encoding: Encoding = "msgpack", *, limit: int = INLINE_LIMIT_BYTES) -> bytes:
    """The payload of `message`. Raises TooLarge above `limit` bytes."""
    payload = pack(message, encoding)
    if len(payload) > limit:
        raise TooLarge(
            f"{type(message).__name__} is {len(payload)} bytes; the limit on the bus is {limit}: send large data as a blob"
        )
    return payload


def decode(payload: bytes, *, limit: int = INLINE_LIMIT_BYTES) -> tuple[Message, Encoding]:
    """(the message in `payload`, its encoding). Raises TooLarge or BadMessage, naming the field."""
    if len(payload) > limit:
        raise TooLarge(f"a message of {len(payload)} bytes is over the limit of {limit}: send large data as a blob")
    if payload[:1] not in b"{ \t\r\n\xef":
        # The fast way, for nearly all messages: five times as fast. If it fails, the slow way below tells what is wrong.
        with suppress(msgspec.MsgspecError, *_UNREADABLE):
            return _decoder().decode(payload), "msgpack"
    value, encoding = _parse(payload)
    name = value.get("type")
    # Convert to the one class, not to the union of all: msgspec would build that union again for each message.
    kind = _kinds().get(name) if isinstance(name, str) else None
    return _convert(value, kind or AnyMessage, encoding), encoding


def salvage(payload: bytes) -> tuple[str, str, Encoding | None]:
    """`(id, reply_to, encoding)` of a payload that did not decode, so that it can be answered; empty where unknown.

    Finds them even where other fields cannot be read: the sender should hear of its mistake.
    """
    encoding = _encoding_of(payload)
    found: dict[str, str] = {}
    if encoding is not None:
        for key, text in (_fields_of_json if encoding == "json" else _fields_of_msgpack)(payload):
            found.setdefault(key, text)
    return found.get("id", ""), found.get("reply_to", ""), encoding


def _fields_of_json(payload: bytes) -> Iterator[tuple[str, str]]:
    try:
        value, _ = _parse(payload)
    except BadMessage:
        for key, pattern in _IN_JSON.items():
            if (match := pattern.search(payload)) is not None:
                with suppress(*_UNREADABLE):  # a text that cannot be sent back is of no use
                    text = json.loads(match[1])
                    text.encode()
                    yield key, text
        return
    yield from ((key, value[key]) for key in _IN_JSON if isinstance(value.get(key), str))


def _fields_of_msgpack(payload: bytes) -> Iterator[tuple[str, str]]:
    """(name, text) of fields, up to the first field that cannot be read. Old libraries write texts as `bin`."""
    # Read texts as bytes: then bad UTF-8 does not stop before the next field.
    # Lists and maps are passed over: msgpack takes room for as many items as each says it has, before it looks for them.
    unpacker = msgpack.Unpacker(
        raw=True, strict_map_key=False, max_buffer_size=len(payload), max_array_len=0, max_map_len=0
    )
    with suppress(*_UNREADABLE):
        unpacker.feed(payload)
        for _ in range(unpacker.read_map_header()):
            key = unpacker.unpack()
            if key not in (b"id", b"reply_to"):
                unpacker.skip()
                continue
            if isinstance(text := unpacker.unpack(), bytes):
                with suppress(UnicodeDecodeError):
                    yield key.decode(), text.decode()


def pack(value: Any, encoding: Encoding = "msgpack") -> bytes:
    """Any struct or plain value as bytes, without a size limit: for files, and for frames between our own processes.

    Raises BadMessage for a value that the encoding cannot carry.
    """
    try:
        if encoding == "msgpack":
            return _PACKER.encode(value)
        return _json(msgspec.to_builtins(value)).encode()
    except (OverflowError, RecursionError, ValueError) as error:
        raise BadMessage(f"{type(value).__name__} cannot be sent as {encoding}: {error}") from error


def _json(plain: Any) -> str:
    """JSON as in RFC 8259, which has no infinite numbers and no NaN: they become null."""
    try:
        return json.dumps(plain, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(finite(plain), separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def finite(plain: Any) -> Any:
    """The same plain value, with None for each number that is not finite."""
    if isinstance(plain, float):
        return plain if math.isfinite(plain) else None
    if isinstance(plain, dict):
        return {key: finite(value) for key, value in plain.items()}
    if isinstance(plain, list | tuple):
        return [finite(value) for value in plain]
    return plain


def unpack(payload: bytes, kind: type[T]) -> T:
    """The value of type `kind` in `payload`, written by `pack`. Raises BadMessage."""
    value, encoding = _parse(payload)
    converted: T = _convert(value, kind, encoding)
    return converted


def _parse(payload: bytes) -> tuple[dict[Any, Any], Encoding]:
    if not payload:
        raise BadMessage("the payload is empty: expected a msgpack or JSON map")
    encoding = _encoding_of(payload)
    if encoding is None:
        raise BadMessage(f"the payload is neither a msgpack nor a JSON map: its first byte is 0x{payload[0]:02x}")
    try:
        if encoding == "json":
            # Check only where there may be a long number: the check costs as much as parsing.
            parse_int = _number if _LONG_NUMBER.search(payload) else None
            value = json.loads(payload.decode("utf-8-sig"), parse_int=parse_int)
            if b"\\ud" in payload or b"\\uD" in payload:
                json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair could not be sent on
        else:
            size = len(payload)
            # Only what is whole: msgpack takes room for as many items as a list says it has, and lists in lists say it again and again.
            _WHOLE.decode(payload)
            value = msgpack.unpackb(
                payload, strict_map_key=False, max_str_len=size, max_bin_len=size, max_array_len=size, max_map_len=size
            )
    except (msgspec.MsgspecError, *_UNREADABLE) as error:
        raise BadMessage(f"the payload is not valid {encoding}: {error or type(error).__name__}") from error
    if not isinstance(value, dict):
        raise BadMessage(f"the payload is a {type(value).__name__}: expected a map")
    return value, encoding


def _encoding_of(payload: bytes) -> Encoding | None:
    """The encoding that the first byte tells; None for any other byte."""
    first = payload[0] if payload else 0
    if first == 0x7B or first in b" \t\r\n\xef":
        return "json"
    return "msgpack" if 0x80 <= first <= 0x8F or first in (0xDE, 0xDF) else None


def _number(text: str) -> int | float:
    """A number from JSON. JSON has whole numbers of any size, msgpack of 64 bits: a larger one becomes a float, as in JavaScript."""
    value = int(text)
    return value if -(2**63) <= value < 2**64 else float(text)


@cache
def _decoder() -> msgspec.msgpack.Decoder[Message]:
    return msgspec.msgpack.Decoder(AnyMessage)


@cache
def _kinds() -> dict[str, type[Message]]:
    return {kind.__name__: kind for kind in AnyMessage.__args__}


def _convert(value: dict[Any, Any], kind: Any, encoding: Encoding) -> Any:
    try:
        return msgspec.convert(value, kind, builtin_types=_NATIVE[encoding])
    except (msgspec.ValidationError, RecursionError, ValueError) as error:
        if kind is AnyMessage:
            raise BadMessage(f"unknown message type {str(value.get('type'))[:80]!r}: see docs/protocol.md") from error
        label = value.get("type") or getattr(kind, "__name__", "message")
        raise BadMessage(f"{label}: {error}") from error
