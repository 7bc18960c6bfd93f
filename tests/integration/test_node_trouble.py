"""A node among slow, odd and hostile programs, and with a disk that fails: it answers, and goes on."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from aiohttp import web

from potluck.credentials import Credentials
from potluck.net.http import serve_http
from potluck.wire.births import NodeTelemetry
from potluck.wire.commands import ForgetJob, HoldBlob, LoadModel, UnloadModel, WithdrawLease
from potluck.wire.reports import (
    HoldFailed,
    InferenceFinished,
    LeaseRefused,
    LeaseTaken,
    ModelLoaded,
    ModelLoadFailed,
    ModelUnloaded,
    ShardFailed,
    ShardFinished,
)
from potluck.wire.tasks import ExportTask
from potluck.wire.values import BlobRef, Tensor
from support.eventually import eventually
from support.node_lab import TOPICS, Lab, node_lab

ODD = BlobRef(sha256="a" * 64, size=5, holders=(f"http://{'a' * 70}", "http://a..b", "http://[::1", "\n", "//x"))


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    async with node_lab(tmp_path) as lab:
        yield lab


@dataclass
class Hanging:
    """A holder that takes requests, and never answers."""

    url: str = ""
    waiting: int = 0

    async def get(self, request: web.Request) -> web.Response:
        self.waiting += 1
        try:
            await eventually(lambda: request.transport is None or request.transport.is_closing(), 60)
        finally:
            self.waiting -= 1
        return web.Response()


@asynccontextmanager
async def hanging() -> AsyncIterator[Hanging]:
    holder = Hanging()
    sock = socket.create_server(("127.0.0.1", 0))
    holder.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    async with serve_http(sock, [web.get("/blobs/{sha256}", holder.get)], Credentials()):
        yield holder


def export(*refs: BlobRef) -> ExportTask:
    model, weights = refs
    return ExportTask(model=model, weights=weights)


async def works(lab: Lab, attempt_id: str) -> None:
    await lab.lease(attempt_id, "join")
    await lab.heard(ShardFinished, lambda one: one.attempt_id == attempt_id)


async def test_blobs_of_a_lease_withdrawn_while_it_waited_are_not_fetched(lab: Lab) -> None:
    await lab.node()
    async with hanging() as holder:
        await lab.lease("a1", "slow")
        waits = [BlobRef(sha256=sign * 64, size=5, holders=(holder.url,)) for sign in "0123"]
        await lab.lease("a2", "join", task=export(waits[0], waits[1]))
        await lab.lease("a3", "join", task=export(waits[2], waits[3]))
        await eventually(lambda: holder.waiting == 4)
        await lab.command(WithdrawLease(epoch=1, attempt_id="a2", reason="test"))
        await eventually(lambda: holder.waiting == 2)
        # The shard that runs need not wait for a place among the fetches ahead.
        await lab.lease("a4", "join", task=export(waits[0], waits[1]))
        await eventually(lambda: holder.waiting == 4)
        await lab.command(WithdrawLease(epoch=1, attempt_id="a1", reason="test"))  # a3 is next
        await lab.command(WithdrawLease(epoch=1, attempt_id="a3", reason="test"))
        await eventually(lambda: holder.waiting == 2)
        await lab.command(WithdrawLease(epoch=1, attempt_id="a4", reason="test"))
        await eventually(lambda: holder.waiting == 0)
    await works(lab, "a5")
    assert not lab.all(ShardFailed)


async def test_fetches_ahead_do_not_hold_up_the_running_shard(lab: Lab) -> None:
    await lab.node()
    async with hanging() as holder:
        refs = [BlobRef(sha256=sign * 64, size=5, holders=(holder.url,)) for sign in "0123"]
        await lab.lease("a1", "slow")
        await lab.lease("a2", "join")
        await lab.lease("a3", "join", task=export(refs[0], refs[1]))
        await eventually(lambda: holder.waiting == 2)
        await lab.command(WithdrawLease(epoch=1, attempt_id="a1", reason="test"))
        await lab.heard(ShardFinished, lambda one: one.attempt_id == "a2", seconds=5)
        await lab.command(WithdrawLease(epoch=1, attempt_id="a3", reason="test"))


async def test_a_holder_that_hangs_costs_limited_time_and_does_not_delay_a_stop(lab: Lab) -> None:
    node = await lab.node()
    async with hanging() as holder:
        ref = BlobRef(sha256="0" * 64, size=5, holders=(holder.url,))
        await lab.lease("a1", "join", task=export(ref, ref))
        await eventually(lambda: holder.waiting)
        assert await node.stop() == 0
        refused = await lab.heard(LeaseRefused)
        assert (refused.attempt_id, refused.error.code) == ("a1", "unavailable")
        await eventually(lambda: not holder.waiting)
    assert "Traceback" not in node.log()


async def test_malformed_addresses_end_no_node(lab: Lab) -> None:
    """A host name with a label too long for the DNS once ended one."""
    node = await lab.node()
    await lab.lease("a1", "join", task=export(ODD, ODD))
    failed = await lab.heard(ShardFailed)
    assert failed.error.code == "unavailable"
    assert "http://a..b: is not an http://host:port address" in failed.error.message
    await lab.command(LoadModel(epoch=1, replica_id="r", name="m:1", model=ODD))
    assert (await lab.heard(ModelLoadFailed)).error.code == "unavailable"
    await lab.load("m:1/1")
    await lab.heard(ModelLoaded)
    await lab.infer("b1", "m:1/1", Tensor(name="x", datatype="UINT8", shape=(5,), data=ODD))
    (outcome,) = (await lab.heard(InferenceFinished)).outcomes
    assert outcome.error is not None
    assert outcome.error.code == "inputs_lost"
    await lab.command(HoldBlob(epoch=1, blob=ODD))
    assert "//x: is not an http://host:port address" in (await lab.heard(HoldFailed)).error.message
    await works(lab, "a2")
    assert "Traceback" not in node.log()


@pytest.mark.parametrize(
    ("ref", "code"),
    [
        (BlobRef(sha256="b" * 64, size=0), "corrupt_blob"),
        (BlobRef(sha256="b" * 64, size=2**53), "disk_full"),
        (BlobRef(sha256="b" * 64, size=5), "unavailable"),
    ],
)
async def test_impossible_blobs_are_reported(lab: Lab, ref: BlobRef, code: str) -> None:
    await lab.node()
    await lab.lease("a1", "join", task=export(ref, ref))
    assert (await lab.heard(ShardFailed)).error.code == code
    await works(lab, "a2")


async def test_a_disk_that_fails_ends_no_node(lab: Lab) -> None:
    node = await lab.node()
    blobs = lab.folder / "state" / "blobs"
    shutil.rmtree(blobs)
    blobs.write_text("a file where the folder was")
    await lab.lease("a1", "join")
    failed = await lab.heard(ShardFailed)
    assert (failed.error.code, failed.error.retryable) == ("unavailable", True)
    assert "this node's disk fails" in failed.error.message
    await lab.load("m:1/1")
    assert (await lab.heard(ModelLoadFailed)).error.code == "unavailable"
    blobs.unlink()
    blobs.mkdir()
    await works(lab, "a2")
    assert "Traceback" not in node.log()


async def test_numbers_and_nesting_beyond_bounds_end_no_node(lab: Lab) -> None:
    node = await lab.node()
    await lab.load("m:1/1")
    await lab.heard(ModelLoaded)
    inbox = TOPICS.node("n1", "inbox")
    for number in (2**64, -(2**64), 10**400):
        await lab.bus._send(inbox, json.dumps({"type": "UnloadModel", "epoch": number}).encode(), 1, False)
        tensor = {"name": "x", "datatype": "INT64", "shape": [1], "data": [number]}
        batch = {"type": "RunInference", "id": "b", "replica_id": "m:1/1", "requests": [[tensor]]}
        await lab.bus._send(inbox, json.dumps(batch).encode(), 1, False)
    for depth in (900, 960, 985, 100_000):
        nested = "[" * depth + "]" * depth
        batch["requests"] = [[{**tensor, "data": []}]]
        await lab.bus._send(inbox, json.dumps(batch).replace("[]", nested).encode(), 1, False)
    await works(lab, "a1")
    assert lab.all(InferenceFinished)
    assert "Traceback" not in node.log()


async def test_a_flood_is_answered_and_costs_little(lab: Lab) -> None:
    node = await lab.node()
    process = psutil.Process(node.pid)
    before = process.memory_info().rss
    await lab.lease("held", "slow")
    await lab.heard(LeaseTaken)
    for number in range(1000):
        await lab.lease(f"flood{number}", "slow", task=export(ODD, ODD))
        await lab.command(UnloadModel(epoch=1, replica_id=f"r{number}"))
        await lab.command(ForgetJob(job_id=f"job{number}"))
        await lab.infer(f"b{number}", "nobody")
    await eventually(lambda: len(lab.all(LeaseRefused)) == 998, 20)
    await eventually(lambda: len(lab.all(ModelUnloaded)) == 1000, 20)
    assert {one.error.code for one in lab.all(LeaseRefused)} == {"overloaded"}
    assert process.memory_info().rss - before < 30e6
    await lab.heard(NodeTelemetry, lambda one: one.attempts == ("held", "flood0", "flood1"))
    for attempt_id in ("held", "flood0", "flood1"):
        await lab.command(WithdrawLease(epoch=1, attempt_id=attempt_id, reason="test"))
    await works(lab, "a1")
