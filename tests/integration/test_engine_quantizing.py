"""An engine converts models to LiteRT, and scores models without a loss by their outputs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from msgspec.structs import replace

from potluck.errors import InvalidModel, InvalidRequest
from potluck.wire.tasks import ConvertTask
from potluck.wire.tensors import from_numpy, to_numpy
from potluck.wire.values import BlobRef, DataFormat, ImageOptions, ModelFormat
from support import models
from support.engine_lab import IMAGES, Lab, engine_lab, evaluation, pictures, prediction
from support.models import blobs, converted, dense, exported, saved, whole

pytestmark = [pytest.mark.tensorflow, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    async with engine_lab(tmp_path_factory.mktemp("engine")) as lab:
        yield lab


async def quantized(lab: Lab, model: BlobRef, slices: Any, **changes: Any) -> BlobRef:
    task = ConvertTask(model=model, slices=slices, format=models.ARRAYS, image=None)
    ref: BlobRef = (await lab.run(replace(task, **changes))).model
    return lab.files.put((lab.scratch / ref.sha256).read_bytes())


async def test_every_format_is_scored_alike_and_quantized(lab: Lab, tmp_path: Path) -> None:
    x, y = blobs(600)
    model = dense()
    model.fit(x, y, epochs=3, verbose=0)
    slices = whole(lab.files.arrays(2, x=x, y=y))
    keras_file, folder = lab.files.model(model), exported(tmp_path / "m", model)
    expected = await lab.run(evaluation(keras_file, slices))
    right = sum(row[place] for place, row in enumerate(expected.confusion))
    graph, lite = lab.files.saved_model(folder), lab.files.put(converted(folder))
    files: list[tuple[ModelFormat, BlobRef]] = [
        ("keras", keras_file), ("h5", lab.files.h5(model)), ("savedmodel", graph), ("tflite", lite)
    ]  # fmt: skip
    for model_format, ref in files:
        task = evaluation(ref, slices, model_format=model_format, by_outputs=True)
        found = await lab.run(task)
        assert (found.count, found.sums["accuracy"], found.confusion) == (600, right, expected.confusion), model_format
        [output] = (await lab.run(prediction(ref, slices, model_format=model_format))).outputs
        np.testing.assert_allclose(to_numpy(output), model(x).numpy(), atol=1e-5)
    sample = whole(lab.files.arrays(1, x=x[:100], y=y[:100]))
    small = await quantized(lab, graph, sample, model_format="savedmodel")
    found = await lab.run(evaluation(small, slices, model_format="tflite"))
    assert abs(found.sums["accuracy"] - right) <= 12
    signature, *_ = await lab.engine.load_model("small", lab.files.paths[small.sha256], "tflite")
    assert [spec.datatype for spec in (*signature.inputs, *signature.outputs)] == ["FP32", "FP32"]
    large = lab.files.model(dense(units=3, features=8, activation="linear"))
    with pytest.raises(InvalidModel, match=r"not a \.tflite file"):
        await lab.run(evaluation(large, slices, model_format="tflite"))


async def test_images_and_targets_that_are_no_classes(lab: Lab, tmp_path: Path) -> None:
    import keras

    model = keras.Sequential(
        [keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3), keras.layers.Flatten(), keras.layers.Dense(2, activation="softmax")]
    )  # fmt: skip
    size = ImageOptions(height=8, width=8)
    pieces = whole([lab.files.images(pictures(40))])
    lite = lab.files.put(converted(exported(tmp_path / "m", model)))
    task = evaluation(lite, pieces, format=IMAGES, image=size, model_format="tflite")
    assert sum(map(sum, (await lab.run(task)).confusion)) == 40

    x, _ = blobs(100)
    regression = keras.Sequential([keras.Input((8,), name="given"), keras.layers.Dense(1)])
    y = regression(x).numpy()[:, 0] + 0.5
    slices = whole(lab.files.arrays(1, x=x, y=y))
    ref = lab.files.model(regression)
    found = await lab.run(evaluation(ref, slices, by_outputs=True))
    assert found.sums["mae"] / found.count == pytest.approx(0.5, abs=1e-3)
    assert found.confusion == ()


async def test_a_keras_model_without_a_loss_is_scored_by_each_of_its_outputs(lab: Lab) -> None:
    import keras

    given = keras.Input((8,), name="given")
    hidden = keras.layers.Dense(4, activation="relu")(given)
    kind = keras.layers.Dense(3, activation="softmax", name="kind")(hidden)
    model = keras.Model(given, [kind, keras.layers.Dense(1, name="size")(hidden)])
    x, y = blobs(100)
    scores, sizes = (output.numpy() for output in model(x))
    ref = lab.files.model(model)
    slices = whole(lab.files.arrays(1, given=x, kind=y, size=sizes + 0.5))
    data = DataFormat(kind="arrays", inputs=("given",), targets=("kind", "size"))
    found = await lab.run(evaluation(ref, slices, format=data))
    assert found.sums["kind_accuracy"] == (scores.argmax(-1) == y).sum()
    assert found.sums["size_mae"] / found.count == pytest.approx(0.5, abs=1e-5)
    assert set(found.sums) == {"kind_accuracy", "size_mae", "size_mse"}
    assert found.confusion == ()
    with pytest.raises(InvalidRequest, match="give a target for each output"):
        await lab.run(evaluation(ref, slices, format=replace(data, targets=("kind",))))


async def test_several_inputs_are_calibrated_by_name(lab: Lab) -> None:
    import keras

    left, right = keras.Input((2,), name="left"), keras.Input((3,), name="right")
    joined = keras.layers.Concatenate()([keras.layers.Dense(4)(left), 100 * keras.layers.Dense(4)(right)])
    model = keras.Model([right, left], keras.layers.Dense(2, name="out")(joined))
    random = np.random.default_rng(0)
    arrays = {"left": random.normal(size=(60, 2)), "right": random.normal(size=(60, 3))}
    parts = {name: array.astype(np.float32) for name, array in arrays.items()}
    data = DataFormat(kind="arrays", inputs=("left", "right"))
    small = await quantized(lab, lab.files.model(model), whole(lab.files.arrays(1, **parts)), format=data)
    await lab.engine.load_model("two", lab.files.paths[small.sha256], "tflite")
    request = tuple(from_numpy(name, array[:5]) for name, array in parts.items())
    [outcome], _ = await lab.engine.infer("two", [request])
    expected = model([parts["right"][:5], parts["left"][:5]]).numpy()
    assert outcome.outputs[0].name == "out"
    np.testing.assert_allclose(to_numpy(outcome.outputs[0]), expected, atol=np.abs(expected).max() / 20)


async def test_an_operation_that_litert_lacks_is_named_at_once(lab: Lab, tmp_path: Path) -> None:
    import tensorflow as tf

    spec = tf.TensorSpec((None, 8), tf.float32, name="x")
    folder = saved(tmp_path / "m", lambda x: {"y": tf.math.erfinv(x)}, spec)
    x, y = blobs(20)
    with pytest.raises(InvalidModel, match=r"has operations that LiteRT does not have: .*Erfinv"):
        await quantized(
            lab, lab.files.saved_model(folder), whole(lab.files.arrays(1, x=x, y=y)), model_format="savedmodel"
        )
