"""Deleting: refused, with the use named, while something uses it; otherwise its blobs go too, unless something refers to them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from coordinator.copies.pins import Keeping
from coordinator.dispatch.deletion import Deletion
from coordinator.dispatch.jobstore import JobStore
from coordinator.dispatch.packed import KEPT_SECONDS, Packed
from coordinator.journal import Journal
from coordinator.plans.events import JobFinished
from coordinator.plans.job import Job
from coordinator.registry import Registry
from potluck.blobs.store import BlobStore
from potluck.errors import Conflict, InvalidRequest, NotFound
from potluck.wire import codec
from potluck.wire.jobs import AnyJobSpec, Deploy, Evaluate, JobProgress, Train
from potluck.wire.questions import DeploymentInfo, JobEnded
from potluck.wire.values import DataFormat, Dataset, DataShard


@dataclass
class Deployed:
    """The part of a Serving that matters here."""

    names: list[str] = field(default_factory=list)

    def deployments(self) -> tuple[DeploymentInfo, ...]:
        return tuple(DeploymentInfo(name=name, wanted=1, replicas=()) for name in self.names)


class Lab:
    def __init__(self, folder: Path) -> None:
        self.journal = Journal(folder / "journal")
        self.store = BlobStore(folder / "blobs", 10_000)
        self.registry = Registry(self.journal)
        Keeping(self.registry, self.store)
        self.jobs = JobStore(self.journal, self.registry, self.store, (), node_data)
        self.serving: Any = Deployed()
        self.deletion = Deletion(self.registry, self.serving, self.jobs, self.store)
        self.now = 0.0
        self.packed = Packed(self.registry, self.deletion, lambda: self.now)

    def model(self, text: str, name: str = "m") -> str:
        """Register a model; returns its blob's hash."""
        ref = self.store.put_bytes(text.encode())
        self.registry.add_model(name, ref, now=1.0)
        return ref.sha256

    def pack(self, name: str, text: str) -> list[str]:
        """The same for a job that is submitted next."""
        blobs = self.data(name, text, packed=True)
        self.packed.added(name)
        return blobs

    def data(self, name: str, text: str, *, packed: bool = False) -> list[str]:
        """Register a data set of one shard; returns the hashes of its manifest and its shard."""
        shard = self.store.put_bytes(text.encode())
        dataset = Dataset(
            name=name,
            format=DataFormat(kind="arrays", inputs=("x",), target="y"),
            count=1,
            shards=(DataShard(blob=shard, count=1),),
        )
        manifest = self.store.put_bytes(codec.pack(dataset))
        self.registry.add_dataset(name, manifest, dataset, packed=packed)
        return [manifest.sha256, shard.sha256]

    def fill_beside(self, *kept: str) -> None:
        """Fill the store until only these blobs have room beside the rest."""
        self.store.put_bytes(b"x" * (self.store.limit_bytes - sum(map(self.store.size, kept))))

    def job(self, spec: AnyJobSpec) -> Job:
        job = self.jobs.add(self.jobs.resolve(spec, "", f"job{len(self.jobs.jobs)}", 1.0))
        self.packed.asked(spec)
        return job

    def end(self, job: Job, **parts: Any) -> None:
        result = JobEnded(
            job_id=job.job_id, kind=job.kind, state="succeeded", created_at=1, started_at=1, ended_at=2, **parts
        )
        self.jobs.record(job, JobFinished(at=2.0, result=result))
        self.jobs.ended(job, JobProgress())
        self.packed.ended(job.submitted.spec)


def node_data(name: str) -> Dataset:
    raise NotFound(name)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    yield made
    made.journal.close()


def test_a_version_goes_with_its_bytes(lab: Lab) -> None:
    first, second = lab.model("one"), lab.model("two")
    assert lab.deletion.delete_models("m:1", every=False) == ("m:1",)
    assert (lab.store.has(first), lab.store.has(second)) == (False, True)
    assert lab.deletion.delete_models("m", every=False) == ("m:2",)
    assert not lab.store.has(second)
    with pytest.raises(NotFound):
        lab.deletion.delete_models("m", every=True)


def test_all_versions_go_or_none(lab: Lab) -> None:
    blobs = [lab.model("one"), lab.model("two"), lab.model("three")]
    with pytest.raises(InvalidRequest, match="has 3 versions: name one, as in m:3"):
        lab.deletion.delete_models("m", every=False)
    lab.serving.names.append("m:2")
    with pytest.raises(Conflict, match="m:2 is deployed: `potluck undeploy m:2` first"):
        lab.deletion.delete_models("m", every=True)
    assert all(map(lab.store.has, blobs))
    lab.serving.names.clear()
    assert lab.deletion.delete_models("m", every=True) == ("m:1", "m:2", "m:3")
    assert not any(map(lab.store.has, blobs))


def test_what_an_alias_means_stays(lab: Lab) -> None:
    lab.model("one")
    lab.registry.set_alias("m:1", "prod")
    for model in ("m", "m:1", "m:prod"):
        with pytest.raises(Conflict, match="has the alias m:prod"):
            lab.deletion.delete_models(model, every=False)
    lab.registry.remove_alias("m:prod")
    assert lab.deletion.delete_models("m:1", every=False) == ("m:1",)


@pytest.mark.parametrize(
    "spec", [Evaluate(model="m:1", dataset="d"), Deploy(model="m:prod"), Train(model="m:prod", dataset="d")]
)
def test_what_a_job_under_way_uses_stays(lab: Lab, spec: AnyJobSpec) -> None:
    lab.model("one")
    lab.model("one", name="other")
    lab.registry.set_alias("m:1", "prod")
    lab.data("d", "items")
    job = lab.job(spec)
    lab.registry.remove_alias("m:prod")
    with pytest.raises(Conflict, match=rf"job {job.job_id} \({job.kind}\) uses model m:1.*potluck cancel"):
        lab.deletion.delete_models("m:1", every=False)
    # It has the same bytes, but is not what the job named.
    assert lab.deletion.delete_models("other", every=False) == ("other:1",)
    lab.end(job)
    lab.deletion.delete_models("m:1", every=False)


def test_bytes_stay_while_something_else_refers_to_them(lab: Lab) -> None:
    blob = lab.model("one")
    lab.model("one", name="other")
    lab.deletion.delete_models("m", every=False)
    assert lab.store.has(blob)
    data = lab.data("d", "items")
    job = lab.job(Train(model="other", dataset="d"))
    result = lab.store.put_bytes(b"trained")
    lab.registry.add_model("trained", result, now=1.0)
    lab.end(job, model=result)
    lab.deletion.delete_models("trained", every=False)
    assert lab.store.has(result.sha256)  # clients may still ask for the job's result
    lab.fill_beside(blob, *data)  # but it goes when room is needed
    assert not lab.store.has(result.sha256)
    assert lab.store.has(blob)


def test_a_data_set_goes_when_no_job_uses_it(lab: Lab) -> None:
    lab.model("one")
    blobs, validation = lab.data("d", "items"), lab.data("v", "others")
    job = lab.job(Train(model="m", dataset="d", validation="v"))
    for name in ("d", "v"):
        with pytest.raises(Conflict, match=rf"job {job.job_id} \(train\) uses data set '{name}'"):
            lab.deletion.remove_dataset(name)
    lab.end(job)
    lab.deletion.remove_dataset("d")
    lab.deletion.remove_dataset("v")
    assert not any(map(lab.store.has, blobs + validation))
    with pytest.raises(NotFound):
        lab.deletion.remove_dataset("d")


def test_what_was_packed_for_a_job_is_forgotten_with_the_last_one(lab: Lab) -> None:
    lab.model("one")
    lab.pack("p", "items")
    first, second = (lab.job(Evaluate(model="m", dataset="p")) for _ in range(2))
    lab.end(first)
    assert lab.registry.packed() == {"p"}, "the second uses it"
    lab.end(second)
    assert lab.registry.datasets() == ()


def test_what_was_packed_for_a_job_that_was_refused_is_forgotten_at_once(lab: Lab) -> None:
    lab.model("one")
    lab.pack("p", "items")
    under_way = lab.job(Evaluate(model="m", dataset="p"))
    lab.pack("p", "items")
    lab.packed.refused(Evaluate(model="none", dataset="p"))
    assert lab.registry.packed() == {"p"}, "another job uses it"
    lab.end(under_way)
    assert lab.registry.datasets() == ()
    lab.pack("p", "items")
    lab.packed.refused(Evaluate(model="none", dataset="p"))
    assert lab.registry.datasets() == ()


def test_data_stay_for_a_job_that_is_still_to_be_asked_for(lab: Lab) -> None:
    """Another job with the same packed data ends between a client's packing and its submit."""
    lab.model("one")
    lab.pack("p", "items")
    first = lab.job(Train(model="m", dataset="p"))
    lab.pack("p", "items")
    lab.end(first)
    second = lab.job(Train(model="m", dataset="p", validation="p"))
    lab.end(second)
    assert lab.registry.datasets() == ()
    lab.pack("p", "items")  # and the client leaves
    lab.now += KEPT_SECONDS - 1
    lab.packed.tick()
    assert lab.registry.packed() == {"p"}
    lab.now += 2
    lab.packed.tick()
    assert lab.registry.datasets() == ()


def test_bytes_of_what_was_packed_stay_for_a_while(lab: Lab) -> None:
    lab.model("one")
    blobs = lab.pack("p", "items")
    lab.end(lab.job(Train(model="m", dataset="p")))
    lab.registry.add_model("trained", lab.store.put_bytes(b"trained"), job_id="job0", now=1.0)
    quantize = lab.job(Deploy(model="trained", quantize="int8"))
    assert quantize.dataset is not None, "with the data that it was trained on, though their name is gone"
    lab.now += KEPT_SECONDS + 1
    lab.packed.tick()
    assert all(map(lab.store.has, blobs)), "a job under way uses them"
    lab.end(quantize)
    lab.pack("q", "others")
    lab.end(lab.job(Train(model="m", dataset="q")))
    lab.now += KEPT_SECONDS + 1
    lab.packed.tick()
    assert lab.store.size_bytes < 100, "a model and its two versions are left"


def test_what_somebody_named_stays(lab: Lab) -> None:
    lab.model("one")
    blobs = lab.data("d", "items")
    lab.pack("d", "items")
    lab.end(lab.job(Train(model="m", dataset="d")))
    assert [info.packed for info in lab.registry.datasets()] == [False]
    lab.pack("p", "others")
    job = lab.job(Train(model="m", dataset="p"))
    lab.data("p", "others")
    lab.end(job)
    assert [info.name for info in lab.registry.datasets()] == ["d", "p"]
    assert all(map(lab.store.has, blobs))


def test_a_restart_forgets_nothing_of_what_was_packed(lab: Lab, tmp_path: Path) -> None:
    lab.model("one")
    gone = lab.pack("gone", "items")
    lab.end(lab.job(Train(model="m", dataset="gone")))
    used = lab.pack("used", "others")
    lab.job(Train(model="m", dataset="used"))
    assert all(map(lab.store.has, gone))
    lab.journal.close()
    again = Lab(tmp_path)
    assert not any(map(again.store.has, gone)), "nobody waits for them any more"
    assert all(map(again.store.has, used))
    again.end(again.jobs.jobs["job1"])
    assert again.registry.datasets() == ()
    again.journal.close()


def test_a_data_set_that_is_replaced_lets_go_of_what_only_it_had(lab: Lab) -> None:
    before, after = lab.data("d", "items"), lab.data("d", "other items")
    lab.fill_beside(*after)
    assert not any(map(lab.store.has, before))
    assert all(map(lab.store.has, after))
