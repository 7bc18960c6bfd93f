"""Inputs of requests that are too large for a message: sent here by clients or fetched from their holders, and deleted with their batch.

They have their own store, so that nothing of them stays when this process is killed. Inputs from clients are only hashed when another
node has to fetch them.
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
from potluck.blobs.parts import Timings
from potluck.blobs.rights import Rights
from potluck.blobs.store import BlobStore, is_made_up
from potluck.credentials import Credentials
from potluck.errors import CorruptBlob, InputsLost, PotluckError, Unavailable
from potluck.logs import fields
from potluck.surviving import as_defect, surviving
from potluck.wire.values import INPUT_BLOB_LIMIT_BYTES, BlobRef

log = logging.getLogger(__name__)

KEPT_SECONDS = 60.0
"""Inputs that no batch used for this long are deleted: the request was answered elsewhere, or never came."""
TIMINGS = Timings(connect_seconds=1.0, idle_seconds=2.0, failures_limit=2)
"""A request waits for its inputs, so a slow holder is given up sooner than for a model. A holder that hangs costs its batch 5 s, or 9 s if it
hung between two answers: the coordinator takes a replica for silent after 10 s."""
FETCHES_AT_ONCE = 8
"""Of one batch: so a batch that waits for its inputs holds up no other."""
STORE_LIMIT_BYTES = 2**30
"""Limit of all inputs together. Beyond it, the least used inputs that no batch needs are deleted."""


class Inputs:
    """The store of inputs; an async context manager. `run` must be running."""

    def __init__(
        self,
        folder: Path,
        credentials: Credentials,
        *,
        limit_bytes: int = STORE_LIMIT_BYTES,
        kept_seconds: float = KEPT_SECONDS,
    ) -> None:
        shutil.rmtree(folder, ignore_errors=True)  # left by a process that was killed
        self.store = BlobStore(folder, limit_bytes, used_seconds=kept_seconds / 4)
        self._downloader = Downloader(self.store, credentials, TIMINGS)
        self._kept_seconds = kept_seconds
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self._downloader)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def routes(self, refusal: Callable[[], PotluckError | None], rights: Rights) -> list[web.RouteDef]:
        """`/inputs`, for the node's HTTP server."""
        return server.inputs_routes(self.store, max_bytes=INPUT_BLOB_LIMIT_BYTES, refusal=refusal, rights=rights)

    async def run(self) -> None:
        """Delete old inputs, until cancelled."""
        while True:
            await asyncio.sleep(self._kept_seconds / 4)
            with surviving("sweep of inputs"):  # its disk may fail, for example
                await asyncio.to_thread(self._sweep)

    async def fetch(self, ref: BlobRef) -> Path:
        """The file of an input; a batch may use it until `done`. Raises Unavailable, CorruptBlob, DiskFull."""
        if is_made_up(ref.sha256) and not self.store.has(ref.sha256):
            ref = await self._downloader.named(ref)
        self.store.pin(ref.sha256)
        try:
            return await self._downloader.fetch(ref)
        except BaseException:
            self.store.unpin(ref.sha256)
            raise

    async def fetch_all(self, refs: Iterable[BlobRef]) -> dict[str, Path | PotluckError]:
        """Fetch the inputs of a batch: by name, the file of each, or why it is not here. If cancelled, the batch needs none of them."""
        places = asyncio.Semaphore(FETCHES_AT_ONCE)

        async def one(ref: BlobRef) -> Path | PotluckError:
            async with places:
                try:
                    return await self.fetch(ref)
                except (Unavailable, CorruptBlob) as error:
                    return InputsLost(error.message)
                except OSError as error:
                    return Unavailable(f"inputs of {ref.size} bytes cannot be kept on this node: {error}")
                except Exception as error:  # noqa: BLE001 - a defect that one input meets is told to its request
                    return as_defect(error, "fetching of inputs")

        fetches = {ref.sha256: asyncio.create_task(one(ref), name=f"input {ref.sha256[:12]}") for ref in refs}
        try:
            if fetches:
                await asyncio.wait(fetches.values())
        except asyncio.CancelledError:
            for fetch in fetches.values():
                fetch.cancel()
            found = await asyncio.gather(*fetches.values(), return_exceptions=True)
            self.done([path for path in found if isinstance(path, Path)], answered=True)
            raise
        return {name: fetch.result() for name, fetch in fetches.items()}

    def done(self, files: Iterable[Path], *, answered: bool) -> None:
        """A batch has used these inputs. If it was answered, they are deleted; if not, another node may need them."""
        for path in files:
            self.store.unpin(path.name)
            if answered:
                self.store.delete(path.name)  # deleted so soon, it need not reach the disk

    def _sweep(self) -> None:
        """Delete old inputs, and the remains of broken uploads and downloads."""
        used_after = time.time() - self._kept_seconds
        for path in self.store.folder.iterdir():
            try:
                stat = path.stat()
            except FileNotFoundError:  # its batch is done
                continue
            if max(stat.st_atime, stat.st_mtime) > used_after:
                continue
            if self.store.delete(path.name):
                log.info("inputs deleted: no batch used them %s", fields(blob=path.name[:12], size=stat.st_size))
            elif not self.store.has(path.name):
                path.unlink(missing_ok=True)
