"""The engine's errors for models and data that do not fit: which of them is wrong, why, and what to do."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from msgspec.structs import replace

from potluck.errors import CodeNotAllowed, InvalidData, InvalidModel, InvalidRequest
from potluck.wire.values import DataFormat, ImageOptions
from support import models
from support.engine_lab import IMAGES, Lab, engine_lab, pictures, prediction, training
from support.models import blobs, dense, whole

pytestmark = [pytest.mark.tensorflow, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    async with engine_lab(tmp_path_factory.mktemp("engine")) as lab:
        yield lab


async def test_a_model_that_is_not_compiled(lab: Lab) -> None:
    x, y = blobs(40)
    data = lab.files.arrays(1, x=x, y=y)
    with pytest.raises(InvalidModel, match=r"not compiled: call model.compile"):
        await lab.run(training(lab.files.model(dense(compiled=False)), data), "not compiled")


async def test_a_lambda_layer_is_refused(lab: Lab) -> None:
    import keras

    model = keras.Sequential([keras.Input((8,)), keras.layers.Lambda(lambda x: x * 2)])
    with pytest.raises(CodeNotAllowed, match="Lambda layer, which is code"):
        await lab.run(prediction(lab.files.model(model), whole(lab.files.arrays(1, x=blobs(9)[0], y=blobs(9)[1]))))


async def test_a_class_of_the_users_own_is_refused(lab: Lab) -> None:
    import keras

    class Twice(keras.layers.Layer):  # type: ignore[misc]
        def call(self, x: Any) -> Any:
            return x * 2

    model = keras.Sequential([keras.Input((8,)), Twice()])
    with pytest.raises(CodeNotAllowed, match="a class of its own, 'Twice', which this node does not know"):
        await lab.run(prediction(lab.files.model(model), whole(lab.files.arrays(1, x=blobs(9)[0], y=blobs(9)[1]))))


async def test_a_blob_that_is_no_keras_file(lab: Lab) -> None:
    slices = whole(lab.files.arrays(1, x=blobs(9)[0], y=blobs(9)[1]))
    with pytest.raises(InvalidModel, match=r"not a \.keras file"):
        await lab.run(prediction(lab.files.put(b"\x89HDF\r\n"), slices))
    damaged = bytearray(lab.files.paths[lab.files.model(dense()).sha256].read_bytes())
    damaged[200:1200] = bytes(1000)
    with pytest.raises(InvalidModel):
        await lab.run(prediction(lab.files.put(bytes(damaged)), slices))


async def test_shapes_that_do_not_fit_are_both_named(lab: Lab) -> None:
    x, y = blobs(40, features=7)
    with pytest.raises(InvalidRequest, match=r"shape \(8\), but the data has \(7\)"):
        await lab.run(training(lab.files.model(dense()), lab.files.arrays(1, x=x, y=y)), "shape")
    x, y = blobs(40, classes=5)
    with pytest.raises(InvalidRequest, match=r"classes 0 to 4, but the model's output has 3 units"):
        await lab.run(training(lab.files.model(dense()), lab.files.arrays(1, x=x, y=y)), "classes")
    named = replace(models.ARRAYS, classes=("a", "b", "c", "d"))
    with pytest.raises(InvalidModel, match=r"the data has 4 classes, but the model takes 3"):
        await lab.run(training(lab.files.model(dense()), lab.files.arrays(1, x=x, y=y), format=named), "names")
    with pytest.raises(InvalidRequest, match=r"targets have shape \(\) per item, but the model's output is \(3\)"):
        await lab.run(training(lab.files.model(dense(loss="mse")), lab.files.arrays(1, x=x, y=y)), "plain")
    shard = lab.files.images(pictures(4))
    with pytest.raises(InvalidModel, match=r"the data is images, but the model takes .*\(8\)"):
        await lab.run(training(lab.files.model(dense()), (shard,), format=IMAGES), "images")
    options = ImageOptions(height=10, width=10)
    model = lab.files.model(models.convolutional(classes=2))
    with pytest.raises(InvalidRequest, match=r"\(10, 10, 3\) do not fit the model's input of shape \(32, 32, 3\)"):
        await lab.run(training(model, (shard,), format=IMAGES, image=options), "size")


async def test_data_that_cannot_be_read(lab: Lab) -> None:
    model = lab.files.model(models.convolutional(classes=2))
    shard = lab.files.images(pictures(6))
    tar = lab.files.paths[shard.blob.sha256].read_bytes()
    for bad in (b"no tar", tar[: len(tar) // 2]):
        with pytest.raises(InvalidData, match="data shard"):
            await lab.run(prediction(model, whole([replace(shard, blob=lab.files.put(bad))]), format=IMAGES), "corrupt")
    undecodable = lab.files.images([*pictures(3), (b"\x89PNG\r\n\x1a\nbroken", 0)])
    with pytest.raises(InvalidData, match="cannot be decoded"):
        await lab.run(prediction(model, whole([undecodable]), format=IMAGES), "undecodable")
    unlabelled = lab.files.images([(data, None) for data, _ in pictures(3)])
    with pytest.raises(InvalidData, match="no targets"):
        await lab.run(training(model, (unlabelled,), format=IMAGES), "unlabelled")
    x, y = blobs(10)
    arrays = lab.files.arrays(1, x=x, y=y)
    form = DataFormat(kind="arrays", inputs=("z",), target="y")
    with pytest.raises(InvalidData, match="has no array z"):
        await lab.run(prediction(lab.files.model(dense()), whole(arrays), format=form))
    with pytest.raises(InvalidData, match="has 10 items, but items 0 to 11"):
        await lab.run(prediction(lab.files.model(dense()), (replace(whole(arrays)[0], stop=11),)))
    with pytest.raises(InvalidData, match="cannot be read"):
        await lab.run(prediction(lab.files.model(dense()), whole([replace(arrays[0], blob=lab.files.put(b"no"))])))


async def test_models_that_no_data_set_fits(lab: Lab) -> None:
    import keras

    x, y = blobs(40)
    data = lab.files.arrays(1, x=x, y=y)
    given = keras.Input((8,))
    two = keras.Model(given, [keras.layers.Dense(3)(given), keras.layers.Dense(1)(given)])
    two.compile(optimizer="adam", loss=["mse", "mse"])
    with pytest.raises(
        InvalidRequest, match=r"has 2 outputs .*, and the data 1 target \(y\): give a target for each output"
    ):
        await lab.run(training(lab.files.model(two), data), "two outputs")
    fixed = keras.Sequential([keras.Input((8,), batch_size=16), keras.layers.Dense(3)])
    with pytest.raises(InvalidModel, match="takes exactly 16 items at once"):
        await lab.run(prediction(lab.files.model(fixed), whole(data)))
    labels = np.eye(3, dtype=np.float32)[y]
    with pytest.raises(InvalidRequest, match="use categorical_crossentropy for one-hot"):
        await lab.run(training(lab.files.model(dense()), lab.files.arrays(1, x=x, y=labels)), "one-hot")
