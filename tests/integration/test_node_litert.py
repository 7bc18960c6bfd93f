"""A node on a machine without TensorFlow, such as a Raspberry Pi: it says so, and serves only LiteRT models."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from potluck import extras
from potluck.wire.births import NodeCapacity
from potluck.wire.reports import InferenceFinished, ModelLoaded, ModelLoadFailed, ShardFailed
from potluck.wire.tasks import PredictTask
from potluck.wire.tensors import from_numpy, to_numpy
from potluck.wire.values import DataSlice
from support import models
from support.node_lab import node_lab
from support.processes import engines
from support.python_without import python_without


@pytest.mark.tensorflow
async def test_without_tensorflow(tmp_path: Path) -> None:
    files = models.Files(tmp_path / "files")
    model = models.dense()
    lite = models.converted(models.exported(tmp_path / "dense", model))
    python = await asyncio.to_thread(python_without, tmp_path / "python", ["tensorflow", "keras"])
    async with node_lab(tmp_path) as lab:
        node = await lab.node(fake=False, python=str(python))
        born = await lab.heard(NodeCapacity)
        assert set(born.capacity.runtimes) == {"litert"}

        await lab.load("lite/n1/1", lite, format="tflite")
        loaded = await lab.heard(ModelLoaded, seconds=30)
        assert loaded.signature.inputs[0].shape == (-1, 8)
        x, _ = models.blobs()
        await lab.infer("b1", "lite/n1/1", from_numpy("x", x[:5]))
        finished = await lab.heard(InferenceFinished)
        np.testing.assert_allclose(to_numpy(finished.outcomes[0].outputs[0]), model(x[:5]).numpy(), atol=1e-5)
        [engine] = engines(node.pid).values()
        assert [name for name in ("tensorflow", "keras") if _holds(engine, f"/{name}/")] == []
        assert engine.memory_info().rss < 150e6

        keras_file = lab.blob(files.paths[files.model(model).sha256].read_bytes())
        await lab.load("keras/n1/1", files.paths[keras_file.sha256].read_bytes())
        refused = await lab.heard(ModelLoadFailed)
        assert refused.error.code == "unavailable"
        install = extras.install("engine").removeprefix(sys.executable)  # the node has its own Python
        assert refused.error.message.startswith("this node has no TensorFlow: ")
        assert f"{install} there" in refused.error.message

        task = PredictTask(
            model=keras_file,
            slices=(DataSlice(blob=lab.blob(b"data"), start=0, stop=1),),
            format=models.ARRAYS,
            image=None,
            batch_size=1,
        )
        await lab.lease("p1", "predict", task=task)
        failed = await lab.heard(ShardFailed, seconds=30)
        assert "this node has no TensorFlow" in failed.error.message
        assert await node.stop() == 0


def _holds(process: psutil.Process, part: str) -> bool:
    return any(part in mapped.path for mapped in process.memory_maps())
