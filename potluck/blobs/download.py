"""Pull a blob from every holder at once, chunk by chunk; push one to whoever may be written to."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp

from potluck.blobs.store import BlobStore
from potluck.errors import CorruptBlob, InvalidRequest, TooLarge, Unavailable
from potluck.messages import BlobRef

CHUNK_BYTES = 4 * 2**20
CONNECT_SECONDS = 3.0
CHUNK_SECONDS = 30.0


class Downloader:
    """Fetches into `store`; a context manager. Two fetches of one blob are one."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self._under_way: dict[str, asyncio.Task[Path]] = {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS, sock_read=CHUNK_SECONDS)
        self._session = aiohttp.ClientSession(timeout=timeout)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._under_way.values():
            task.cancel()
        await asyncio.gather(*self._under_way.values(), return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    async def fetch(self, ref: BlobRef) -> Path:
        """The blob's file in the store. Raises Unavailable or CorruptBlob, naming holders and reasons."""
        if self._store.has(ref.sha256):
            return self._store.path(ref.sha256)
        task = self._under_way.get(ref.sha256)
        if task is None:
            task = asyncio.create_task(self._fetch(ref), name=f"fetch {ref.sha256[:12]}")
            self._under_way[ref.sha256] = task
            task.add_done_callback(lambda _: self._under_way.pop(ref.sha256, None))
        return await asyncio.shield(task)

    async def push(self, source: bytes | Path, base_urls: tuple[str, ...]) -> BlobRef:
        """Put bytes or a file where it can be written to; nothing is sent when it is there already."""
        ref = await asyncio.to_thread(
            lambda: self._store.put_bytes(source) if isinstance(source, bytes) else self._store.put_file(source)
        )
        reasons = []
        for base in base_urls:
            url = f"{base}/blobs/{ref.sha256}"
            try:
                async with self._http.head(url) as there:
                    if there.status == 200:
                        return BlobRef(sha256=ref.sha256, size=ref.size, holders=(base,))
                with self._store.path(ref.sha256).open("rb") as file:
                    async with self._http.put(url, data=file) as response:
                        if response.status in (200, 201):
                            return BlobRef(sha256=ref.sha256, size=ref.size, holders=(base,))
                        text = await response.text()
                        if response.status == 413:
                            raise TooLarge(f"{base} refused a blob of {ref.size} bytes: {text}")
                        if response.status < 500:
                            raise InvalidRequest(f"{base} refused a blob of {ref.size} bytes: {text}")
                        reasons.append(f"{base}: {response.status} {text}")
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                reasons.append(f"{base}: {error or type(error).__name__}")
        raise Unavailable(f"a blob of {ref.size} bytes could not be sent: {'; '.join(reasons) or 'nowhere to send it'}")

    @property
    def _http(self) -> aiohttp.ClientSession:
        assert self._session is not None
        return self._session

    async def _fetch(self, ref: BlobRef) -> Path:
        reasons: dict[str, str] = {}
        holders = list(dict.fromkeys(ref.holders))
        if holders:
            try:
                return await self._fetch_from(ref, holders, reasons)
            except CorruptBlob as error:
                # Somebody lies: ask one after the other, until the bytes are right.
                for holder in holders:
                    if holder in reasons:
                        continue
                    try:
                        return await self._fetch_from(ref, [holder], reasons)
                    except CorruptBlob:
                        reasons[holder] = "sent other bytes"
                raise CorruptBlob(f"{error.message}; holders: {_listed(reasons)}") from error
        raise Unavailable(f"blob {ref.sha256[:12]} has no holder: whoever made it has not said where it is")

    async def _fetch_from(self, ref: BlobRef, holders: list[str], reasons: dict[str, str]) -> Path:
        with self._store.new_file() as file:
            os.truncate(file.path, ref.size)
            waiting = asyncio.Queue[int]()
            for start in range(0, ref.size, CHUNK_BYTES):
                waiting.put_nowait(start)
            left = waiting.qsize()
            done = asyncio.Event()
            if not left:
                done.set()

            async def pull(holder: str) -> None:
                nonlocal left
                while not done.is_set():
                    start = await waiting.get()
                    stop = min(start + CHUNK_BYTES, ref.size)
                    try:
                        await self._chunk(f"{holder}/blobs/{ref.sha256}", file.path, start, stop)
                    except (aiohttp.ClientError, TimeoutError, OSError, Unavailable) as error:
                        waiting.put_nowait(start)
                        reasons[holder] = str(error) or type(error).__name__
                        return
                    left -= 1
                    if not left:
                        done.set()

            pullers = [asyncio.create_task(pull(holder), name=f"pull {holder}") for holder in holders for _ in (0, 1)]
            finished = asyncio.create_task(done.wait(), name="all chunks")
            try:
                while not finished.done():
                    alive = [task for task in pullers if not task.done()]
                    if not alive:
                        break
                    await asyncio.wait([finished, *alive], return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (*pullers, finished):
                    task.cancel()
                await asyncio.gather(*pullers, finished, return_exceptions=True)
            if not done.is_set():
                raise Unavailable(f"blob {ref.sha256[:12]} could not be had: {_listed(reasons)}")
            await asyncio.to_thread(self._store.verify, file.path, ref)
            return self._store.path(ref.sha256)

    async def _chunk(self, url: str, target: Path, start: int, stop: int) -> None:
        async with self._http.get(url, headers={"Range": f"bytes={start}-{stop - 1}"}) as response:
            if response.status not in (200, 206):
                raise Unavailable(f"{response.status} {response.reason}")
            data = await response.read()
        if response.status == 200:
            data = data[start:stop]
        if len(data) != stop - start:
            raise Unavailable(f"sent {len(data)} bytes of {stop - start}")
        await asyncio.to_thread(_write_at, target, start, data)


def _write_at(path: Path, start: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(data)


def _listed(reasons: dict[str, str]) -> str:
    return "; ".join(f"{holder}: {reason}" for holder, reason in reasons.items()) or "no holder answered"
