"""A model for which there is not enough memory: the engine says so, gives back what it kept, and goes on."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from potluck.errors import OutOfMemory
from potluck.tensors import from_numpy
from support.engine_lab import Lab, engine_lab, prediction, training
from support.models import dense, whole

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
    for _ in range(2):
        with pytest.raises(
            OutOfMemory, match=r"this node has not enough memory .*a tensor of shape .* GB.*smaller batch_size"
        ):
            await lab.run(training(lab.files.model(greedy()), data), "greedy")
    found = await lab.run(training(lab.files.model(dense(features=64)), data, samples=64), "modest")
    assert found.samples == 64


async def test_so_does_a_prediction(lab: Lab) -> None:
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
