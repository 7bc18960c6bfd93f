"""Inputs of requests that are too large for a message: sent here by clients, or fetched from whoever has them, and gone with their batch.

They have a store of their own, so that nothing of them is left when this process was killed.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from aiohttp import web

from potluck.blobs import server
from potluck.blobs.download import Downloader
from potluck.blobs.store import BlobStore
from potluck.blobs.transfer import Timings
from potluck.errors import PotluckError
from potluck.logs import fields
from potluck.messages import INPUT_BLOB_LIMIT_BYTES, BlobRef

log = logging.getLogger(__name__)

KEPT_SECONDS = 60.0
"""What no batch has used for so long is thrown away: its request was answered elsewhere, or never came."""
TIMINGS = Timings(connect_seconds=1.0, failures_limit=2)
"""A request waits for its inputs: whoever has them is given up sooner than one who has a model."""
STORE_LIMIT_BYTES = 2**30
"""Of all inputs together. Beyond that the least used of those that are in no batch make room."""


class Inputs:
    """An async context manager. `run` must be under way."""

    def __init__(
        self, folder: Path, *, limit_bytes: int = STORE_LIMIT_BYTES, kept_seconds: float = KEPT_SECONDS
    ) -> None:
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
        self.store = BlobStore(folder, limit_bytes)
        self._downloader = Downloader(self.store, TIMINGS)
        self._kept_seconds = kept_seconds
        self._expected: Counter[str] = Counter()
        """Batches that are still to come for what was sent here: the same bytes may be sent by two clients."""
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self._downloader)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def route(self, refusal: Callable[[], PotluckError | None]) -> web.RouteDef:
        """`POST /inputs`, for the node's HTTP server."""
        return server.inputs_route(
            self.store, max_bytes=INPUT_BLOB_LIMIT_BYTES, refusal=refusal, on_taken=self._on_taken
        )

    async def run(self) -> None:
        """Sweep what was left, until cancelled."""
        while True:
            await asyncio.sleep(self._kept_seconds / 4)
            await asyncio.to_thread(self._sweep)

    def pin(self, sha256: str) -> None:
        """A batch needs it from now on, until `done`."""
        self.store.pin(sha256)

    async def fetch(self, ref: BlobRef) -> Path:
        """Its file, for a batch that has pinned it. Raises Unavailable, CorruptBlob, DiskFull."""
        return await self._downloader.fetch(ref)

    def done(self, used: Iterable[str], *, answered: bool) -> None:
        """A batch is done with what it pinned. When it was answered, nobody needs that any more; else another node may fetch it."""
        for sha256 in used:
            self.store.unpin(sha256)
            if not answered:
                continue
            self._expected[sha256] -= 1
            if self._expected[sha256] <= 0:
                del self._expected[sha256]
                self.store.delete(sha256)  # gone so soon, it need not reach the disk

    def _on_taken(self, ref: BlobRef) -> None:
        self._expected[ref.sha256] += 1

    def _sweep(self) -> None:
        """Also what an upload or a download that broke off has left."""
        used_after = time.time() - self._kept_seconds
        for path in self.store.folder.iterdir():
            try:
                stat = path.stat()
            except FileNotFoundError:  # its batch is done
                continue
            if max(stat.st_atime, stat.st_mtime) > used_after:
                continue
            if self.store.delete(path.name):
                self._expected.pop(path.name, None)
                log.info(
                    "inputs thrown away, which no batch came for %s", fields(blob=path.name[:12], size=stat.st_size)
                )
            elif not self.store.has(path.name):
                path.unlink(missing_ok=True)
