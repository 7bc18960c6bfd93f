"""Tensors that do not fit into a message: lent to nodes as blobs of the coordinator's store, or fetched from nodes' stores."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from msgspec.structs import replace

from coordinator.serving.inputs import INPUT_LIMIT_BYTES, size_bytes
from potluck.blobs.download import Downloader
from potluck.blobs.store import BlobStore
from potluck.errors import TooLarge, Unavailable
from potluck.wire.tensors import packed, unpacked
from potluck.wire.values import BlobRef, Tensor


class Shelf:
    """`urls` are the addresses of the store for nodes. Tensors of more than `limit_bytes` are not fetched."""

    def __init__(
        self, store: BlobStore, downloader: Downloader, urls: Callable[[], tuple[str, ...]], limit_bytes: int
    ) -> None:
        self._store = store
        self._downloader = downloader
        self._urls = urls
        self._limit_bytes = limit_bytes
        self._lent: Counter[str] = Counter()
        self._others: set[str] = set()
        """Lent blobs that were in the store before, for another reason."""

    @asynccontextmanager
    async def lent(self, tensors: tuple[Tensor, ...]) -> AsyncIterator[tuple[Tensor, ...]]:
        """The tensors, with the largest as blobs so that the rest fits into a message. The blobs are removed after the block.

        Raises Unavailable if they cannot be stored, DiskFull.
        """
        sizes = {tensor.name: size_bytes(tensor) for tensor in tensors}
        left = sum(sizes.values())
        taken: list[str] = []
        found = list(tensors)
        try:
            for index in sorted(range(len(found)), key=lambda index: -sizes[found[index].name]):
                if left <= INPUT_LIMIT_BYTES:
                    break
                lent = await self._lend(found[index], taken)
                left += size_bytes(lent) - sizes[lent.name]
                found[index] = lent
            yield tuple(found)
        finally:
            for sha256 in taken:
                self._give_back(sha256)

    async def fetched(self, tensor: Tensor) -> Tensor:
        """The tensor with its data; no copy is kept in the store. Raises TooLarge, Unavailable, CorruptBlob, DiskFull."""
        ref = tensor.data
        if not isinstance(ref, BlobRef):
            return tensor
        if ref.size > self._limit_bytes:
            raise TooLarge(
                f"output '{tensor.name}' has {ref.size} bytes, but an answer may have at most {self._limit_bytes}: send fewer rows at once"
            )
        self._take(ref.sha256)
        try:
            path = await self._downloader.fetch(ref)
            data = await asyncio.to_thread(path.read_bytes)
            return replace(tensor, data=unpacked(tensor.name, tensor.datatype, data))
        except OSError as error:
            raise Unavailable(f"output '{tensor.name}' cannot be read here: {error}") from error
        finally:
            self._give_back(ref.sha256)

    async def _lend(self, tensor: Tensor, taken: list[str]) -> Tensor:
        data = packed(tensor)
        sha256 = await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
        self._take(sha256)
        taken.append(sha256)
        try:
            ref = await asyncio.to_thread(self._store.put_bytes, data)
        except OSError as error:
            raise Unavailable(f"input '{tensor.name}' cannot be kept here: {error}") from error
        return replace(tensor, data=replace(ref, holders=self._urls()))

    def _take(self, sha256: str) -> None:
        if not self._lent[sha256] and self._store.has(sha256):
            self._others.add(sha256)
        self._lent[sha256] += 1
        self._store.pin(sha256)

    def _give_back(self, sha256: str) -> None:
        self._store.unpin(sha256)
        self._lent[sha256] -= 1
        if self._lent[sha256] > 0:
            return
        del self._lent[sha256]
        if sha256 in self._others:
            self._others.discard(sha256)
        else:
            self._store.delete(sha256)
