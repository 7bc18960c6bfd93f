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
from potluck.weights.files import Reader
from potluck.wire.tasks import ExportTask
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
    """With one node, its own weights come back, so steps ahead change nothing."""
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


async def test_steps_ahead_are_added_to_the_next_weights(lab: Lab) -> None:
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


async def test_other_work_comes_before_steps_ahead(lab: Lab) -> None:
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


async def test_class_weights_that_do_not_fit_are_refused(lab: Lab) -> None:
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
    """If the rate falls to 0 after the third step, a node that begins there learns nothing."""
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
    assert lab.norm(at_once) > 0.01
    late = await lab.run(replace(task, weights=lab.after(at_once), round=1, seen=16 * 4), "early")
    assert lab.norm(late) == 0


def transfer() -> Any:
    """A frozen body with all kinds of state, and a head to train."""
    import keras

    keras.utils.set_random_seed(5)
    normalise = keras.layers.Normalization()
    normalise.adapt(blobs(64)[0])
    body = keras.Sequential(
        [keras.Input((8,)), normalise, keras.layers.Dense(1024, activation="relu"), keras.layers.BatchNormalization()]
    )
    body.trainable = False
    model = keras.Sequential([body, keras.layers.Dense(3, activation="softmax")])
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


async def test_frozen_weights_neither_travel_nor_change(lab: Lab) -> None:
    x, y = blobs(256)
    model = transfer()
    task = training(lab.files.model(model), lab.files.arrays(1, x=x, y=y), samples=320, compression="auto")
    first = await lab.run(task, "frozen")
    second = await lab.run(replace(task, weights=lab.after(first), round=1), "frozen")
    for result in (first, second):
        with Reader(lab.scratch / result.update.sha256) as update:
            assert {name.partition(".")[0] for name in update.specs} == {"w00009", "w00010"}
        assert result.update.size < 20_000
        assert result.trained_bytes == 4 * (1024 * 3 + 3)
    before, after = model.get_weights(), lab.weights(second)
    assert all(ours.tobytes() == theirs.tobytes() for ours, theirs in zip(after[:9], before[:9], strict=True))
    assert np.abs(after[9] - before[9]).max() > 1e-3
    # Another job may begin at its checkpoint, and train all layers.
    for layer in model.layers[0].layers:
        layer.trainable = True
    model.layers[0].trainable = True
    model.compile("adam", "sparse_categorical_crossentropy")
    again = replace(task, model=lab.files.model(model), weights=lab.after(second))
    tuned = lab.weights(await lab.run(again, "thawed"))
    assert [bool(np.abs(a - b).max()) for a, b in zip(tuned, after, strict=True)] == [False] * 3 + [True] * 8


async def test_statistics_are_averaged_and_other_state_comes_from_one_node(lab: Lab) -> None:
    import keras

    keras.utils.set_random_seed(5)
    x, y = blobs(256)
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.BatchNormalization(),
            keras.layers.SpectralNormalization(keras.layers.Dense(3, activation="softmax")),
        ]
    )
    model.compile("sgd", "sparse_categorical_crossentropy")
    result = await lab.run(training(lab.files.model(model), lab.files.arrays(1, x=x, y=y), samples=64), "state")
    with Reader(lab.scratch / result.update.sha256) as update:
        told = [name.partition(".")[2] for name in sorted(update.specs, key=lambda name: name[1:])]
        names = [weight.name for weight in model.weights]
    assert dict(zip(names, told, strict=True)) == {
        "gamma": "", "beta": "", "moving_mean": "mean", "moving_variance": "mean", "kernel": "", "bias": "", "vector_u": "value",
    }  # fmt: skip


async def test_constraints_hold_again_after_an_outer_step(lab: Lab) -> None:
    """An outer step may break them, by its momentum or by rounding."""
    import keras
    from safetensors.numpy import save

    x, y = blobs(64)
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(16, kernel_constraint=keras.constraints.NonNeg()),
            keras.layers.Dense(16, kernel_constraint=keras.constraints.UnitNorm()),
            keras.layers.Dense(3, kernel_constraint=keras.constraints.MaxNorm(0.5), activation="softmax"),
        ]
    )
    model.compile(keras.optimizers.SGD(0.0), "sparse_categorical_crossentropy")
    random = np.random.default_rng(0)
    outside = [random.normal(size=value.shape).astype(np.float32) for value in model.get_weights()]
    stepped = lab.files.put(save({f"w{number:05}": value for number, value in enumerate(outside)}))
    blob, data = lab.files.model(model), lab.files.arrays(1, x=x, y=y)

    def holds(kernels: list[Any]) -> None:
        assert kernels[0].min() >= 0
        np.testing.assert_allclose(np.linalg.norm(kernels[1], axis=0), 1, rtol=1e-5)
        assert np.linalg.norm(kernels[2], axis=0).max() <= 0.5 + 1e-6
        assert kernels[0].max() == outside[0].max()  # nothing else changes

    trained = await lab.run(training(blob, data, weights=stepped, samples=32), "constrained")
    holds(lab.weights(trained)[::2])
    exported = await lab.run(ExportTask(model=blob, weights=stepped), "constrained")
    (lab.scratch / exported.model.sha256).rename(lab.scratch / "exported.keras")
    holds(keras.saving.load_model(lab.scratch / "exported.keras").get_weights()[::2])
