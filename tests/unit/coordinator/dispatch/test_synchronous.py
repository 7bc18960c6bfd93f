"""Synchronous training is refused where nothing protects it, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.dispatch.jobstore import JobStore
from coordinator.journal import Journal
from coordinator.registry import Registry
from potluck.blobs.store import BlobStore
from potluck.errors import InvalidRequest, NotFound
from potluck.wire.jobs import Train
from potluck.wire.values import BlobRef, Dataset


def no_data(name: str) -> Dataset:
    raise NotFound(name)


@pytest.mark.parametrize(
    ("strategy", "synchronous", "error"),
    [("sync", False, "is refused in a closed cluster"), ("sync", True, "0000000"), ("auto", False, "0000000")],
)
def test_a_closed_cluster_refuses_it(tmp_path: Path, strategy: str, synchronous: bool, error: str) -> None:
    journal = Journal(Path(":memory:"))
    jobs = JobStore(journal, Registry(journal), BlobStore(tmp_path, 2**20), tuple, no_data, synchronous=synchronous)
    spec = Train(
        model=BlobRef(sha256="0" * 64, size=1), model_name="m.keras", dataset="photos", register="m", strategy=strategy  # type: ignore[arg-type]
    )  # fmt: skip
    with pytest.raises((InvalidRequest, NotFound), match=error):
        jobs.resolve(spec, "", "j", 1.0)
    journal.close()
