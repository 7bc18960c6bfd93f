"""Who may get which blob from the coordinator of a closed cluster, and put one there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.blob_rights import BlobRights
from coordinator.copies.pins import Keeping
from coordinator.journal import Journal
from coordinator.registry import Registry
from potluck.blobs.store import BlobStore
from potluck.errors import DiskFull
from potluck.wire.questions import JobEnded
from potluck.wire.values import BlobRef, Tensor

MEMBERS = {
    "node:n1": "node",
    "coordinator:c": "coordinator",
    "client:vic": "viewer",
    "client:ann": "user",
    "client:bob": "user",
    "client:chief": "operator",
}


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.journal = Journal(folder / "journal")
        self.registry = Registry(self.journal)
        self.store = BlobStore(folder / "blobs", 2**20, quota_bytes=1000)
        self.keeping = Keeping(self.registry, self.store)
        self.ended: list[JobEnded] = []

    def rights(self) -> BlobRights:
        return BlobRights(
            MEMBERS.get,
            named=self.keeping.names,
            results=lambda: self.ended,
            sent=self.store.sent,
        )

    def put(self, data: bytes, identity: str) -> str:
        """What the server does with an upload."""
        with self.store.receiving(identity) as coming:
            coming(len(data))
            ref = self.store.put_bytes(data)
            self.store.uploaded(ref.sha256, identity)
        return ref.sha256


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    yield made
    made.journal.close()


def who(rights: BlobRights, sha256: str) -> set[str]:
    return {one for one in (*MEMBERS, "client:gone", "") if rights.allowed(one, sha256)}


def result(job_id: str, **fields: Any) -> JobEnded:
    return JobEnded(job_id=job_id, kind="train", state="succeeded", created_at=0, started_at=0, ended_at=0, **fields)


def blob(name: str) -> BlobRef:
    return BlobRef(sha256=hashlib.sha256(name.encode()).hexdigest(), size=1)


DAEMONS = {"node:n1", "coordinator:c"}
COMPUTING = {"client:ann", "client:bob", "client:chief"}


def test_what_has_no_name_is_for_nodes_and_whoever_put_it_there(cluster: Cluster) -> None:
    rights = cluster.rights()
    internal = cluster.store.put_bytes(b"weights of a round").sha256
    assert who(rights, internal) == DAEMONS
    assert who(rights, "0" * 64) == DAEMONS, "whether it is there or not is the same to others"
    sent = cluster.put(b"a model", "client:ann")
    assert who(rights, sent) == DAEMONS | {"client:ann"}
    cluster.registry.add_model("m", cluster.store.put_bytes(b"a model"), now=1.0)
    assert who(rights, sent) == DAEMONS | COMPUTING
    assert who(rights, internal) == DAEMONS


def test_results_of_jobs_are_for_those_who_compute(cluster: Cluster) -> None:
    rights = cluster.rights()
    cluster.ended = [
        result("a", model=blob("model"), checkpoint=blob("checkpoint")),
        result("b", keys=blob("keys"), outputs=(Tensor(name="y", datatype="FP32", shape=(1,), data=blob("outputs")),)),
    ]
    for name in ("model", "checkpoint", "keys", "outputs"):
        assert who(rights, blob(name).sha256) == DAEMONS | COMPUTING
    assert who(rights, blob("other").sha256) == DAEMONS
    del cluster.ended[0]
    assert who(rights, blob("model").sha256) == DAEMONS, "the job is forgotten"
    assert who(rights, blob("keys").sha256) == DAEMONS | COMPUTING


def test_who_computes_may_put_blobs_within_the_quota(cluster: Cluster) -> None:
    rights = cluster.rights()
    assert {one for one in (*MEMBERS, "client:gone", "") if rights.may_put(one, 10**12)} == COMPUTING
    used = cluster.put(bytes(600), "client:ann")
    cluster.store.pin(used)  # by a job
    cluster.store.check_quota("client:ann", 400)
    with pytest.raises(DiskFull, match="600 bytes were sent from client:ann"):
        cluster.store.check_quota("client:ann", 401)
    cluster.store.check_quota("client:bob", 1000)
    cluster.registry.add_model("m", cluster.store.put_bytes(bytes(600)), now=1.0)
    cluster.store.check_quota("client:ann", 1000)  # what is registered counts no more
