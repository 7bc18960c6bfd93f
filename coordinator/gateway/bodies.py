"""Bodies of requests: read whole. Each body has a limit, and all bodies held at once have another."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import msgspec
from aiohttp import ClientPayloadError, web
from aiohttp.http_exceptions import HttpProcessingError

from coordinator.gateway.gate import caller_of_member
from potluck.errors import InvalidRequest, Overloaded, TimedOut, TooLarge
from potluck.net.http import TOO_SLOW, Patience, words

IDLE_SECONDS = 30.0
"""A body without a new byte for this long is given up, and so is a slow one (`potluck.net.http.Patience`)."""
HELD_AT_ONCE = 4
"""How many bodies of the largest size are held at once. More are refused, and clients may try again."""
HELD_EACH = 3
"""How many of these may come from one address, or in a closed cluster from one member, so that it does not keep out all others."""
IN_THREAD_BYTES = 256 * 1024
"""Up to this size, JSON is read and written in the event loop's thread. With more, other requests would wait."""
_INFLATES = 16
"""A compressed piece counts as this many times its size."""
T = TypeVar("T")


class Bodies:
    """Reads bodies of at most `limit_bytes`. A body counts as held until `release`."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self._held: dict[int, tuple[str, int]] = {}
        """The sender and size of each held body, by its request."""
        self._of: Counter[str] = Counter()
        """Held bytes by sender."""

    async def read(self, request: web.Request) -> bytes:
        """The body, decompressed as `Content-Encoding` says, and never more of it than the limit.

        Raises TooLarge, Overloaded, TimedOut, and InvalidRequest if it is cut off or cannot be decompressed.
        """
        if (request.content_length or 0) > self.limit_bytes:
            raise self._too_large()
        inflate = _inflater(request.headers.get("Content-Encoding", ""))
        content = request.content
        parts: list[bytes] = []
        size = received = 0
        patience, loop = Patience(IDLE_SECONDS), asyncio.get_running_loop()
        try:
            while not content.at_eof():
                if content.is_eof() or content.total_bytes > received:
                    part = content.read_nowait()  # it has arrived: no need to wait or to watch the clock
                else:
                    began_at = loop.time()
                    async with asyncio.timeout(patience.left()):
                        part = await content.readany()
                    patience.came(len(part), loop.time() - began_at)
                received += len(part)
                if inflate is not None:
                    # One byte over the limit is enough to know.
                    part = await beside(len(part) * _INFLATES, partial(inflate, part, self.limit_bytes - size + 1))
                size += len(part)
                if size > self.limit_bytes:
                    raise self._too_large()
                self._hold(request, len(part))
                parts.append(part)
        except TimeoutError:
            raise TimedOut(TOO_SLOW.format(IDLE_SECONDS)) from None
        except (HttpProcessingError, ClientPayloadError, web.RequestPayloadError) as error:
            raise InvalidRequest(f"the body cannot be read: {words(error)}") from error
        if inflate is not None and received and not inflate.ended:
            raise InvalidRequest(f"the body cannot be read: its {inflate.coding} is cut off")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def release(self, request: web.Request) -> None:
        """The body of this request is not needed any more."""
        peer, size = self._held.pop(id(request), ("", 0))
        self.held_bytes -= size
        self._of[peer] -= size
        if self._of[peer] <= 0:
            del self._of[peer]

    def _hold(self, request: web.Request, size: int) -> None:
        peer, held = self._held.get(id(request)) or (_sender(request), 0)
        mine = self._of[peer] + size > HELD_EACH * self.limit_bytes
        if mine or self.held_bytes + size > HELD_AT_ONCE * self.limit_bytes:
            count, whose = (self._of[peer], "your requests") if mine else (self.held_bytes, "requests")
            raise Overloaded(
                f"{count} bytes of {whose} are already being answered: try again in 1 s", retry_after_seconds=1.0
            )
        self.held_bytes += size
        self._of[peer] += size
        self._held[id(request)] = peer, held + size

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the body is over {self.limit_bytes} bytes: send fewer rows at once")


def _sender(request: web.Request) -> str:
    """The member that sent it, or in an open cluster its address."""
    member = caller_of_member(request)
    return member.identity if member is not None else request.remote or ""


class _Inflate:
    """Decompresses gzip (RFC 1952, one member) or deflate (RFC 1950, or 1951 from some clients), piece by piece."""

    def __init__(self, coding: str) -> None:
        self.coding = coding
        self._inner: Any = None

    @property
    def ended(self) -> bool:
        return self._inner is not None and bool(self._inner.eof)

    def __call__(self, part: bytes, most: int) -> bytes:
        """The bytes in `part`, at most `most`. If there are more, no further piece may be read. Raises InvalidRequest."""
        if not part:
            return b""
        if self._inner is None:
            bits = zlib.MAX_WBITS if part[0] & 0x0F == zlib.DEFLATED else -zlib.MAX_WBITS
            self._inner = zlib.decompressobj(zlib.MAX_WBITS | 16 if self.coding == "gzip" else bits)
        if self.ended:
            raise InvalidRequest(f"the body cannot be read: something follows the end of its {self.coding}")
        try:
            found: bytes = self._inner.decompress(part, most)
        except zlib.error as error:
            raise InvalidRequest(f"the body cannot be read as {self.coding}: {error}") from error
        if self._inner.unused_data:
            raise InvalidRequest(f"the body cannot be read: something follows the end of its {self.coding}")
        return found


def _inflater(coding: str) -> _Inflate | None:
    """The decompressor for a Content-Encoding; None: not compressed. Raises InvalidRequest."""
    coding = coding.strip().lower().removeprefix("x-")
    if coding in ("", "identity"):
        return None
    if coding not in ("gzip", "deflate"):
        raise InvalidRequest(
            f"the Content-Encoding {coding[:40]!r} is not known: send gzip, deflate, or bytes as they are"
        )
    return _Inflate(coding)


async def beside(size: int, work: Callable[[], T]) -> T:
    """The result of `work()`, which reads or writes `size` bytes. It runs in a thread if that takes long."""
    return await asyncio.to_thread(work) if size >= IN_THREAD_BYTES else work()


def decoded(body: bytes, decode: Callable[[bytes], T], kind: type[T], what: str) -> T:
    """The JSON in `body` as `kind`, decoded by `decode`. Raises InvalidRequest, which names the field."""
    try:
        return decode(body)
    except msgspec.ValidationError as error:  # it is valid JSON: reading it again gives no better error
        raise InvalidRequest(f"the body is not {what}: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:
        return msgspec.convert(_read_again(body), kind)
    except (ValueError, RecursionError) as error:  # msgspec.ValidationError is a ValueError
        raise InvalidRequest(f"the body is not {what}: {error}") from error


def plain(body: bytes) -> Any:
    """The JSON in `body` as plain values. Raises ValueError or RecursionError."""
    with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return msgspec.json.decode(body)
    return _read_again(body)


def _read_again(body: bytes) -> Any:
    """Read with Python's `json`: it is slower, takes NaN, Infinity and a byte order mark, and says where an error is."""
    value = json.loads(body.decode("utf-8-sig"))
    if b"\\ud" in body or b"\\uD" in body:
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair cannot be sent on
    return value
