"""Pull a blob from all holders at once, chunk by chunk; push a blob to a server that takes it; send inputs to a node."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp
import msgspec
from aiohttp import hdrs

from potluck.blobs.parts import TIMINGS, Parts, PlainParts, Timings, TlsParts, explained
from potluck.blobs.reading import Reads
from potluck.blobs.store import BlobStore, hash_file
from potluck.blobs.transfer import Transfer
from potluck.credentials import Credentials
from potluck.errors import (
    CorruptBlob,
    DiskFull,
    InvalidRequest,
    NotAllowed,
    NotAuthenticated,
    NotFound,
    TooLarge,
    Unavailable,
)
from potluck.logs import fields
from potluck.net.bulk_client import BulkClient
from potluck.net.http_client import session
from potluck.wire.addresses import NO_ADDRESS, is_address
from potluck.wire.values import BlobRef

log = logging.getLogger(__name__)

_SEND_BYTES = 1 << 18
_EXPECT_BYTES = 1 << 20
"""From this size on, we ask whether the blob is wanted before it is sent."""
_ANSWER_SECONDS = 60.0
"""How long to wait for an answer: the receiver hashes and stores before it answers."""
_INPUTS_SECONDS = 5.0
"""A node that takes no byte of a request's inputs, or does not answer, for this long is given up: there are others."""


@dataclass(eq=False)
class _UnderWay:
    transfer: Transfer
    task: asyncio.Task[Path]
    waiting: int = 0
    given_up: bool = False


class Downloader:
    """Fetches into `store`; an async context manager. Two fetches of one blob are one."""

    def __init__(self, store: BlobStore, credentials: Credentials, timings: Timings = TIMINGS) -> None:
        self._store = store
        self._credentials = credentials
        self._timings = timings
        self._reads = Reads(store)
        self._under_way: dict[str, _UnderWay] = {}
        self._distrusted_until: dict[str, float] = {}
        self._session: aiohttp.ClientSession | None = None
        self._bulk: BulkClient | None = None

    async def __aenter__(self) -> Self:
        self._session = session(
            self._credentials, connect_seconds=self._timings.connect_seconds, idle_seconds=self._timings.idle_seconds
        )
        if self._credentials.client_tls is not None:
            self._bulk = BulkClient(
                self._credentials,
                connect_seconds=self._timings.connect_seconds,
                idle_seconds=self._timings.idle_seconds,
            )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = [one.task for one in self._under_way.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._bulk is not None:
            await self._bulk.close()
        if self._session is not None:
            await self._session.close()

    async def fetch(self, ref: BlobRef) -> Path:
        """The blob's file in the store, its hash checked, also if it was here. A fetch ends when no caller waits for it, and can be resumed.

        Raises Unavailable or CorruptBlob, which name holders and reasons; DiskFull.
        """
        while True:
            if self._store.has(ref.sha256):
                try:
                    return await self._reads.path(ref.sha256)
                except (NotFound, CorruptBlob):
                    pass  # thrown away just now
            found = self._under_way.get(ref.sha256)
            if found is None or not found.given_up:
                break
            await asyncio.wait([found.task])
        if found is None:
            found = self._begin(ref)
        else:
            found.transfer.offer(ref.holders)
        found.waiting += 1
        try:
            return await asyncio.shield(found.task)
        finally:
            found.waiting -= 1
            if not found.waiting and not found.task.done():
                found.given_up = True
                found.task.cancel()

    async def push(self, source: bytes | memoryview | Path, base_urls: tuple[str, ...]) -> BlobRef:
        """Put bytes or a file on the first of a coordinator's addresses that takes it. Nothing is sent if the blob is there already.

        Raises Unavailable, which names addresses and reasons; TooLarge, DiskFull or InvalidRequest if it was refused.
        """
        ref = await asyncio.to_thread(self._describe, source)
        if not base_urls:
            raise Unavailable(f"a blob of {ref.size} bytes could not be sent: there is no address to send it to")
        reasons: dict[str, str] = {}
        for round_ in range(self._timings.failures_limit):
            if round_:
                await asyncio.sleep(self._timings.rest_seconds * 2 ** (round_ - 1))
            for base in base_urls:
                reason = await self._put(ref, source, base)
                if reason is None:
                    return BlobRef(sha256=ref.sha256, size=ref.size, holders=(base,))
                reasons[base] = reason
        shown = "; ".join(f"{base}: {reason}" for base, reason in reasons.items())
        raise Unavailable(f"a blob of {ref.size} bytes could not be sent: {shown}")

    async def send_inputs(self, data: bytes | memoryview, base: str, connect_seconds: float) -> BlobRef:
        """Send the inputs of a request to a node. Returns the name that the node gave them. Raises Unavailable."""
        if not is_address(base):
            raise Unavailable(f"{base[:80]!r} took no inputs: it {NO_ADDRESS}")
        try:
            async with asyncio.timeout(_INPUTS_SECONDS) as limit:
                async with self._http.post(
                    f"{base.rstrip('/')}/inputs",
                    data=_pieces(data, limit, _INPUTS_SECONDS),
                    headers={hdrs.CONTENT_LENGTH: str(len(data)), hdrs.CONTENT_TYPE: "application/octet-stream"},
                    timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_seconds),
                    allow_redirects=False,
                ) as response:
                    said = await response.content.read(4096)
            if response.status != 201:
                raise Unavailable(f"{base} took no inputs: {_told(said) or f'{response.status} {response.reason}'}")
            found = msgspec.json.decode(said, type=BlobRef)
        except aiohttp.ServerTimeoutError as error:  # a TimeoutError, too
            raise Unavailable(f"{base} took no inputs: no connection within {connect_seconds:g} s") from error
        except TimeoutError as error:
            raise Unavailable(f"{base} took no inputs: it was silent for {_INPUTS_SECONDS:g} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise Unavailable(f"{base} took no inputs: {explained(error, self._timings)}") from error
        if found.size != len(data):
            raise Unavailable(f"{base} took {found.size} bytes of {len(data)}")
        return BlobRef(sha256=found.sha256, size=found.size, holders=(base,))

    async def named(self, ref: BlobRef) -> BlobRef:
        """Ask the holder of inputs with a made-up name to make them a blob. Returns its reference. Raises Unavailable."""
        reasons: list[str] = []
        for base in ref.holders:
            if not is_address(base):
                reasons.append(f"{base[:80]}: {NO_ADDRESS}")
                continue
            try:
                async with asyncio.timeout(_INPUTS_SECONDS):
                    async with self._http.get(
                        f"{base.rstrip('/')}/inputs/{ref.sha256}",
                        timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._timings.connect_seconds),
                        allow_redirects=False,
                    ) as response:
                        said = await response.content.read(4096)
                if response.status == 200:
                    found = msgspec.json.decode(said, type=BlobRef)
                    if found.size == ref.size:
                        return BlobRef(sha256=found.sha256, size=found.size, holders=(base,))
                    reasons.append(f"{base}: has {found.size} bytes instead of {ref.size}")
                else:
                    reasons.append(f"{base}: {_told(said) or f'{response.status} {response.reason}'}")
            except TimeoutError as error:  # aiohttp has such errors of its own
                hung = not isinstance(error, aiohttp.ServerTimeoutError)
                silent = f"it was silent for {_INPUTS_SECONDS:g} s"
                reasons.append(f"{base}: {silent if hung else explained(error, self._timings)}")
            except (aiohttp.ClientError, OSError, ValueError) as error:
                reasons.append(f"{base}: {explained(error, self._timings)}")
        raise Unavailable(f"inputs of {ref.size} bytes could not be had from anyone: {'; '.join(reasons)}")

    @property
    def _http(self) -> aiohttp.ClientSession:
        assert self._session is not None, "a Downloader is used in its own `async with` block"
        return self._session

    def _begin(self, ref: BlobRef) -> _UnderWay:
        log.debug("fetch begun %s", fields(blob=ref.sha256[:12], size=ref.size, holders=len(ref.holders)))
        parts: Parts = (
            PlainParts(self._http, self._timings) if self._bulk is None else TlsParts(self._bulk, self._timings)
        )
        transfer = Transfer(
            ref, self._store, parts, self._timings, distrusted=self._is_distrusted, on_liar=self._on_liar
        )
        task = asyncio.create_task(transfer.run(), name=f"fetch {ref.sha256[:12]}")
        found = self._under_way[ref.sha256] = _UnderWay(transfer, task)
        task.add_done_callback(lambda _: self._under_way.pop(ref.sha256, None))
        return found

    def _is_distrusted(self, url: str) -> bool:
        return self._distrusted_until.get(url, 0.0) > time.monotonic()

    def _on_liar(self, url: str) -> None:
        log.warning("holder sent wrong bytes %s", fields(holder=url, distrusted_seconds=self._timings.distrust_seconds))
        now = time.monotonic()
        self._distrusted_until = {known: until for known, until in self._distrusted_until.items() if until > now}
        self._distrusted_until[url] = now + self._timings.distrust_seconds

    def _describe(self, source: bytes | memoryview | Path) -> BlobRef:
        if not isinstance(source, Path):
            return BlobRef(sha256=hashlib.sha256(source).hexdigest(), size=len(source))
        if source.parent == self._store.folder and self._store.has(source.name):
            return BlobRef(sha256=source.name, size=source.stat().st_size)
        try:
            sha256, size = hash_file(source)
        except OSError as error:
            raise InvalidRequest(f"{source} cannot be sent, since it cannot be read: {error.strerror}") from error
        return BlobRef(sha256=sha256, size=size)

    async def _put(self, ref: BlobRef, source: bytes | memoryview | Path, base: str) -> str | None:
        """None: the blob is there now; else why not. Raises if a retry cannot help."""
        if not is_address(base):
            return NO_ADDRESS
        url = f"{base.rstrip('/')}/blobs/{ref.sha256}"
        tls = self._credentials.coordinator_tls or self._credentials.client_tls or True
        try:
            async with self._http.head(url, ssl=tls, allow_redirects=False) as there:
                if there.status == 200:
                    return None
            async with asyncio.timeout(_ANSWER_SECONDS) as limit:
                async with self._http.put(
                    url,
                    ssl=tls,
                    data=_pieces(source, limit, _ANSWER_SECONDS),
                    headers={hdrs.CONTENT_LENGTH: str(ref.size)},
                    expect100=ref.size >= _EXPECT_BYTES,
                    timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._timings.connect_seconds),
                    allow_redirects=False,
                ) as response:
                    if response.status in (200, 201):
                        return None
                    reason = _told(await response.content.read(4096)) or f"{response.status} {response.reason}"
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            return explained(error, self._timings)
        if response.status == 413:
            raise TooLarge(f"{base} refused a blob of {ref.size} bytes: {reason}")
        if response.status == 401:
            raise NotAuthenticated(f"{base} takes no file from here: {reason}")
        if response.status == 403:
            told = reason.replace(f"PUT /blobs/{ref.sha256} needs", "that needs")
            raise NotAllowed(f"{base} takes no file from here: {told}")
        if response.status == 507:
            raise DiskFull(f"{base} has no room for a blob of {ref.size} bytes: {reason}")
        if response.status < 500 and response.status != 408:
            raise InvalidRequest(f"{base} refused a blob of {ref.size} bytes: {reason}")
        return reason


async def _pieces(
    source: bytes | memoryview | Path, limit: asyncio.Timeout, seconds: float
) -> AsyncIterator[bytes | memoryview]:
    """The pieces to send. The time limit starts again with each piece."""

    def go_on() -> None:
        with suppress(RuntimeError):  # refused before all was sent: the limit is not in use any more
            limit.reschedule(asyncio.get_running_loop().time() + seconds)

    if not isinstance(source, Path):
        whole = memoryview(source)
        for start in range(0, len(source), _SEND_BYTES):
            go_on()
            yield whole[start : start + _SEND_BYTES]
        return
    file = await asyncio.to_thread(source.open, "rb")
    try:
        while data := await asyncio.to_thread(file.read, _SEND_BYTES):
            go_on()
            yield data
    finally:
        file.close()


def _told(body: bytes) -> str:
    """The text of a refusal by our own server."""
    try:
        found = json.loads(body)
        return str(found["error"])
    except (ValueError, KeyError, TypeError):
        return ""
