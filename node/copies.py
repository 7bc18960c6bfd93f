"""Copies of registered models that this node holds for others, pinned, as the coordinator commands."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from potluck.blobs.download import Downloader
from potluck.blobs.store import BlobStore
from potluck.errors import Overloaded, Unavailable
from potluck.logs import fields
from potluck.surviving import as_defect
from potluck.wire.commands import HoldBlob, ReleaseBlob
from potluck.wire.failures import error_info
from potluck.wire.reports import BlobsStored, HoldFailed
from potluck.wire.values import BlobRef, Message

log = logging.getLogger(__name__)

COPIES_LIMIT = 10_000
"""Most blobs held or being fetched: more would be somebody's mistake."""


class HeldCopies:
    """Blobs by hash. `run` must be running. Results go to `say`."""

    def __init__(self, store: BlobStore, downloader: Downloader, say: Callable[[Message], None]) -> None:
        self._store = store
        self._downloader = downloader
        self._say = say
        self._held: set[str] = set()
        self._fetching: dict[str, asyncio.Task[None]] = {}
        self._one_at_a_time = asyncio.Semaphore(1)
        """Copies are fetched one at a time: shards and replicas wait for their blobs, but nobody waits for these."""
        self._tasks: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            await asyncio.get_running_loop().create_future()

    def hold(self, command: HoldBlob) -> None:
        """Fetch the blob if needed, and pin it; reports again if it is here already."""
        sha256 = command.blob.sha256
        if sha256 in self._fetching:
            return
        if sha256 in self._held and self._store.has(sha256):
            self._say(BlobsStored(blobs=(sha256,)))
        elif len(self._held) + len(self._fetching) >= COPIES_LIMIT:
            error = Overloaded(f"this node holds {COPIES_LIMIT} blobs already")
            self._say(HoldFailed(sha256=sha256, error=error_info(error)))
        else:
            assert self._tasks is not None
            if sha256 not in self._held:
                self._held.add(sha256)
                self._store.pin(sha256)
            task = self._tasks.create_task(self._fetch(command.blob), name=f"hold {sha256[:12]}")
            self._fetching[sha256] = task
            task.add_done_callback(lambda _: self._fetching.pop(sha256, None))

    def release(self, command: ReleaseBlob) -> None:
        """Unpin the blob: it is kept no longer than any other."""
        if (fetching := self._fetching.get(command.sha256)) is not None:
            fetching.cancel()
        self._let_go(command.sha256)

    async def _fetch(self, blob: BlobRef) -> None:
        try:
            async with self._one_at_a_time:
                try:
                    await self._downloader.fetch(blob)
                except OSError as error:
                    raise Unavailable(f"the blob cannot be kept on this node: {error}") from error
        except Exception as error:  # noqa: BLE001 - the coordinator hears of a defect, too
            failure = as_defect(error, "holding of a copy")
            self._let_go(blob.sha256)
            log.info("copy not held %s", fields(blob=blob.sha256[:12], reason=failure.message))
            self._say(HoldFailed(sha256=blob.sha256, error=error_info(failure)))
            return
        log.info("copy held %s", fields(blob=blob.sha256[:12], size=blob.size))
        self._say(BlobsStored(blobs=(blob.sha256,)))

    def _let_go(self, sha256: str) -> None:
        if sha256 in self._held:
            self._held.remove(sha256)
            self._store.unpin(sha256)
