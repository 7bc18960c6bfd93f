"""An action without room on the coordinator's disk is tried again, and its job waits; other failures end the job as before."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from coordinator.dispatch.dispatcher import ROOM_SECONDS, Dispatcher
from coordinator.dispatch.leases import Held
from potluck.errors import DiskFull, InvalidModel
from potluck.settings import CoordinatorSettings
from potluck.wire.commands import LeaseShard
from potluck.wire.reports import ShardFinished
from potluck.wire.tasks import EvaluateResult, ExportTask
from potluck.wire.values import BlobRef


class Lab:
    """A dispatcher with one job, of which only the actions matter."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.told: list[str] = []
        self.ended: list[str] = []
        self.job: Any = SimpleNamespace(job_id="j", active=True)
        nothing: Any = None
        announcer: Any = SimpleNamespace(doing=lambda job_id, what: self.told.append(what))
        jobs: Any = SimpleNamespace(jobs={"j": self.job}, active={})
        self.dispatcher = Dispatcher(
            announcer=announcer, registry=nothing, serving=nothing, jobs=jobs, leases=nothing, collector=nothing,
            packed=nothing, settings=CoordinatorSettings(), clock=lambda: self.now,
        )  # fmt: skip
        monkeypatch.setattr(self.dispatcher, "_finish", lambda job, state, **parts: self.ended.append(state))

    async def act(self, name: str, raised: Exception | None) -> bool:
        """Whether the action has begun."""
        begun = []

        async def action() -> None:
            begun.append(True)
            if raised is not None:
                raise raised

        async with asyncio.TaskGroup() as tasks:
            self.dispatcher._tasks = tasks
            self.dispatcher._act("j", name, action())
        return bool(begun)


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Lab:
    return Lab(monkeypatch)


async def test_what_finds_no_room_is_tried_again(lab: Lab) -> None:
    assert await lab.act("round 1", DiskFull("the disk is full"))
    assert (lab.told, lab.ended) == (["waits for room at the coordinator: the disk is full"], [])
    assert lab.dispatcher.shortage == "the disk is full", "also where the store has room for something smaller"
    assert not await lab.act("round 1", None), "not at once"
    lab.now += ROOM_SECONDS
    assert await lab.act("round 1", DiskFull("the disk is full"))
    lab.now += ROOM_SECONDS
    assert await lab.act("round 1", None)
    assert lab.told[-1] == ""
    assert lab.dispatcher.shortage == ""
    assert await lab.act("round 1", None), "nothing waits any more"
    assert lab.ended == []


@pytest.mark.parametrize(
    ("name", "raised"),
    [("round 1", InvalidModel("no")), ("round 1", ValueError("a defect")), ("deploy", DiskFull("of a node"))],
)
async def test_other_failures_end_the_job(lab: Lab, name: str, raised: Exception) -> None:
    assert await lab.act(name, raised)
    assert (lab.told, lab.ended) == ([], ["failed"])


async def test_a_job_that_was_cancelled_waits_for_nothing(lab: Lab) -> None:
    lab.job.active = False
    assert await lab.act("complete", DiskFull("the disk is full"))
    assert (lab.told, lab.ended) == ([], [])


async def test_a_result_without_room_stays_with_its_node_whose_lease_goes_on(lab: Lab) -> None:
    async def full(result: object) -> None:
        raise DiskFull("the disk is full")

    lab.job.training, lab.job.attempts = None, {}
    lab.dispatcher._leases = cast(Any, {"a"})
    lab.dispatcher._collector = cast(Any, SimpleNamespace(collect=full))
    body = LeaseShard(
        epoch=1, job_id="j", shard_id="s", attempt_id="a", lease_seconds=10.0,
        task=ExportTask(model=BlobRef(sha256="a" * 64, size=1), weights=BlobRef(sha256="b" * 64, size=1)),
    )  # fmt: skip
    held = Held("j", "n1", body, heard_at=0.0)
    with pytest.raises(DiskFull):
        await lab.dispatcher._collect(lab.job, held, ShardFinished(attempt_id="a", result=EvaluateResult(count=1)))
    assert not held.expired(30.0)
    assert not held.collecting
