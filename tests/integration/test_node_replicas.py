"""Replicas on a real node process: loaded, asked, lost with their engine, and with TensorFlow in that engine."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from potluck.wire.births import NodeTelemetry
from potluck.wire.commands import RunInference, UnloadModel
from potluck.wire.reports import (
    InferenceFinished,
    LeaseRenewed,
    ModelLoaded,
    ModelLoadFailed,
    ModelUnloaded,
    ShardFailed,
    ShardFinished,
)
from potluck.wire.tasks import PredictResult, PredictTask, TrainTask
from potluck.wire.tensors import from_numpy, to_numpy
from potluck.wire.values import BlobRef, DataSlice, ErrorInfo, Tensor
from support import allowing, models
from support.eventually import eventually
from support.node_lab import Lab, NodeProcess, node_lab
from support.processes import engines

REPLICA = "m:1/1"
BACK_SECONDS = 30.0
"""A replica that another model ended answers again within this time: an engine starts, and loads it. 6 s on an idle machine."""
X = Tensor(name="x", datatype="UINT8", shape=(1, 3), data=b"\1\2\3")


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    async with node_lab(tmp_path) as lab:
        yield lab


async def answer(lab: Lab, batch_id: str, seconds: float = 10) -> InferenceFinished:
    return await lab.heard(InferenceFinished, lambda one: one.id == batch_id, seconds=seconds)


def code(finished: InferenceFinished) -> str:
    (outcome,) = finished.outcomes
    return outcome.error.code if outcome.error is not None else ""


async def test_a_model_is_loaded_once_and_reported_as_often_as_asked(lab: Lab) -> None:
    node = await lab.node()
    for _ in range(3):
        await lab.load(REPLICA)
    loaded = await lab.heard(ModelLoaded)
    assert (loaded.replica_id, loaded.resident_bytes) == (REPLICA, 123)
    await lab.load(REPLICA)
    await lab.heard(ModelLoaded, after=1)
    assert node.log().count("model loaded") == 1
    await lab.heard(NodeTelemetry, lambda one: one.replicas == (REPLICA,))
    for _ in range(2):  # unloading a replica that is not there succeeds
        told = len(lab.all(ModelUnloaded))
        await lab.command(UnloadModel(epoch=1, replica_id=REPLICA))
        unloaded = await lab.heard(ModelUnloaded, after=told)
        assert unloaded.error is None
    await lab.infer("b1", REPLICA, X)
    assert code(await answer(lab, "b1")) == "not_found"


async def test_a_model_that_cannot_be_loaded_is_reported(lab: Lab) -> None:
    await lab.node()
    await lab.load(REPLICA, b"bad")
    failed = await lab.heard(ModelLoadFailed)
    assert (failed.error.code, failed.error.message) == ("invalid_model", "this is not a .keras file")
    await lab.load(REPLICA, b"good")  # the place is free again
    await lab.heard(ModelLoaded)


async def test_batches_are_answered_apart_and_do_not_wait_for_each_other(lab: Lab) -> None:
    await lab.node()
    await lab.load(REPLICA)
    await lab.heard(ModelLoaded)
    await lab.infer("slow", REPLICA, Tensor(name="slow", datatype="UINT8", shape=(1, 1), data=b"\0"))
    second = Tensor(name="x", datatype="UINT8", shape=(2, 1), data=b"ab")
    await lab.command(RunInference(id="two", replica_id=REPLICA, requests=((X,), (second, X))), qos=0)
    two = await answer(lab, "two")
    assert [outcome.outputs for outcome in two.outcomes] == [(X,), (second, X)]
    assert two.replica_id == REPLICA
    assert two.seconds > 0
    assert not [one for one in lab.all(InferenceFinished) if one.id == "slow"]
    await answer(lab, "slow")


async def test_a_late_batch_is_not_computed(lab: Lab) -> None:
    await lab.node()
    await lab.load(REPLICA)
    await lab.heard(ModelLoaded)
    await lab.infer("late", REPLICA, X, expires=time.time() - 1)
    await lab.infer("in time", REPLICA, X, expires=time.time() + 30)
    await answer(lab, "in time")
    await lab.infer("after", REPLICA, X)
    await answer(lab, "after")
    assert [(one.id, code(one)) for one in lab.all(InferenceFinished)] == [
        ("late", "timed_out"), ("in time", ""), ("after", ""),
    ]  # fmt: skip


async def test_large_tensors_come_and_go_as_blobs(lab: Lab) -> None:
    await lab.node()
    await lab.load(REPLICA)
    await lab.heard(ModelLoaded)
    data = os.urandom(400_000)
    await lab.infer("in", REPLICA, Tensor(name="x", datatype="UINT8", shape=(1, len(data)), data=lab.blob(data)), X)
    (outcome,) = (await answer(lab, "in")).outcomes
    back, small = outcome.outputs
    assert isinstance(back.data, BlobRef)
    assert await lab.fetch(back.data) == data
    assert small == X  # small tensors stay in the message
    other = os.urandom(400_000)
    ref = lab.blob(other)
    await lab.infer("gone", REPLICA, Tensor(name="grow", datatype="UINT8", shape=(1, len(other)), data=ref))
    assert code(await answer(lab, "gone")) == ""
    kept = {path.name for path in lab.folder.glob("*/blobs/*")}
    assert kept  # the model
    assert ref.sha256 not in kept
    assert not list(lab.folder.glob("*/inputs/*"))
    await lab.infer("out", REPLICA, Tensor(name="grow", datatype="UINT8", shape=(1, 1), data=b"\0"))
    (outcome,) = (await answer(lab, "out")).outcomes
    assert [type(output.data) for output in outcome.outputs] == [BlobRef, bytes]


async def test_a_blob_that_nobody_has_fails_its_batch_alone(lab: Lab) -> None:
    await lab.node()
    await lab.load(REPLICA)
    await lab.heard(ModelLoaded)
    lost = BlobRef(sha256="0" * 64, size=9, holders=())
    await lab.infer("lost", REPLICA, Tensor(name="x", datatype="UINT8", shape=(9,), data=lost))
    huge = BlobRef(sha256="1" * 64, size=2**40, holders=lab.urls)
    await lab.infer("huge", REPLICA, Tensor(name="x", datatype="UINT8", shape=(2**40,), data=huge))
    await lab.infer("good", REPLICA, X)
    assert code(await answer(lab, "good")) == ""
    assert code(await answer(lab, "huge")) == "too_large"
    assert code(await answer(lab, "lost", seconds=60)) == "inputs_lost"


async def test_replicas_of_an_engine_that_dies_are_reported_as_unloaded(lab: Lab) -> None:
    node = await lab.node()
    await lab.lease("a1", "slow")
    for replica_id in (REPLICA, "other:1/1"):
        await lab.load(replica_id)
        await lab.heard(ModelLoaded, lambda one, wanted=replica_id: one.replica_id == wanted)  # type: ignore[misc]
    poison = Tensor(name="crash", datatype="UINT8", shape=(1, 1), data=b"\0")
    await lab.infer("poison", REPLICA, poison)
    await lab.infer("next", REPLICA, X)
    assert code(await answer(lab, "poison")) == "model_crashed"
    for replica_id, told in ((REPLICA, "model_crashed"), ("other:1/1", "engine_failed")):
        gone = await lab.heard(ModelUnloaded, lambda one, wanted=replica_id: one.replica_id == wanted)  # type: ignore[misc]
        assert gone.error is not None
        assert gone.error.code == told
        assert "SIGSEGV" in gone.error.message
    assert code(await answer(lab, "next")) in ("engine_failed", "not_found")  # both are asked again elsewhere
    await lab.load(REPLICA)
    await lab.heard(ModelLoaded, after=2)
    await lab.infer("again", REPLICA, X)
    assert code(await answer(lab, "again")) == ""
    await lab.heard(LeaseRenewed)
    done = max(one.done for one in lab.all(LeaseRenewed))
    await lab.heard(LeaseRenewed, lambda one: one.done > done)  # the shard has its own engine
    assert node.log().count("engine started engine=serve") == 1
    assert node.log().count("engine started engine=alone-1") == 1
    assert node.log().count("engine started engine=work") == 1


async def test_the_engine_of_a_replica_is_not_idle(lab: Lab) -> None:
    node = await lab.node(POTLUCK_ENGINE_IDLE_SECONDS="0.2")
    await lab.load(REPLICA)
    await lab.heard(ModelLoaded)
    await lab.lease("a1", "join")
    await lab.heard(ShardFinished)
    await eventually(lambda: "engine stopped engine=work" in node.log())
    assert "engine stopped engine=serve" not in node.log()
    await lab.command(UnloadModel(epoch=1, replica_id=REPLICA))
    await eventually(lambda: "engine stopped engine=serve" in node.log())


async def test_an_older_coordinator_unloads_nothing(lab: Lab) -> None:
    await lab.node()
    await lab.online(epoch=3)
    await lab.load(REPLICA, epoch=3)
    await lab.heard(ModelLoaded)
    await lab.command(UnloadModel(epoch=2, replica_id=REPLICA))
    await lab.load("m:1/2", epoch=2)
    await lab.infer("b1", REPLICA, X)
    assert code(await answer(lab, "b1")) == ""
    assert len(lab.all(ModelLoaded)) == 1


@pytest.mark.tensorflow
async def test_with_tensorflow_in_its_engines(lab: Lab) -> None:
    """A deployment answers while shards run and survives the death of their engine. The death of its own engine is reported."""
    files = models.Files(lab.folder / "files")
    model = models.dense()
    x, y = models.blobs()
    keras_file = lab.blob(files.paths[files.model(model).sha256].read_bytes())
    (shard,) = files.arrays(1, x=x, y=y)
    data = lab.blob(files.paths[shard.blob.sha256].read_bytes())
    node = await lab.node(fake=False)

    await lab.load(REPLICA, files.paths[keras_file.sha256].read_bytes())
    loaded = await lab.heard(ModelLoaded, seconds=90)
    assert loaded.signature.inputs[0].shape == (-1, 8)
    predict = PredictTask(
        model=keras_file,
        slices=(DataSlice(blob=data, start=10, stop=60),),
        format=models.ARRAYS,
        image=None,
        batch_size=16,
    )
    await lab.lease("p1", "predict", task=predict)
    predicted = await lab.heard(ShardFinished, seconds=90)
    assert isinstance(predicted.result, PredictResult)
    expected = model(x[10:60]).numpy()
    np.testing.assert_allclose(to_numpy(predicted.result.outputs[0]), expected, atol=1e-5)

    train = TrainTask(
        model=keras_file,
        weights=None,
        data=(models.DataShard(blob=data, count=shard.count),),
        format=models.ARRAYS,
        image=None,
        round=0,
        samples=10**9,
        seconds=120,
        batch_size=16,
    )
    await lab.lease("t1", "train", task=train)
    await lab.heard(LeaseRenewed, lambda one: one.attempt_id == "t1" and one.done > 0, seconds=60)
    await lab.infer("b1", REPLICA, from_numpy("x", x[:2]))
    (outcome,) = (await answer(lab, "b1", 20)).outcomes
    np.testing.assert_allclose(to_numpy(outcome.outputs[0]), model(x[:2]).numpy(), atol=1e-5)

    await training_gives_way(lab, node, "t1", from_numpy("x", x[:2]))

    engines(node.pid)["work"].kill()
    failed = await lab.heard(ShardFailed)
    assert (failed.error.code, failed.error.retryable) == ("engine_failed", True)
    assert "SIGKILL" in failed.error.message
    await lab.infer("b2", REPLICA, from_numpy("x", x[:2]))
    assert code(await answer(lab, "b2")) == ""
    await lab.lease("p2", "predict", task=predict)  # on a fresh engine
    await lab.heard(ShardFinished, lambda one: one.attempt_id == "p2", seconds=90)

    children = [one.pid for one in engines(node.pid).values()]
    assert len(children) == 2
    engines(node.pid)["serve"].kill()
    gone = await lab.heard(ModelUnloaded)
    assert gone.error is not None
    assert gone.error.code == "engine_failed"
    assert await node.stop() == 0
    await eventually(lambda: not any(psutil.pid_exists(pid) for pid in children))


@pytest.mark.tensorflow
async def test_a_model_that_hangs_or_aborts_stops_the_others_only_for_seconds(lab: Lab) -> None:
    """Only the first time. After that it has its own engine, and after three times it is refused."""
    with allowing.own_code() as own:
        files = models.Files(lab.folder / "files")
        good, bad = (
            files.paths[files.model(model).sha256].read_bytes()
            for model in (allowing.dense(), allowing.dense(own.Looper()))
        )
        node = await lab.node(
            fake=False,
            POTLUCK_ALLOW_CODE="own_code",
            POTLUCK_ENGINE_BATCH_SECONDS="5",
            PYTHONPATH=os.environ["PYTHONPATH"],
        )
    fine, poison = (from_numpy("x", np.full((1, 6), value, np.float32)) for value in (1.0, 1000.0))

    async def load(replica_id: str, model: bytes) -> None:
        await lab.load(replica_id, model)
        await lab.heard(ModelLoaded, lambda one: one.replica_id == replica_id, seconds=90)

    async def gone(replica_id: str) -> ErrorInfo:
        told = await lab.heard(ModelUnloaded, lambda one: one.replica_id == replica_id, seconds=60)
        assert told.error is not None
        return told.error

    await load("good:1/1", good)
    await load("bad:1/1", bad)
    await lab.infer("f1", "bad:1/1", fine)
    assert code(await answer(lab, "f1")) == ""
    await lab.infer("p1", "bad:1/1", poison)
    await lab.infer("g1", "good:1/1", fine)
    blamed, beside = await gone("bad:1/1"), await gone("good:1/1")
    died_at = time.monotonic()
    assert (blamed.code, beside.code) == ("model_crashed", "engine_failed")
    assert "a batch of replica bad:1/1 took more than" in blamed.message
    assert code(await answer(lab, "p1")) == "model_crashed"
    assert code(await answer(lab, "g1")) == "engine_failed"

    await load("good:1/2", good)
    await lab.infer("g2", "good:1/2", fine)
    assert code(await answer(lab, "g2")) == ""
    assert time.monotonic() - died_at < BACK_SECONDS
    await load("bad:1/2", bad)
    for number in (2, 3):  # now it aborts, and harms no other model
        await lab.infer(f"p{number}", f"bad:1/{number}", poison)
        alone = engines(node.pid)[f"alone-{number - 1}"]
        await eventually(lambda alone=alone: alone.cpu_percent(0.2) > 30, 20)  # type: ignore[misc]
        alone.send_signal(signal.SIGABRT)
        assert (await gone(f"bad:1/{number}")).code == "model_crashed"
        await lab.infer(f"h{number}", "good:1/2", fine)
        assert code(await answer(lab, f"h{number}")) == ""
        if number == 2:
            await load("bad:1/3", bad)
    await lab.load("bad:1/4", bad)
    refused = await lab.heard(ModelLoadFailed)
    assert refused.error.code == "model_crashed"
    assert "3 times within an hour" in refused.error.message
    assert "SIGABRT" in refused.error.message
    await eventually(lambda: set(engines(node.pid)) == {"serve"})


async def training_gives_way(lab: Lab, node: NodeProcess, attempt_id: str, asked: Tensor) -> None:
    """Training stands still while requests come and their objective (too short to be met) is at risk. Then it goes on."""

    def done() -> list[int]:
        return [one.done for one in lab.all(LeaseRenewed) if one.attempt_id == attempt_id]

    async def asked_and_standing_still() -> bool:
        await lab.infer("at risk", REPLICA, asked, objective_seconds=1e-6)
        return "jobs give way" in node.log() and len(set(done()[-3:])) == 1

    before = len(done())
    await eventually(lambda: len(done()) >= before + 3 and len(set(done()[-3:])) > 1)
    await eventually(asked_and_standing_still, 20, every=0.2)
    stood_at = done()[-1]
    await eventually(lambda: "jobs go on" in node.log() and done()[-1] > stood_at)
