"""What is told of the journal's events, and of what nothing is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from coordinator.events.telling import TEXT_LIMIT, told
from coordinator.identities.members import (
    CertificateRenewed,
    Member,
    MemberAdded,
    MemberTaken,
    Token,
    TokenMade,
    TokenTaken,
)
from coordinator.plans.events import (
    AttemptEnded,
    AttemptLeased,
    EpochEnded,
    JobFinished,
    JobStarted,
    JobSubmitted,
    MeasureAgain,
    StopAsked,
)
from coordinator.plans.job import Job
from coordinator.registry import (
    AliasRemoved,
    AliasSet,
    DatasetForgotten,
    DatasetRecorded,
    ModelAdded,
    ModelDeleted,
    SignatureLearnt,
    TagsSet,
)
from coordinator.serving.records import (
    Deployed,
    Measured,
    Parked,
    Retired,
    Routed,
    Scaled,
    Settled,
    TakenDown,
    Woken,
)
from potluck.wire.jobs import EpochMetrics, Train
from potluck.wire.questions import JobEnded, ModelInfo
from potluck.wire.tasks import EvaluateTask
from potluck.wire.values import BlobRef, DataFormat, Dataset, DataShard, ErrorInfo, Signature

DOCUMENTED = (Path(__file__).parents[4] / "docs" / "protocol.md").read_text("utf-8").split("\n## Events\n")[1].split("\n## ")[0]  # fmt: skip
BLOB = BlobRef(sha256="0" * 64, size=1)
SPEC = Train(model=BLOB, model_name="cnn.keras", dataset="photos", register="flowers")
SUBMITTED = JobSubmitted(at=1.0, job_id="j", request_id="", spec=SPEC)
LEASED = AttemptLeased(
    at=2.0, attempt_id="a", shard_id="s", node_id="n",
    task=EvaluateTask(model=BLOB, weights=None, slices=(), format=DataFormat(kind="arrays"), image=None, batch_size=1),
)  # fmt: skip
NODE = Member(identity="node:n", role="node", joined_at=1.0)
TOKEN = Token(token_id="0a", hash=b"", role="node", expires_at=2.0, uses_left=2, name="n", made_by="client:ann")
DATA = Dataset(name="d", format=DataFormat(kind="images"), count=5, shards=(DataShard(blob=BLOB, count=5),))


def ended(state: Any, **fields: Any) -> JobFinished:
    result = JobEnded(job_id="j", kind="train", state=state, created_at=1, started_at=2, ended_at=3, **fields)
    return JobFinished(at=3.0, result=result)


def of_a_job(event: Any, state: Any = "running") -> tuple[str, ...] | None:
    said = told(event, Job(SUBMITTED, None, state=state), 5.0)
    return None if said is None else (said.subject, said.name, said.what, said.text)


def test_a_job_is_submitted_starts_once_and_ends() -> None:
    said = told(SUBMITTED, None, 5.0)
    assert said is not None
    assert (said.at, said.subject, said.name, said.what) == (5.0, "job", "j", "submitted")
    assert said.text == "train cnn.keras with photos as flowers"
    for event in (LEASED, JobStarted(at=2.0)):
        assert of_a_job(event, "queued") == ("job", "j", "started", "train")
        assert of_a_job(event) is None
    epoch = EpochMetrics(epoch=2, metrics={"loss": 0.12345, "accuracy": 0.5})
    assert of_a_job(EpochEnded(at=3.0, epoch=epoch)) == (
        "job",
        "j",
        "epoch_ended",
        "epoch 2: loss 0.1235, accuracy 0.5",
    )
    assert of_a_job(StopAsked(at=3.0)) == ("job", "j", "stop_asked", "it ends after the epoch that is under way")
    assert of_a_job(ended("succeeded", registered="flowers:3")) == ("job", "j", "succeeded", "train: flowers:3")
    assert of_a_job(ended("cancelled")) == ("job", "j", "cancelled", "train")
    failed = ended("failed", error=ErrorInfo(code="invalid_model", message="x" * 1000))
    assert of_a_job(failed) == ("job", "j", "failed", "x" * (TEXT_LIMIT - 3) + "...")


@pytest.mark.parametrize(
    "event",
    [
        AttemptEnded(at=2.0, attempt_id="a", reason="lost"),
        MeasureAgain(at=2.0, nodes=("n",)),
        SignatureLearnt(name="m", version=1, signature=Signature(inputs=(), outputs=())),
        Measured(name="m:1", resident_bytes=5),
        CertificateRenewed(identity="node:n", certificate_until=5.0),
    ],
)
def test_of_the_coordinators_own_affairs_nothing_is_told(event: Any) -> None:
    assert of_a_job(event) is None


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (ModelAdded(model=ModelInfo(name="m", version=3, model=BLOB, created_at=1, source="job j")), ("model", "m:3", "registered", "job j")),
        (AliasSet(name="m", alias="prod", version=3), ("model", "m:3", "alias_set", "m:prod")),
        (AliasRemoved(name="m", alias="prod"), ("model", "m", "alias_removed", "m:prod")),
        (TagsSet(name="m", version=3, tags={"a": "b"}), ("model", "m:3", "tagged", "a=b")),
        (ModelDeleted(name="m", version=3), ("model", "m:3", "deleted", "")),
        (DatasetRecorded(manifest=BLOB, dataset=DATA), ("dataset", "d", "added", "images, 5 items")),
        (DatasetRecorded(manifest=BLOB, dataset=DATA, packed=True), ("dataset", "d", "added", "images, 5 items, packed for a job")),
        (DatasetForgotten(name="d"), ("dataset", "d", "removed", "")),
        (Deployed(name="m:3", model=BLOB, wanted=2), ("deployment", "m:3", "deployed", "on 2 nodes")),
        (Deployed(name="m:3", model=BLOB, wanted=0), ("deployment", "m:3", "deployed", "on every node")),
        (Settled(name="m:3"), ("deployment", "m:3", "ready", "a replica is ready for the first time")),
        (Routed(name="m", stable="m:3", canary="m:4", weight=10), ("deployment", "m:3", "routed", "m:3 answers to m, m:4 to 10 %")),
        (Scaled(name="m:3", wanted=1), ("deployment", "m:3", "scaled", "to 1 replica")),
        (Parked(name="m:3", why="idle", reason="nobody asks"), ("deployment", "m:3", "idle", "nobody asks")),
        (Woken(name="m:3"), ("deployment", "m:3", "woken", "somebody asked for it")),
        (Retired(name="m:3"), ("deployment", "m:3", "retired", "it answers what it has, and goes")),
        (TakenDown(name="m:3"), ("deployment", "m:3", "undeployed", "")),
        (MemberAdded(member=NODE, token_id="t", key="k"), ("member", "node:n", "joined", "node, with a join token")),
        (MemberAdded(member=replace(NODE, role="user", bearer_id="b")), ("member", "node:n", "joined", "user, with a bearer token")),
        (MemberAdded(member=NODE), ("member", "node:n", "joined", "node, by the coordinator itself")),
        (MemberTaken(identity="node:n", at=1.0), ("member", "node:n", "removed", "")),
        (TokenMade(token=TOKEN), ("token", "0a", "created", "node, 2 uses, for n, by client:ann")),
        (TokenTaken(token_id="0a"), ("token", "0a", "removed", "")),
    ],
)  # fmt: skip
def test_what_is_told_of_models_data_deployments_and_members(event: Any, said: tuple[str, ...]) -> None:
    found = told(event, None, 5.0)
    assert found is not None
    assert (found.subject, found.name, found.what, found.text) == said
    assert f"`{found.what}`" in DOCUMENTED
