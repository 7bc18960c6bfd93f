"""An engine reads frames while it computes: cancellations, pauses, and batches for another runtime."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from node.engine.array_runtimes import BATCHES_LIMIT
from potluck.errors import Cancelled, EngineFailed, Overloaded
from potluck.wire.reports import RequestOutcome
from potluck.wire.tensors import from_numpy, to_numpy
from potluck.wire.values import BlobRef, Tensor
from support import models
from support.engine_lab import Lab, engine_lab, prediction
from support.models import blobs, dense, whole

pytestmark = [pytest.mark.tensorflow, pytest.mark.asyncio(loop_scope="module")]

LONG_SECONDS = 2.0
"""The least time of a long batch."""
WAIT_SECONDS = 60


class Slow:
    """A replica that takes its time for each item of a sequence."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self._steps = 20_000

    async def load(self) -> None:
        import keras

        model = keras.Sequential([keras.Input((None, 1)), keras.layers.GRU(2, reset_after=False)])
        await load(self.lab, "slow", model)
        while (took := await self._takes(self._steps)) < LONG_SECONDS:
            self._steps = int(self._steps * min(10, 1.5 * LONG_SECONDS / took))

    def long(self) -> asyncio.Task[Any]:
        """A batch that takes some seconds."""
        return asyncio.create_task(self._infer(self._steps), name="long batch")

    async def _takes(self, steps: int) -> float:
        began = time.monotonic()
        await self._infer(steps)
        return time.monotonic() - began

    async def _infer(self, steps: int) -> RequestOutcome:
        [outcome], _ = await self.lab.engine.infer("slow", [(from_numpy("x", np.zeros((1, steps, 1), np.float32)),)])
        assert outcome.error is None, outcome.error
        return outcome


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    async with engine_lab(tmp_path_factory.mktemp("engine")) as lab:
        await load(lab, "quick", dense())
        yield lab


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def slow(lab: Lab) -> Slow:
    slow = Slow(lab)
    await slow.load()
    return slow


async def load(lab: Lab, replica_id: str, model: Any) -> None:
    await lab.engine.load_model(replica_id, lab.files.paths[lab.files.model(model).sha256])


def request() -> tuple[Tensor, ...]:
    return (from_numpy("x", np.zeros((1, 8), np.float32)),)


def quick(lab: Lab, replica_id: str = "quick", batch_id: str = "") -> asyncio.Task[Any]:
    return asyncio.create_task(lab.engine.infer(replica_id, [request()], batch_id=batch_id), name="quick batch")


async def answered(batch: asyncio.Task[Any]) -> None:
    [outcome], _ = await asyncio.wait_for(batch, WAIT_SECONDS)
    assert outcome.error is None, outcome.error


async def test_a_batch_is_cancelled_while_another_is_computed(lab: Lab, slow: Slow) -> None:
    long = slow.long()
    await asyncio.sleep(0)  # it is sent
    waiting = [quick(lab, batch_id=batch_id) for batch_id in ("a", "b", "c")]
    await asyncio.sleep(0)
    lab.engine.cancel_inference("b")
    with pytest.raises(Cancelled):
        await asyncio.wait_for(waiting[1], WAIT_SECONDS)
    assert not long.done()
    assert not waiting[0].done()
    await asyncio.wait_for(long, WAIT_SECONDS)
    for batch in (waiting[0], waiting[2]):
        await answered(batch)


async def test_tasks_pause_and_go_on_while_a_batch_is_computed(lab: Lab, slow: Slow) -> None:
    x, _ = blobs(10)
    task = prediction(lab.files.model(dense()), whole(lab.files.arrays(1, x=x)))

    def predicting() -> asyncio.Task[Any]:
        running = lab.engine.run_task("job", task, lab.files.paths, lambda done, metrics: None)
        return asyncio.create_task(running, name="prediction")

    async def predicted(running: asyncio.Task[Any]) -> None:
        assert (await asyncio.wait_for(running, WAIT_SECONDS)).count == 10

    await predicted(predicting())  # later runs are quick
    long = slow.long()
    await asyncio.sleep(0)
    lab.engine.pause()
    running = predicting()
    done, _ = await asyncio.wait({running}, timeout=0.5)
    assert not done
    lab.engine.resume()
    await predicted(running)
    lab.engine.pause()
    running = predicting()
    await asyncio.sleep(0)
    await lab.engine.cancel_task()
    with pytest.raises(Cancelled):
        await asyncio.wait_for(running, WAIT_SECONDS)
    lab.engine.resume()
    assert not long.done()
    await asyncio.wait_for(long, WAIT_SECONDS)


async def test_another_runtime_answers_meanwhile(lab: Lab, slow: Slow, tmp_path: Path) -> None:
    model = dense()
    lite = models.converted(models.exported(tmp_path / "dense", model))
    await lab.engine.load_model("lite", lab.files.paths[lab.files.put(lite).sha256], "tflite")
    x, _ = blobs()
    long = slow.long()
    await asyncio.sleep(0)
    behind = quick(lab)
    for _ in range(5):
        [outcome], _ = await asyncio.wait_for(lab.engine.infer("lite", [(from_numpy("x", x[:5]),)]), WAIT_SECONDS)
        np.testing.assert_allclose(to_numpy(outcome.outputs[0]), model(x[:5]).numpy(), atol=1e-5)
    assert not behind.done()
    assert not long.done()
    await asyncio.wait_for(long, WAIT_SECONDS)
    await answered(behind)


async def test_a_batch_that_raises_fails_alone(lab: Lab, slow: Slow, tmp_path: Path) -> None:
    long = slow.long()
    await asyncio.sleep(0)
    ref = BlobRef(sha256="1" * 64, size=32)
    missing = (Tensor(name="x", datatype="FP32", shape=(1, 8), data=ref),)
    raising = asyncio.create_task(lab.engine.infer("quick", [missing], {ref.sha256: tmp_path / "nothing"}))
    await asyncio.sleep(0)
    behind = quick(lab)
    await asyncio.wait_for(long, WAIT_SECONDS)
    with pytest.raises(EngineFailed, match="could not read or write a file"):
        await asyncio.wait_for(raising, WAIT_SECONDS)
    await answered(behind)
    await answered(quick(lab))


async def test_no_more_batches_wait_than_the_limit(lab: Lab, slow: Slow) -> None:
    long = slow.long()
    await asyncio.sleep(0)
    waiting = [quick(lab) for _ in range(BATCHES_LIMIT)]
    await asyncio.sleep(0)
    one_more = quick(lab)
    with pytest.raises(Overloaded, match=f"{BATCHES_LIMIT} batches wait for this engine"):
        await asyncio.wait_for(one_more, WAIT_SECONDS)
    assert not long.done()
    await asyncio.wait_for(long, WAIT_SECONDS)
    for batch in waiting:
        await answered(batch)
