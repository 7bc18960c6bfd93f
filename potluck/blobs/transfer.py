"""One download: chunks come from all holders at once. Holders that are dead, slow, or send wrong bytes are given up."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from potluck.blobs.partial import Partial
from potluck.blobs.parts import HolderFailed, Parts, Timings
from potluck.blobs.store import BlobStore, no_room
from potluck.blobs.threads import unbroken
from potluck.errors import CorruptBlob, Unavailable
from potluck.logs import fields
from potluck.wire.addresses import NO_ADDRESS, is_address
from potluck.wire.values import BlobRef

log = logging.getLogger(__name__)

CHUNK_BYTES = 4 * 2**20
REQUESTS_PER_HOLDER = 2
REQUESTS_LIMIT = 6
_TICK_SECONDS = 0.25


@dataclass(eq=False)
class Holder:
    url: str
    trusted: bool = True
    active: int = 0
    failures: int = 0
    rests_until: float = 0.0
    bytes_per_second: float = float("inf")
    """An unknown holder counts as fast, so that each one is tried."""
    gone: str = ""
    """Why it is not asked any more."""
    lied: bool = False


@dataclass(eq=False)
class _Request:
    holder: Holder
    chunk: int
    began: float = field(default_factory=time.monotonic)


class Transfer:
    """Fetches `ref` into `store`: run it once. `offer` names more holders at any time."""

    def __init__(
        self,
        ref: BlobRef,
        store: BlobStore,
        parts: Parts,
        timings: Timings,
        *,
        distrusted: Callable[[str], bool],
        on_liar: Callable[[str], None],
    ) -> None:
        self._ref = ref
        self._store = store
        self._parts = parts
        self._timings = timings
        self._distrusted = distrusted
        self._on_liar = on_liar
        self._holders: dict[str, Holder] = {}
        self._running: dict[asyncio.Task[bytearray], _Request] = {}
        self._senders: set[Holder] = set()
        """Holders whose chunks are in the file."""
        self._one_by_one = False
        """Whether a holder sent wrong bytes and it is not known which: then all chunks come from one holder at a time."""
        self._sole: Holder | None = None
        self._chunk_seconds = 0.0
        """About how long a chunk takes."""
        self.offer(ref.holders)

    def offer(self, urls: Iterable[str]) -> None:
        """Add holders that are not known yet."""
        new = [url for url in dict.fromkeys(url.rstrip("/") for url in urls) if url not in self._holders]
        random.shuffle(new)  # so that not all nodes begin with the same holder
        for url in new:
            gone = "" if is_address(url) else NO_ADDRESS
            self._holders[url] = Holder(url, trusted=not self._distrusted(url), gone=gone)

    async def run(self) -> Path:
        """The blob's file in the store. Raises Unavailable or CorruptBlob, which name holders and reasons; DiskFull."""
        with self._store.partial(self._ref, CHUNK_BYTES) as partial:
            while True:
                await self._gather(partial)
                try:
                    await unbroken(self._store.verify, partial.path, self._ref)
                except CorruptBlob as error:
                    if not self._ref.size:  # no holder sent bytes: the reference was wrong
                        partial.discard()
                        raise CorruptBlob(f"no blob of 0 bytes has the hash {self._ref.sha256}") from error
                    self._blame(partial)
                    continue
                partial.discard()
                for holder in self._holders.values():
                    if holder.lied:
                        self._on_liar(holder.url)
                return self._store.path(self._ref.sha256)

    def _blame(self, partial: Partial) -> None:
        """The whole file has a wrong hash: find the holder that caused it."""
        if not partial.resumed:
            if len(self._senders) == 1:
                (liar,) = self._senders
                liar.lied = True
                liar.gone = "sent other bytes"
            else:
                self._one_by_one = True
        self._begin_again(partial)

    def _begin_again(self, partial: Partial) -> None:
        partial.clear()
        self._senders.clear()

    async def _gather(self, partial: Partial) -> None:
        """Fetch until no chunk is missing. Raises Unavailable or CorruptBlob if no holder is left to ask."""
        try:
            while partial.missing:
                usable = self._usable(partial)
                if not usable and not self._running:
                    raise self._failure()
                while (request := self._next(partial, usable)) is not None:
                    self._start(request, partial)
                if not self._running:  # all holders rest after a failure
                    await asyncio.sleep(_TICK_SECONDS / 5)
                    continue
                done, _ = await asyncio.wait(self._running, timeout=_TICK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if task in self._running:
                        await self._finished(task, partial)
        finally:
            await self._stop(list(self._running))

    def _usable(self, partial: Partial) -> list[Holder]:
        left = [holder for holder in self._holders.values() if not holder.gone]
        left = [holder for holder in left if holder.trusted] or left
        if not self._one_by_one or not left:
            return left
        if self._sole is None or self._sole.gone:
            self._sole = left[0]
            self._begin_again(partial)
        return [self._sole]

    def _next(self, partial: Partial, usable: list[Holder]) -> _Request | None:
        """The next request: a chunk that was not asked for yet; at the end, a slow chunk, from another holder."""
        if len(self._running) >= REQUESTS_LIMIT:
            return None
        now = time.monotonic()
        free = [holder for holder in usable if holder.active < REQUESTS_PER_HOLDER and holder.rests_until <= now]
        if not free:
            return None
        asked: dict[int, list[_Request]] = {}
        for request in self._running.values():
            asked.setdefault(request.chunk, []).append(request)
        chunk = min((chunk for chunk in partial.missing if chunk not in asked), default=None)
        if chunk is not None:
            return _Request(min(free, key=lambda holder: (holder.active, -holder.bytes_per_second)), chunk)
        patience = max(self._timings.hedge_seconds, 2 * self._chunk_seconds)
        for chunk, requests in asked.items():
            others = [holder for holder in free if holder is not requests[0].holder]
            if len(requests) == 1 and others and now - requests[0].began > patience:
                return _Request(max(others, key=lambda holder: holder.bytes_per_second), chunk)
        return None

    def _start(self, request: _Request, partial: Partial) -> None:
        holder = request.holder
        holder.active += 1
        task = asyncio.create_task(
            self._parts.get(holder.url, self._ref, *partial.span(request.chunk)),
            name=f"chunk {request.chunk} of {holder.url}",
        )
        self._running[task] = request

    async def _finished(self, task: asyncio.Task[bytearray], partial: Partial) -> None:
        request = self._running.pop(task)
        holder = request.holder
        holder.active -= 1
        try:
            data = task.result()
        except HolderFailed as error:
            self._failed(holder, error)
            return
        if holder.gone or request.chunk not in partial.missing or (self._one_by_one and holder is not self._sole):
            return
        seconds = max(time.monotonic() - request.began, 1e-6)
        holder.bytes_per_second = len(data) / seconds
        holder.failures = 0
        self._chunk_seconds = seconds if not self._chunk_seconds else 0.7 * self._chunk_seconds + 0.3 * seconds
        self._senders.add(holder)
        with no_room():
            await unbroken(partial.write, request.chunk, data)
        await self._stop([task for task, other in self._running.items() if other.chunk == request.chunk])

    def _failed(self, holder: Holder, error: HolderFailed) -> None:
        holder.failures += 1
        holder.rests_until = time.monotonic() + self._timings.rest_seconds * 2 ** (holder.failures - 1)
        if not holder.gone and (error.final or holder.failures >= self._timings.failures_limit):
            holder.gone = error.message
            log.info("holder given up %s", fields(blob=self._ref.sha256[:12], holder=holder.url, reason=error.message))

    async def _stop(self, tasks: list[asyncio.Task[bytearray]]) -> None:
        for task in tasks:
            self._running.pop(task).holder.active -= 1
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _failure(self) -> Unavailable | CorruptBlob:
        name = f"blob {self._ref.sha256[:12]} ({self._ref.size} bytes)"
        if not self._holders:
            return Unavailable(f"{name} has no holder: whoever made it has not said where it is")
        reasons = "; ".join(f"{holder.url}: {holder.gone}" for holder in self._holders.values())
        if any(holder.lied for holder in self._holders.values()):
            return CorruptBlob(f"{name} could not be had, since the bytes that came were others: {reasons}")
        return Unavailable(f"{name} could not be had from anyone: {reasons}")
