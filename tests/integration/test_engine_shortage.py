"""A model for which there is not enough memory: the engine says so, gives back what it kept, and goes on."""

from __future__ import annotations

import io
import re
import threading
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import pytest
import pytest_asyncio
import tensorflow as tf

from node.engine.array_runtimes import TensorFlow
from node.engine.process import Engine
from node.engine.tasks import Tasks
from node.engine.watch import Limits
from potluck.errors import EngineFailed, InvalidModel, OutOfMemory
from potluck.wire.tensors import from_numpy
from support.digits import mlp, split
from support.engine_lab import Lab, engine_lab, prediction, training
from support.models import Files, dense, whole

pytestmark = [pytest.mark.tensorflow, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    async with engine_lab(tmp_path_factory.mktemp("engine")) as lab:
        yield lab


def greedy() -> Any:
    import keras

    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.RepeatVector(2**30),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


async def test_training_says_so_and_the_next_job_trains(lab: Lab) -> None:
    x, y = np.zeros((40, 64), np.float32), np.arange(40) % 3
    data = lab.files.arrays(1, x=x, y=y)
    with pytest.raises(
        OutOfMemory, match=r"this node has not enough memory .*a tensor of shape .* GB.*smaller batch_size"
    ):
        await lab.run(training(lab.files.model(greedy()), data), "greedy")
    found = await lab.run(training(lab.files.model(dense(features=64)), data, samples=64), "modest")
    assert found.samples == 64


async def test_a_prediction_without_enough_memory_says_so(lab: Lab) -> None:
    data = lab.files.arrays(1, x=np.zeros((8, 64), np.float32), y=np.zeros(8, np.int64))
    with pytest.raises(OutOfMemory):
        await lab.run(prediction(lab.files.model(greedy()), whole(data)))


async def test_a_replica_that_has_no_room_is_not_loaded(lab: Lab) -> None:
    ref = lab.files.model(greedy())
    with pytest.raises(OutOfMemory):
        await lab.engine.load_model("greedy", lab.files.paths[ref.sha256])


async def test_a_request_for_which_there_is_no_room_fails_alone(lab: Lab) -> None:
    import keras

    given = keras.Input((None, 1))  # memory grows with the square of the length, as in attention
    square = keras.layers.Dot(axes=2)([given, given])
    model = keras.Model(given, keras.layers.GlobalAveragePooling1D()(keras.layers.Softmax()(square)))
    ref = lab.files.model(model)
    await lab.engine.load_model("square", lab.files.paths[ref.sha256], warm_rows=1)
    short, long = np.zeros((1, 8, 1), np.float32), np.zeros((1, 2**20, 1), np.float32)
    outcomes, _ = await lab.engine.infer("square", [(from_numpy("x", one),) for one in (short, long, short)])
    assert [outcome.error.code if outcome.error else "" for outcome in outcomes] == ["", "out_of_memory", ""]
    assert outcomes[1].error is not None
    assert outcomes[1].error.retryable


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def small(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    """An engine that may take about 300 MiB more than an idle one."""
    limits = Limits(start_seconds=120, silence_seconds=20, memory_bytes=900 * 2**20)
    async with engine_lab(tmp_path_factory.mktemp("small"), limits=limits) as lab:
        yield lab


def with_units(file: bytes, units: int) -> bytes:
    """The model's file with `units` units in its first layer with weights, but without weights for them."""
    found = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(file)) as old, zipfile.ZipFile(found, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == "config.json":
                data = re.sub(rb'"units": \d+', b'"units": %d' % units, data, count=1)
            new.writestr(name, data)
    return found.getvalue()


async def test_a_small_file_does_not_get_gigabytes(small: Lab) -> None:
    """Neither a file that states its size, nor a file whose size cannot be seen."""
    assert small.engine.pid is not None
    process = psutil.Process(small.engine.pid)
    at_rest = process.memory_info().rss
    file = small.files.paths[small.files.model(dense()).sha256].read_bytes()
    huge = small.files.put(with_units(file, 500_000_000))
    with pytest.raises(InvalidModel, match=r"at least 4,000,000,\d+ weights, and its file only"):
        await small.engine.load_model("r1", small.files.paths[huge.sha256])

    blob = small.files.h5(dense())
    with h5py.File(small.files.paths[blob.sha256], "r+") as h5:
        config = h5.attrs["model_config"]
        h5.attrs["model_config"] = re.sub(r'"units": \d+', '"units": 500000000', config, count=1)
    with pytest.raises(OutOfMemory, match="this node has not enough memory"):
        await small.engine.load_model("r2", small.files.paths[blob.sha256])
    assert process.memory_info().rss < at_rest + 400 * 2**20
    # It is the same engine, still.
    signature, _, _ = await small.engine.load_model("r3", small.files.paths[small.files.model(dense()).sha256])
    assert signature.inputs[0].shape == (-1, 8)


async def test_an_engine_that_takes_more_than_it_may_is_ended(tmp_path: Path) -> None:
    limits = Limits(start_seconds=120, silence_seconds=20, memory_bytes=100 * 2**20)
    engine = Engine(tmp_path, threads=1, limits=limits)
    with pytest.raises(
        EngineFailed, match=r"did not start: it needed more than 0\.1 GiB of memory, .*engine_memory_bytes"
    ):
        await engine.start()
    assert isinstance(await engine.wait_dead(), OutOfMemory)


async def test_memory_that_runs_out_in_steps_ahead_harms_nothing_else(tmp_path: Path) -> None:
    """Nobody asked for those steps. The thread goes on with its other work, and the next round does without them."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    files, tasks = Files(tmp_path / "blobs"), Tasks(scratch, TensorFlow(scratch, threads=1).model)
    data = split()
    task = training(
        files.model(mlp()), files.arrays(1, x=data["x_train"], y=data["y_train"]), samples=640, overlap=True
    )
    paths = {sha256: str(path) for sha256, path in files.paths.items()}

    def run() -> Any:
        return tasks.run("job", task, paths, threading.Event(), lambda done, metrics: None)

    run()
    model = tasks._sessions["job"].model
    step, steps = model.train_function, []

    def short(iterator: Any) -> Any:
        steps.append(1)
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor with shape[4096,4096]")

    model.train_function = short
    tasks.train_ahead(lambda: False)
    model.train_function = step
    assert steps == [1]
    assert run().seconds_ahead == 0
