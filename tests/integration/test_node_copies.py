"""Copies of models on a real node process: fetched, kept while they are to be held, refused when there is no room."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from potluck.wire.births import NodeStatus
from potluck.wire.commands import HoldBlob, ReleaseBlob
from potluck.wire.reports import BlobsStored, HoldFailed
from potluck.wire.values import BlobRef
from support.node_lab import Lab, node_lab


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    async with node_lab(tmp_path) as lab:
        yield lab


async def stored(lab: Lab, blob: BlobRef) -> None:
    """Ask the node to hold the blob, and wait until it says that it does."""
    said = len(lab.all(BlobsStored))
    await lab.command(HoldBlob(epoch=1, blob=blob))
    await lab.heard(BlobsStored, lambda one: one.blobs == (blob.sha256,), after=said)


async def test_a_copy_is_held_until_it_is_released(lab: Lab) -> None:
    await lab.node(POTLUCK_BLOB_LIMIT_BYTES="1000")
    first, second, small = lab.blob(b"1" * 600), lab.blob(b"2" * 600), lab.blob(b"3" * 100)
    await stored(lab, first)
    await lab.command(HoldBlob(epoch=1, blob=second))
    failed = await lab.heard(HoldFailed)
    assert (failed.sha256, failed.error.code) == (second.sha256, "disk_full")
    await stored(lab, small)
    await stored(lab, first)  # it answers each time that it is asked
    (birth,) = lab.all(NodeStatus)
    assert await lab.fetch(BlobRef(sha256=first.sha256, size=600, holders=birth.http)) == b"1" * 600
    await lab.command(ReleaseBlob(epoch=1, sha256=first.sha256))
    await lab.command(ReleaseBlob(epoch=1, sha256=first.sha256))
    await stored(lab, second)
    await lab.command(HoldBlob(epoch=1, blob=first))
    failed = await lab.heard(HoldFailed, after=1)
    assert failed.sha256 == first.sha256


async def test_a_copy_that_nobody_has_is_given_up(lab: Lab) -> None:
    await lab.node()
    nowhere = BlobRef(sha256="0" * 64, size=10, holders=lab.urls)
    await lab.command(HoldBlob(epoch=1, blob=nowhere))
    failed = await lab.heard(HoldFailed, seconds=20)
    assert (failed.sha256, failed.error.code) == (nowhere.sha256, "unavailable")
