"""Options of training in a real engine: steps ahead, class weights, schedules; each against Keras itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from msgspec.structs import replace

from potluck.errors import InvalidRequest
from support.engine_lab import Lab, engine_lab, training
from support.models import ARRAYS, blobs

pytestmark = [pytest.mark.tensorflow, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    async with engine_lab(tmp_path_factory.mktemp("engine")) as lab:
        yield lab


def softmax(optimizer: Any, loss: str = "sparse_categorical_crossentropy") -> Any:
    import keras

    keras.utils.set_random_seed(5)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3, activation="softmax")])
    model.compile(optimizer=optimizer, loss=loss)
    return model


async def test_steps_ahead_count_for_the_next_round_and_nothing_is_lost(lab: Lab) -> None:
    """One node alone, whose weights come back as they went: then being ahead changes nothing."""
    x, y = blobs(256)
    blob, data = lab.files.model(softmax("adam")), lab.files.arrays(2, x=x, y=y)
    task = training(blob, data, samples=32 * 50)
    plain = await lab.run(task, "plain")
    plain = await lab.run(replace(task, weights=lab.after(plain), round=1), "plain")
    first = await lab.run(replace(task, overlap=True), "ahead")
    await asyncio.sleep(0.5)  # time in which it may train ahead
    second = await lab.run(replace(task, weights=lab.after(first), round=1, overlap=True), "ahead")
    assert first.seconds_ahead == 0
    assert second.seconds_ahead > 0
    assert second.samples == plain.samples == 32 * 50
    assert second.steps == 50
    assert second.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=1e-3)
    for ours, theirs in zip(lab.weights(second), lab.weights(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


async def test_what_was_trained_ahead_is_added_to_the_next_weights(lab: Lab) -> None:
    x, y = blobs(256)
    blob, data = lab.files.model(softmax("sgd")), lab.files.arrays(1, x=x, y=y)
    task = training(blob, data, samples=32 * 50, overlap=True)
    first = await lab.run(task, "added")
    await asyncio.sleep(0.5)
    moved = {f"w{number:05}": array + 100 for number, array in enumerate(lab.weights(first))}
    from safetensors.numpy import save

    again = replace(task, weights=lab.files.put(save(moved)), round=1, samples=1, overlap=False)
    second = await lab.run(again, "added")
    assert second.seconds_ahead > 0
    assert second.steps == 10  # a fifth of the round
    for ours, sent in zip(lab.weights(second), moved.values(), strict=True):
        assert 0 < np.abs(ours - sent).max() < 1  # the steps ahead, from weights without the hundred


async def test_other_work_comes_before_what_is_ahead(lab: Lab) -> None:
    x, y = blobs(256)
    blob, data = lab.files.model(softmax("adam")), lab.files.arrays(1, x=x, y=y)
    await lab.run(training(blob, data, samples=32 * 20_000, seconds=0.5, overlap=True), "long")
    other = await lab.run(training(blob, data, samples=32), "other")
    assert other.steps == 1


@pytest.mark.parametrize("loss", ["sparse_categorical_crossentropy", "categorical_crossentropy"])
async def test_class_weights_are_those_of_keras(lab: Lab, loss: str) -> None:
    import keras

    x, y = blobs(64)
    model = softmax(keras.optimizers.SGD(0.1), loss)
    task = training(
        lab.files.model(model), lab.files.arrays(1, x=x, y=y), samples=64 * 5, batch_size=64,
        format=replace(ARRAYS, classes=("a", "b", "c")), class_weight={"a": 5.0, "c": 0.25},
    )  # fmt: skip
    result = await lab.run(task, f"weighted {loss}")
    target = y if loss.startswith("sparse") else keras.utils.to_categorical(y, 3)
    model.fit(x, target, batch_size=64, epochs=5, shuffle=False, verbose=0, class_weight={0: 5.0, 1: 1.0, 2: 0.25})
    for ours, theirs in zip(lab.weights(result), model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


async def test_class_weights_that_fit_nothing_are_refused(lab: Lab) -> None:
    import keras

    x, y = blobs(64)
    data = lab.files.arrays(1, x=x, y=y)
    task = training(lab.files.model(softmax("sgd")), data, samples=64, class_weight={"7": 2.0})
    with pytest.raises(InvalidRequest, match="class_weight names 7, but the classes are 0, 1, 2"):
        await lab.run(task, "unknown")
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(InvalidRequest, match="no classes"):
        await lab.run(training(lab.files.model(model), data, samples=64, class_weight={"0": 2.0}), "regression")


async def test_a_schedule_follows_the_samples_of_the_whole_cluster(lab: Lab) -> None:
    """With a rate that falls to nothing after the third step, a node that begins there learns nothing."""
    import keras

    x, y = blobs(64)
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([3], [0.5, 0.0])
    task = training(
        lab.files.model(softmax(keras.optimizers.SGD(schedule))),
        lab.files.arrays(1, x=x, y=y),
        samples=64,
        batch_size=16,
    )
    at_once = await lab.run(task, "early")
    assert at_once.norm > 0.01
    late = await lab.run(replace(task, weights=lab.after(at_once), round=1, seen=16 * 4), "early")
    assert late.norm == 0
