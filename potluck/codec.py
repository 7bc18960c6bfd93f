"""Bytes <-> messages: msgpack or JSON, told apart by the first byte, checked against `potluck.messages`.

msgpack maps begin with 0x80-0x8F, 0xDE or 0xDF, JSON objects with `{` (0x7B), so neither needs a label.
"""

from __future__ import annotations

import json
import math
import re
from functools import cache
from typing import Any, Literal, TypeVar

import msgpack
import msgspec

from potluck.errors import BadMessage, TooLarge
from potluck.messages import INLINE_LIMIT_BYTES, AnyMessage, Message

Encoding = Literal["msgpack", "json"]
CONTENT_TYPES: dict[Encoding, str] = {"msgpack": "application/msgpack", "json": "application/json"}

_LONG_NUMBER = re.compile(rb"[0-9]{19}")
_NATIVE = {"msgpack": (bytes,), "json": ()}
T = TypeVar("T")


def encode(message: Message, encoding: Encoding = "msgpack", *, limit: int = INLINE_LIMIT_BYTES) -> bytes:
    """The payload of `message`. Raises TooLarge above `limit` bytes."""
    payload = pack(message, encoding)
    if len(payload) > limit:
        raise TooLarge(
            f"{type(message).__name__} is {len(payload)} bytes; the limit on the bus is {limit}: send what is large as a blob"
        )
    return payload


def decode(payload: bytes, *, limit: int = INLINE_LIMIT_BYTES) -> tuple[Message, Encoding]:
    """The message in `payload` and how it was encoded. Raises TooLarge or BadMessage, naming the field."""
    if len(payload) > limit:
        raise TooLarge(f"a message of {len(payload)} bytes is over the limit of {limit}: send what is large as a blob")
    value, encoding = _parse(payload)
    name = value.get("type")
    # Converting to the one class, not to the union of all: msgspec would build that union anew for each message.
    kind = _kinds().get(name) if isinstance(name, str) else None
    return _convert(value, kind or AnyMessage, encoding), encoding


def salvage(payload: bytes) -> tuple[str, str, Encoding | None]:
    """`(id, reply_to, encoding)` of a payload that did not decode, so that it can be answered; empty where unknown."""
    try:
        value, encoding = _parse(payload)
    except BadMessage:
        return "", "", None
    texts = (value.get("id"), value.get("reply_to"))
    return (*(text if isinstance(text, str) else "" for text in texts), encoding)  # type: ignore[return-value]


def pack(value: Any, encoding: Encoding = "msgpack") -> bytes:
    """Any struct or plain value as bytes, without a size limit: for files and for frames between our own processes.

    Raises BadMessage for what an encoding cannot carry.
    """
    try:
        plain = msgspec.to_builtins(value, builtin_types=_NATIVE[encoding])
        if encoding == "json":
            return _json(plain).encode()
        packed: bytes = msgpack.packb(plain)
    except (OverflowError, RecursionError, ValueError) as error:
        raise BadMessage(f"{type(value).__name__} cannot be sent as {encoding}: {error}") from error
    return packed


def _json(plain: Any) -> str:
    """JSON as RFC 8259 has it: there are no numbers that are not finite, so they are null."""
    try:
        return json.dumps(plain, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(finite(plain), separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def finite(plain: Any) -> Any:
    """The same plain value with None for each number that is not finite."""
    if isinstance(plain, float):
        return plain if math.isfinite(plain) else None
    if isinstance(plain, dict):
        return {key: finite(value) for key, value in plain.items()}
    if isinstance(plain, list | tuple):
        return [finite(value) for value in plain]
    return plain


def unpack(payload: bytes, kind: type[T]) -> T:
    """The value of type `kind` in `payload`, which `pack` wrote. Raises BadMessage."""
    value, encoding = _parse(payload)
    converted: T = _convert(value, kind, encoding)
    return converted


def _parse(payload: bytes) -> tuple[dict[Any, Any], Encoding]:
    if not payload:
        raise BadMessage("the payload is empty: expected a msgpack or JSON map")
    first = payload[0]
    encoding: Encoding
    try:
        if first == 0x7B or first in b" \t\r\n\xef":
            encoding = "json"
            # Only where there may be one: the check costs as much as the rest.
            parse_int = _number if _LONG_NUMBER.search(payload) else None
            value = json.loads(payload.decode("utf-8-sig"), parse_int=parse_int)
            if b"\\ud" in payload or b"\\uD" in payload:
                json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair cannot be sent on
        elif 0x80 <= first <= 0x8F or first in (0xDE, 0xDF):
            encoding = "msgpack"
            size = len(payload)
            value = msgpack.unpackb(
                payload, strict_map_key=False, max_str_len=size, max_bin_len=size, max_array_len=size, max_map_len=size
            )
        else:
            raise BadMessage(f"the payload is neither a msgpack nor a JSON map: its first byte is 0x{first:02x}")
    except (ValueError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise BadMessage(f"the payload is not valid {encoding}: {error or type(error).__name__}") from error
    if not isinstance(value, dict):
        raise BadMessage(f"the payload is a {type(value).__name__}: expected a map")
    return value, encoding


def _number(text: str) -> int | float:
    """JSON has whole numbers of any size, msgpack of 64 bits: what is larger is a float, as in JavaScript."""
    value = int(text)
    return value if -(2**63) <= value < 2**64 else float(text)


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
