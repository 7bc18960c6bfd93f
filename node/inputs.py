"""Inputs of requests that are too large for a message: sent here by clients, or fetched from whoever has them, and gone with their batch.

They have a store of their own, so that nothing of them is left when this process was killed. What clients send is not hashed unless another node
has to fetch it.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from aiohttp import web

from potluck.blobs import server
from potluck.blobs.download import Downloader
from potluck.blobs.store import BlobStore, is_made_up
from potluck.blobs.transfer import Timings
from potluck.errors import PotluckError
from potluck.logs import fields
from potluck.surviving import surviving
from potluck.wire.messages import INPUT_BLOB_LIMIT_BYTES, BlobRef

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
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self._downloader)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def routes(self, refusal: Callable[[], PotluckError | None]) -> list[web.RouteDef]:
        """`/inputs`, for the node's HTTP server."""
        return server.inputs_routes(self.store, max_bytes=INPUT_BLOB_LIMIT_BYTES, refusal=refusal)

    async def run(self) -> None:
        """Sweep what was left, until cancelled."""
        while True:
            await asyncio.sleep(self._kept_seconds / 4)
            with surviving("sweep of inputs"):  # by what their disk does, for one
                await asyncio.to_thread(self._sweep)

    async def fetch(self, ref: BlobRef) -> Path:
        """Its file, for a batch that needs it until `done`. Raises Unavailable, CorruptBlob, DiskFull."""
        if is_made_up(ref.sha256) and not self.store.has(ref.sha256):
            ref = await self._downloader.named(ref)
        self.store.pin(ref.sha256)
        try:
            return await self._downloader.fetch(ref)
        except BaseException:
            self.store.unpin(ref.sha256)
            raise

    def done(self, files: Iterable[Path], *, answered: bool) -> None:
        """A batch is done with what was fetched for it. When it was answered, nobody needs that any more; else another node may."""
        for path in files:
            self.store.unpin(path.name)
            if answered:
                self.store.delete(path.name)  # gone so soon, it need not reach the disk

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
                log.info(
                    "inputs thrown away, which no batch came for %s", fields(blob=path.name[:12], size=stat.st_size)
                )
            elif not self.store.has(path.name):
                path.unlink(missing_ok=True)
