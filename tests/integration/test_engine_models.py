"""Many Keras models: each kind of layer, precision and optimizer trains for rounds, and its updates lead to its weights."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from msgspec.structs import replace

from potluck.weights import files as weights
from potluck.wire.tasks import ExportTask
from support.engine_lab import Lab, engine_lab, evaluation, prediction, training
from support.models import whole

pytestmark = [pytest.mark.tensorflow, pytest.mark.asyncio(loop_scope="module")]

ROWS = 128
Made = tuple[Any, dict[str, np.ndarray[Any, Any]]]
"""A compiled model, and arrays by input name, with the target `y`."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    async with engine_lab(tmp_path_factory.mktemp("engine")) as lab:
        yield lab


def numbers(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).normal(size=(ROWS, *shape)).astype(np.float32)


def classes(count: int) -> np.ndarray[Any, Any]:
    return (numbers(1)[:, 0] * 100).astype(np.int64) % count


def normalised() -> Made:
    import keras

    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(16), keras.layers.BatchNormalization(),
                              keras.layers.Dropout(0.3), keras.layers.LayerNormalization(), keras.layers.Dense(3)])  # fmt: skip
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model, {"x": numbers(6), "y": classes(3)}


def words() -> Made:
    import keras

    model = keras.Sequential([keras.Input((12,), dtype="int32"), keras.layers.Embedding(50, 8),
                              keras.layers.GRU(8), keras.layers.Dense(1, activation="sigmoid")])  # fmt: skip
    model.compile(keras.optimizers.AdamW(0.01, clipnorm=1.0), "binary_crossentropy")
    x = np.abs(numbers(12) * 20).astype(np.int32) % 50
    return model, {"x": x, "y": (x[:, 0] > 25).astype(np.int64)}


def attention() -> Made:
    import keras

    inputs = keras.Input((10, 8))
    mixed = keras.layers.MultiHeadAttention(2, 4)(inputs, inputs)
    output = keras.layers.Dense(1)(keras.layers.GlobalAveragePooling1D()(keras.layers.Add()([inputs, mixed])))
    model = keras.Model(inputs, output)
    model.compile(keras.optimizers.RMSprop(0.005), "mse")
    x = numbers(10, 8)
    return model, {"x": x, "y": x.mean(axis=(1, 2))}


def two_inputs() -> Made:
    import keras

    left, right = keras.Input((4,), name="left"), keras.Input((3,), name="right")
    model = keras.Model([left, right], keras.layers.Dense(2)(keras.layers.Concatenate()([left, right])))
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mae")
    return model, {"left": numbers(4), "right": numbers(3), "y": numbers(2)}


def half_precision(policy: str) -> Callable[[], Made]:
    def make() -> Made:
        import keras

        layers = keras.layers
        model = keras.Sequential([keras.Input((8, 8, 1)), layers.Conv2D(8, 3, activation="relu", dtype=policy),
                                  layers.BatchNormalization(dtype=policy), layers.Flatten(),
                                  layers.Dense(4, activation="softmax", dtype="float32")])  # fmt: skip
        optimizer: Any = keras.optimizers.Adam(0.01)
        if policy == "mixed_float16":
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        model.compile(optimizer, "sparse_categorical_crossentropy")
        return model, {"x": numbers(8, 8, 1), "y": classes(4)}

    return make


def application() -> Made:
    import keras

    model = keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=3)
    model.compile("adam", "sparse_categorical_crossentropy")
    return model, {"x": numbers(32, 32, 3), "y": classes(3)}


MODELS: dict[str, Callable[[], Made]] = {
    "normalised": normalised,
    "words": words,
    "attention": attention,
    "two inputs": two_inputs,
    "mixed_float16": half_precision("mixed_float16"),
    "mixed_bfloat16": half_precision("mixed_bfloat16"),
    "bfloat16": half_precision("bfloat16"),
    "keras.applications": application,
}


@pytest.mark.parametrize("names", [("after", "before"), (None, None)])
async def test_a_map_of_inputs_goes_by_its_keys_as_in_keras(lab: Lab, names: tuple[str | None, str | None]) -> None:
    """Names of input layers do not count: they may differ from the keys, or be the same keys in another order."""
    import keras

    keras.utils.set_random_seed(0)
    one, two = keras.Input((2,), name=names[0]), keras.Input((2,), name=names[1])
    both = keras.layers.Concatenate()([one, two])
    # Keras only warns of it.
    with pytest.warns(UserWarning, match="all keys in the dict must match"):
        model = keras.Model({"before": one, "after": two}, keras.layers.Dense(1)(both))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    arrays = {"before": numbers(2), "after": numbers(2)[::-1] * 2}
    y = arrays["before"].sum(axis=1, keepdims=True)
    expected = model.predict(arrays, verbose=0)
    blob, shards = lab.files.model(model), lab.files.arrays(1, **arrays, y=y)
    data_format = replace(training(None, ()).format, inputs=("before", "after"), target="y")
    found = await lab.run(replace(prediction(blob, whole(shards)), format=replace(data_format, target="")), "map")
    np.testing.assert_allclose(np.frombuffer(found.outputs[0].data, np.float32), expected[:, 0], rtol=1e-5)
    result = await lab.run(replace(training(blob, shards, samples=ROWS, batch_size=ROWS), format=data_format), "map")
    model.train_on_batch(arrays, y)
    for ours, theirs in zip(lab.weights(result), model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
async def test_rounds_of_any_model(lab: Lab, kind: str) -> None:
    model, arrays = MODELS[kind]()
    data_format = replace(training(None, ()).format, inputs=tuple(name for name in arrays if name != "y"), target="y")
    blob, data = lab.files.model(model), lab.files.arrays(2, **arrays)
    task = training(blob, data, samples=ROWS * 3, format=data_format, compression="auto", overlap=True)
    result, losses = await lab.run(task, kind), []
    for number in range(1, 6):
        losses.append(result.metrics["loss"])
        after = lab.after(result)
        result = await lab.run(replace(task, weights=after, round=number), kind)
        assert result.base.sha256 == after.sha256
    assert np.isfinite(losses).all()
    assert result.metrics["loss"] < losses[0]
    last = lab.after(result)
    names = list(dict(weights.load(lab.files.paths[last.sha256])))
    assert [name[0] for name in names] == ["w" if weight.trainable else "s" for weight in model.weights]
    scored = await lab.run(evaluation(blob, whole(data), weights=last, format=data_format), kind)
    assert scored.count == ROWS
    exported = await lab.run(ExportTask(model=blob, weights=last), kind)
    assert exported.signature.inputs
    await lab.engine.forget_job(kind)
