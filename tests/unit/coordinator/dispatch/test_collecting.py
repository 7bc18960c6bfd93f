"""Checkpoints of groups: made by the step from the one before if it leads there, else fetched."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from coordinator.dispatch.collecting import Collector
from potluck.blobs.store import BlobStore, hash_file
from potluck.errors import EngineFailed
from potluck.weights import files as weights
from potluck.weights.updates import write_update
from potluck.wire.tasks import SyncResult, TrainResult
from potluck.wire.values import BlobRef, Step
from support.tampering import tamper


@dataclass
class Files:
    """A node's blobs, for a downloader; `fetched` names the blobs that had to be fetched."""

    folder: Path
    store: BlobStore
    fetched: list[str] = field(default_factory=list)

    def add(self, path: Path) -> BlobRef:
        sha256, size = hash_file(path)
        (self.folder / sha256).write_bytes(path.read_bytes())
        return BlobRef(sha256=sha256, size=size)

    async def fetch(self, ref: BlobRef) -> Path:
        if not self.store.has(ref.sha256):
            self.fetched.append(ref.sha256)
            self.store.put_bytes((self.folder / ref.sha256).read_bytes())
        return self.store.path(ref.sha256)


def round_of(files: Files, folder: Path) -> SyncResult:
    """A checkpoint with a frozen body and a trained head, and the step to it from the one before."""
    body, head = np.ones(50_000, np.float32), np.zeros(10, np.float32)
    before, after, update, state = (folder / name for name in ("before", "after", "update", "state"))
    weights.save(before, [("s00000", body), ("w00001", head)])
    weights.save(after, [("s00000", body), ("w00001", head + 0.1)])
    weights.save(state, [("o00000", head)])
    write_update(update, before, [body, head + np.float32(0.1)], "none", ["value", "value"])
    step = Step(base=files.add(before), update=files.add(update))
    return SyncResult(samples=1, steps=1, weights=files.add(after), optimizer=files.add(state), step=step)


@pytest.mark.parametrize("known", [True, False])
def test_what_is_frozen_is_not_fetched_with_each_checkpoint(tmp_path: Path, known: bool) -> None:
    (tmp_path / "node").mkdir()
    store = BlobStore(tmp_path / "store", 2**30)
    files = Files(tmp_path / "node", store)
    result = round_of(files, tmp_path)
    assert result.weights is not None
    assert result.optimizer is not None
    assert result.step is not None
    if known:
        store.put_bytes((tmp_path / "before").read_bytes())
    found = asyncio.run(Collector(store, files).collect(result))  # type: ignore[arg-type]
    assert isinstance(found, SyncResult)
    assert found.step is None
    assert found.weights == BlobRef(sha256=result.weights.sha256, size=result.weights.size)
    assert store.path(result.weights.sha256).read_bytes() == (tmp_path / "after").read_bytes()
    by_step = [result.step.update.sha256, result.optimizer.sha256]
    assert files.fetched == (by_step if known else [result.weights.sha256, result.optimizer.sha256])
    assert not store.has(result.step.update.sha256)


def test_a_checkpoint_of_ours_that_was_changed_is_fetched_whole(tmp_path: Path) -> None:
    (tmp_path / "node").mkdir()
    store = BlobStore(tmp_path / "store", 2**30)
    files = Files(tmp_path / "node", store)
    result = round_of(files, tmp_path)
    assert result.weights is not None
    assert result.step is not None
    store.put_bytes((tmp_path / "before").read_bytes())
    tamper(store.folder / result.step.base.sha256)
    asyncio.run(Collector(store, files).collect(result))  # type: ignore[arg-type]
    assert not store.has(result.step.base.sha256)
    assert result.weights.sha256 in files.fetched
    assert store.read(result.weights.sha256) == (tmp_path / "after").read_bytes()


def test_a_step_that_leads_elsewhere_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "node").mkdir()
    store = BlobStore(tmp_path / "store", 2**30)
    files = Files(tmp_path / "node", store)
    result = round_of(files, tmp_path)
    assert result.weights is not None
    weights.save(tmp_path / "before", [("s00000", np.zeros(50_000, np.float32)), ("w00001", np.zeros(10, np.float32))])
    store.put_bytes((tmp_path / "before").read_bytes())
    assert result.step is not None
    other = Step(base=files.add(tmp_path / "before"), update=result.step.update)
    collector = Collector(store, files)  # type: ignore[arg-type]
    asyncio.run(
        collector.collect(
            SyncResult(samples=1, steps=1, weights=result.weights, optimizer=result.optimizer, step=other)
        )
    )
    assert result.weights.sha256 in files.fetched
    broken = Step(base=other.base, update=result.optimizer or result.weights)
    store.delete(result.weights.sha256)
    with pytest.raises(EngineFailed, match="checkpoint cannot be used"):
        asyncio.run(
            collector.collect(
                SyncResult(samples=1, steps=1, weights=result.weights, optimizer=result.optimizer, step=broken)
            )
        )


def test_what_is_larger_than_the_store_is_seen_by_the_sizes_it_names(tmp_path: Path) -> None:
    collector = Collector(BlobStore(tmp_path, 1000), None)  # type: ignore[arg-type]
    for size, large in ((500, 0), (501, 1002)):
        ref = BlobRef(sha256="0" * 64, size=size)
        part = TrainResult(base=ref, update=ref, samples=1, steps=1, seconds=1.0, metrics={})
        assert collector.too_large(part) == large
