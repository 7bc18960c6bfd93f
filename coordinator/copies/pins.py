"""Pins the blobs of registered models and data sets in the coordinator's store, as long as they are registered."""

from __future__ import annotations

from coordinator.registry import Registry, dataset_blobs
from potluck.blobs.store import BlobStore


class Keeping:
    """The pins for the present registry. Once made, it follows every change of the registry."""

    def __init__(self, registry: Registry, store: BlobStore) -> None:
        self._registry = registry
        self._store = store
        self._pinned: set[str] = set()
        self._follow()
        registry.on_change(self._follow)

    def names(self, sha256: str) -> bool:
        """Whether the registry names this blob: as a model, or as a part of a data set."""
        return sha256 in self._pinned

    def _follow(self) -> None:
        wanted = {info.model.sha256 for info in self._registry.models()}
        for listed in self._registry.datasets():
            name = listed.name
            wanted.update(
                ref.sha256 for ref in dataset_blobs(self._registry.manifest(name), self._registry.dataset(name))
            )
        for sha256 in wanted - self._pinned:
            self._store.pin(sha256)
            self._store.named(sha256)
        for sha256 in self._pinned - wanted:
            self._store.unpin(sha256)
            self._store.unnamed(sha256)
        self._pinned = wanted
