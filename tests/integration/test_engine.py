"""The engine with real TensorFlow: training, evaluation, prediction, export."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from msgspec.structs import replace
from safetensors.numpy import save

from potluck.errors import Cancelled, InvalidModel, InvalidRequest
from potluck.wire.tasks import EvaluateResult, ExportResult, ExportTask, PredictResult, TrainResult
from potluck.wire.tensors import to_numpy
from potluck.wire.values import DataFormat, ImageOptions
from support.engine_lab import IMAGES, Lab, engine_lab, evaluation, pictures, prediction, training
from support.models import Files, blobs, dense, whole

pytestmark = [pytest.mark.tensorflow, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    async with engine_lab(tmp_path_factory.mktemp("engine")) as lab:
        yield lab


# --- training ---------------------------------------------------------------------------------------------------------


async def test_rounds_learn_and_keep_their_optimizer(lab: Lab) -> None:
    x, y = blobs()
    model, data = dense(), lab.files.arrays(3, x=x, y=y)
    first = await lab.run(training(lab.files.model(model), data), "learn")
    assert isinstance(first, TrainResult)
    assert first.samples == 608  # 19 batches of 32: whole batches until the 600 are seen
    assert first.steps == 19
    assert set(first.metrics) == {"loss", "accuracy"}
    assert lab.progress[0][0] == 32  # told at the first step
    before, losses = lab.weights(first), [first.metrics["loss"]]
    assert [array.shape for array in before] == [tuple(weight.shape) for weight in model.weights]
    blob = lab.after(first)
    for number in range(1, 4):
        result = await lab.run(training(lab.files.model(model), data, weights=blob, round=number), "learn")
        blob = lab.after(result)
        losses.append(result.metrics["loss"])
    assert losses[-1] < losses[0] / 2
    assert losses == sorted(losses, reverse=True)


async def test_the_same_seed_gives_the_same_weights_as_keras_would(lab: Lab) -> None:
    """One batch of all the data, plain SGD, no dropout: a round is then as many steps of `fit`."""
    import keras

    x, y = blobs(64)
    keras.utils.set_random_seed(5)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3, activation="softmax")])
    model.compile(optimizer=keras.optimizers.SGD(0.1, momentum=0.9), loss="sparse_categorical_crossentropy")
    task = training(lab.files.model(model), lab.files.arrays(1, x=x, y=y), samples=64 * 5, batch_size=500)
    first = await lab.run(task, "same")
    assert (first.samples, first.steps) == (320, 5)
    second = await lab.run(replace(task, weights=lab.after(first), round=1), "same")
    model.fit(x, y, batch_size=64, epochs=10, shuffle=False, verbose=0)
    for ours, theirs in zip(lab.weights(second), model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


async def test_training_begins_at_the_given_weights(lab: Lab) -> None:
    x, y = blobs(64)
    model = dense(optimizer="sgd")
    zeros = {f"w{i:05}": np.zeros(weight.shape, np.float32) for i, weight in enumerate(model.weights)}
    task = training(
        lab.files.model(model), lab.files.arrays(1, x=x, y=y), weights=lab.files.put(save(zeros)), samples=1
    )
    result = await lab.run(task, "given")
    assert result.steps == 1
    assert result.metrics["loss"] == pytest.approx(np.log(3), abs=1e-5)
    assert max(np.abs(array).max() for array in lab.weights(result)) < 0.1


async def test_weights_that_are_numbers_stay_numbers(lab: Lab) -> None:
    import keras

    x, y = blobs(64)
    scaling = keras.layers.Normalization()
    scaling.adapt(x)
    model = keras.Sequential([keras.Input((8,)), scaling, keras.layers.Dense(3, activation="softmax")])
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy")
    task = training(lab.files.model(model), lab.files.arrays(1, x=x, y=y), samples=64)
    first = await lab.run(task, "numbers")
    assert [array.shape for array in lab.weights(first)] == [tuple(weight.shape) for weight in model.weights]
    assert (await lab.run(replace(task, weights=lab.after(first), round=1), "numbers")).steps == 2


async def test_a_round_ends_by_the_clock(lab: Lab) -> None:
    x, y = blobs()
    task = training(lab.files.model(dense()), lab.files.arrays(1, x=x, y=y), samples=10**9, seconds=0.3)
    result = await lab.run(task, "clock")
    assert 0.3 <= result.seconds < 1.0
    assert result.samples == result.steps * 32 > 32


async def test_a_task_is_cancelled_at_its_next_step(lab: Lab) -> None:
    x, y = blobs()
    task = training(lab.files.model(dense()), lab.files.arrays(1, x=x, y=y), samples=10**9, seconds=100)
    started = asyncio.Event()
    running = asyncio.create_task(
        lab.engine.run_task("cancel", task, lab.files.paths, lambda done, metrics: started.set()), name="running"
    )
    await asyncio.wait_for(started.wait(), 60)
    await lab.engine.cancel_task()
    with pytest.raises(Cancelled):
        await asyncio.wait_for(running, 10)
    assert isinstance(await lab.run(replace(task, samples=32), "cancel"), TrainResult)  # and goes on with the next


async def test_a_loss_that_is_not_finite_ends_the_round(lab: Lab) -> None:
    x, y = blobs()
    model = dense(units=1, activation="linear", loss="mse", optimizer=_sgd(1e30))
    with pytest.raises(InvalidModel, match=r"the loss became (nan|inf) at step \d+.*lower the learning rate"):
        await lab.run(training(lab.files.model(model), lab.files.arrays(1, x=x, y=y), samples=10**6), "nan")


async def test_several_inputs_by_name(lab: Lab) -> None:
    import keras

    x, y = blobs()
    left, right = keras.Input((3,), name="left"), keras.Input((5,), name="right")
    joined = keras.layers.Concatenate()([right, left])
    data = lab.files.arrays(2, right=x[:, :5], left=x[:, 5:], y=y)
    form = DataFormat(kind="arrays", inputs=("right", "left"), target="y")
    for inputs in ([left, right], {"right": right, "left": left}):
        model = keras.Model(inputs, keras.layers.Dense(3, activation="softmax")(joined))
        model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
        blob = lab.files.model(model)
        result = await lab.run(training(blob, data, format=form), f"inputs {type(inputs)}")
        assert result.steps == 19
        predicted = await lab.run(prediction(blob, whole(data), format=form))
        given = {"left": x[:, 5:], "right": x[:, :5]}
        expected = model.predict(given if isinstance(inputs, dict) else [given["left"], given["right"]], verbose=0)
        np.testing.assert_allclose(to_numpy(predicted.outputs[0]), expected, atol=1e-6)
    renamed = lab.files.arrays(1, a=x[:, :5], b=x[:, 5:], y=y)
    with pytest.raises(InvalidRequest, match="left, right, the data's a, b"):
        await lab.run(training(blob, renamed, format=replace(form, inputs=("a", "b"))), "renamed")


# --- evaluation and prediction ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("units", "activation", "loss", "metrics"),
    [
        (3, "softmax", "sparse_categorical_crossentropy", ["accuracy"]),
        (3, "softmax", "categorical_crossentropy", ["accuracy", "mae"]),
        (1, "sigmoid", "binary_crossentropy", ["accuracy"]),
        (1, "linear", "mse", ["mae"]),
    ],
)
async def test_slices_merge_into_what_keras_evaluates(
    lab: Lab, units: int, activation: str, loss: str, metrics: list[str]
) -> None:
    x, y = blobs(250)
    if units == 1:
        y = (y > 0).astype(np.int64) if "binary" in loss else (y * 1.7 - 0.3).astype(np.float32)
    model = dense(units=units, activation=activation, loss=loss, metrics=metrics, penalty=0.01)
    shown = np.eye(3, dtype=np.float32)[y] if loss.startswith("categorical") else y
    expected = model.evaluate(x, shown.reshape(len(y), -1), batch_size=16, return_dict=True, verbose=0)
    blob, shards = lab.files.model(model), lab.files.arrays(2, x=x, y=y)
    all_items = await lab.run(evaluation(blob, whole(shards)))
    assert isinstance(all_items, EvaluateResult)
    cuts = [whole(shards)[0], replace(whole(shards)[1], stop=70), replace(whole(shards)[1], start=70)]
    parts = [
        await lab.run(evaluation(blob, (cut,), batch_size=size)) for cut, size in zip(cuts, (32, 7, 50), strict=True)
    ]
    assert sum(part.count for part in parts) == all_items.count == 250
    for name, value in expected.items():
        assert all_items.sums[name] / 250 == pytest.approx(value, abs=1e-6)
        assert sum(part.sums[name] for part in parts) / 250 == pytest.approx(value, abs=1e-6)
    if loss == "mse":
        assert all_items.confusion == ()
        return
    table = sum(np.array(part.confusion) for part in parts)
    assert np.array_equal(table, all_items.confusion)
    assert np.array_equal(table.sum(axis=1), np.bincount(y))
    assert np.trace(table) / 250 == pytest.approx(expected["accuracy"], abs=1e-6)


async def test_a_loss_that_is_a_sum_is_counted_per_item(lab: Lab) -> None:
    import keras

    x, y = blobs(100)
    model = dense(loss=keras.losses.SparseCategoricalCrossentropy(reduction="sum"), penalty=0.01)
    expected = model.evaluate(x, y, batch_size=1, return_dict=True, verbose=0)["loss"]
    blob, shards = lab.files.model(model), lab.files.arrays(1, x=x, y=y)
    for size in (100, 7):
        result = await lab.run(evaluation(blob, whole(shards), batch_size=size))
        assert result.sums["loss"] / 100 == pytest.approx(expected, abs=1e-5)


async def test_sequences_have_metrics_but_no_confusion_matrix(lab: Lab) -> None:
    import keras

    tokens = np.random.default_rng(0).integers(0, 5, (40, 6))
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Embedding(5, 4), keras.layers.Dense(5, activation="softmax")]
    )
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    expected = model.evaluate(tokens, tokens, return_dict=True, verbose=0)
    result = await lab.run(evaluation(lab.files.model(model), whole(lab.files.arrays(1, x=tokens, y=tokens))))
    assert result.confusion == ()
    assert {name: value / 40 for name, value in result.sums.items()} == pytest.approx(expected, abs=1e-6)


async def test_a_model_is_evaluated_with_other_weights_and_then_with_its_own_again(lab: Lab) -> None:
    x, y = blobs(50)
    model = dense()
    zeros = {f"w{i:05}": np.zeros(weight.shape, np.float32) for i, weight in enumerate(model.weights)}
    blob, slices = lab.files.model(model), whole(lab.files.arrays(1, x=x, y=y))
    own = await lab.run(evaluation(blob, slices))
    other = await lab.run(evaluation(blob, slices, weights=lab.files.put(save(zeros))))
    again = await lab.run(evaluation(blob, slices))
    assert own.sums == again.sums
    assert other.sums["loss"] / 50 == pytest.approx(np.log(3), abs=1e-5)


async def test_predictions_are_those_of_keras_in_the_order_of_the_slices(lab: Lab) -> None:
    x, y = blobs(100)
    model = dense(compiled=False)
    first, second = whole(lab.files.arrays(2, x=x, y=y))
    slices = (replace(second, start=10, stop=33), first)
    result = await lab.run(prediction(lab.files.model(model), slices, batch_size=16))
    assert isinstance(result, PredictResult)
    assert result.count == 73
    expected = model.predict(np.concatenate([x[60:83], x[:50]]), verbose=0)
    np.testing.assert_allclose(to_numpy(result.outputs[0]), expected, atol=1e-6)


async def test_an_export_is_the_model_with_other_weights(lab: Lab) -> None:
    import keras

    model = dense()
    ones = {f"w{i:05}": np.full(weight.shape, 0.5, np.float32) for i, weight in enumerate(model.weights)}
    result = await lab.run(ExportTask(model=lab.files.model(model), weights=lab.files.put(save(ones))))
    assert isinstance(result, ExportResult)
    assert [spec.shape for spec in result.signature.inputs] == [(-1, 8)]
    target = lab.files.folder / "exported.keras"
    target.write_bytes((lab.scratch / result.model.sha256).read_bytes())
    # Its settings are there, but no state is.
    with pytest.warns(UserWarning, match="Skipping variable loading for optimizer"):
        exported = keras.saving.load_model(target)
    assert exported.compiled
    assert type(exported.optimizer) is type(model.optimizer)
    assert result.model.size < 2 * sum(weight.nbytes for weight in model.get_weights()) + 65_536
    assert all((value == 0.5).all() for value in exported.get_weights())


# --- images -----------------------------------------------------------------------------------------------------------


async def test_images_are_decoded_resized_and_scaled(lab: Lab) -> None:
    import keras
    import tensorflow as tf

    items = pictures(9)
    shard = lab.files.images(items)
    model = keras.Sequential([keras.Input((6, 8, 3)), keras.layers.Flatten()])
    result = await lab.run(prediction(lab.files.model(model), whole([shard]), format=IMAGES, batch_size=4))
    expected = [
        tf.image.resize(tf.io.decode_png(data, channels=3), (6, 8)).numpy().reshape(-1) / 255.0 for data, _ in items
    ]
    np.testing.assert_allclose(to_numpy(result.outputs[0]), expected, atol=1e-6)
    grey = keras.Sequential([keras.Input((None, None, 1)), keras.layers.GlobalAveragePooling2D()])
    options = ImageOptions(height=5, width=5, channels=1, scale=1.0)
    result = await lab.run(prediction(lab.files.model(grey), whole([shard]), format=IMAGES, image=options))
    assert to_numpy(result.outputs[0]).shape == (9, 1)
    assert to_numpy(result.outputs[0]).max() > 100


@pytest.mark.parametrize(("units", "loss"), [(2, "categorical_crossentropy"), (1, "binary_crossentropy")])
async def test_images_train_and_evaluate(lab: Lab, units: int, loss: str) -> None:
    import keras

    keras.utils.set_random_seed(1)
    layers = [keras.layers.Flatten(), keras.layers.Dense(units, activation="softmax" if units > 1 else "sigmoid")]
    model = keras.Sequential([keras.Input((6, 6, 3)), *layers])
    model.compile(optimizer=keras.optimizers.Adam(0.01), loss=loss, metrics=["accuracy"])
    blob, shard = lab.files.model(model), lab.files.images(pictures(60))
    task = training(blob, (shard,), format=IMAGES, batch_size=16, samples=1600)
    result = await lab.run(task, loss)
    scored = await lab.run(evaluation(blob, whole([shard]), weights=lab.after(result), format=IMAGES))
    assert np.trace(np.array(scored.confusion)) >= 57
    assert np.array(scored.confusion).sum(axis=1).tolist() == [30, 30]


async def test_images_that_do_not_fit_into_memory_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, where the limit can be lowered."""
    import keras

    from node.engine import training as engine_training
    from node.engine.shards import ShardPart

    monkeypatch.setattr(engine_training, "MEMORY_LIMIT_BYTES", 0)
    files = Files(tmp_path)
    shards = (files.images(pictures(30)), files.images(pictures(34)))
    layers = [keras.layers.Flatten(), keras.layers.Dense(2, activation="softmax")]
    model = keras.Sequential([keras.Input((6, 6, 3)), *layers])
    model.compile(optimizer=keras.optimizers.Adam(0.01), loss="categorical_crossentropy", metrics=["accuracy"])
    session = engine_training.TrainingSession(model, seed=0)
    task = training(shards[0].blob, shards, format=IMAGES, batch_size=16)
    session.use_data(task, [ShardPart(files.paths[shard.blob.sha256], 0, shard.count) for shard in shards])
    outcomes = [session.train(640, 60, threading.Event(), lambda done, metrics: None) for _ in range(3)]
    assert [outcome.samples for outcome in outcomes] == [640] * 3
    assert outcomes[-1].metrics["accuracy"] > 0.9


def _sgd(rate: float) -> Any:
    import keras

    return keras.optimizers.SGD(rate)
