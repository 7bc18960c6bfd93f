"""Blobs whose hash is checked before each read."""

from __future__ import annotations

import asyncio
from pathlib import Path

from potluck.blobs.store import BlobStore


class Reads:
    """Reads on one event loop: the hash of a blob that many ask for at once is made once."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self._under_way: dict[str, asyncio.Task[Path]] = {}

    async def path(self, sha256: str) -> Path:
        """The file of a blob that is whole. Raises NotFound; CorruptBlob for one that was changed on the disk, which is gone now."""
        if (path := self._store.unchanged(sha256)) is not None:
            return path
        task = self._under_way.get(sha256)
        if task is None:
            task = self._under_way[sha256] = asyncio.create_task(asyncio.to_thread(self._store.checked, sha256))
            task.add_done_callback(lambda task: self._done(sha256, task))
        return await asyncio.shield(task)

    def _done(self, sha256: str, task: asyncio.Task[Path]) -> None:
        del self._under_way[sha256]
        if not task.cancelled():
            task.exception()  # those who wait get it; there may be none left
