"""Reads data sets as another program would: only from the shards and the manifest."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load

from potluck.blobs.store import BlobStore
from potluck.wire import codec
from potluck.wire.values import Dataset


def new_store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "store", 1 << 30)


def keys_of(dataset: Dataset, store: BlobStore) -> list[Any]:
    assert dataset.keys is not None
    found = json.loads(store.read(dataset.keys.sha256))
    assert isinstance(found, list)
    return found


def images_of(dataset: Dataset, store: BlobStore) -> Iterator[tuple[str, bytes, int]]:
    """(suffix, file, class index or -1) of each item."""
    names: set[str] = set()
    for shard in dataset.shards:
        items: dict[str, dict[str, bytes]] = {}
        with tarfile.open(fileobj=io.BytesIO(store.read(shard.blob.sha256))) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
                key, _, suffix = member.name.rpartition(".")
                file = tar.extractfile(member)
                assert file is not None
                items.setdefault(key, {})[suffix] = file.read()
        assert len(items) == shard.count
        assert not names & set(items)
        names |= set(items)
        for files in items.values():
            label = int(files.pop("cls", b"-1"))
            ((suffix, data),) = files.items()
            yield suffix, data, label


def arrays_of(dataset: Dataset, store: BlobStore) -> dict[str, np.ndarray[Any, Any]]:
    parts = [load(store.read(shard.blob.sha256)) for shard in dataset.shards]
    for part, shard in zip(parts, dataset.shards, strict=True):
        assert {len(array) for array in part.values()} == {shard.count}
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def check_manifest(dataset: Dataset, store: BlobStore) -> None:
    """Check that the manifest survives encoding, and that its counts are right."""
    assert codec.unpack(codec.pack(dataset), Dataset) == dataset
    assert dataset.count == sum(shard.count for shard in dataset.shards)
    assert len(keys_of(dataset, store)) == dataset.count
    assert not dataset.class_counts or sum(dataset.class_counts) == dataset.count
