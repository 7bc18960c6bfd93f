"""An engine keeps optimizer, statistics and seeds over rounds, and frees the memory of jobs and replicas."""

from __future__ import annotations

import io
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import pytest_asyncio
from msgspec.structs import replace
from PIL import Image
from safetensors.numpy import save

from node.engine import frames
from potluck.errors import BadMessage, Cancelled, InvalidData, InvalidModel, InvalidRequest
from potluck.wire.tensors import from_numpy, to_numpy
from potluck.wire.values import DataFormat, ImageOptions, Tensor
from support.engine_lab import IMAGES, Lab, engine_lab, evaluation, pictures, prediction, training
from support.models import Files, blobs, dense, whole

pytestmark = [pytest.mark.tensorflow, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    async with engine_lab(tmp_path_factory.mktemp("engine")) as lab:
        yield lab


# --- what training leaves alone ---------------------------------------------------------------------------------------


async def test_tracing_leaves_no_trace(tmp_path: Path) -> None:
    """In this process, where all variables can be looked at: weights, statistics, dropout's seeds, optimizer, metrics."""
    import keras

    from node.engine.shards import ShardPart
    from node.engine.training import TrainingSession

    x, y = blobs(96)
    files = Files(tmp_path)
    for optimizer in ("adam", keras.optimizers.SGD(0.1, momentum=0.9, use_ema=True, ema_momentum=0.9)):
        model = dense(optimizer=optimizer)
        (shard,) = files.arrays(1, x=x, y=y)
        session = TrainingSession(model, seed=0)
        session.use_data(training(shard.blob, (shard,)), [ShardPart(files.paths[shard.blob.sha256], 0, 96)])
        model.optimizer.build(model.trainable_variables)
        assert any("seed" in variable.path for variable in model.variables)
        state = {variable.path: variable.numpy() for variable in (*model.variables, *model.optimizer.variables)}
        session._trace()
        model.reset_metrics()
        now = {variable.path: variable.numpy() for variable in (*model.variables, *model.optimizer.variables)}
        assert state.keys() <= now.keys()  # metrics are made with the first step, and are at 0 now
        for path, value in now.items():
            np.testing.assert_array_equal(value, state.get(path, np.zeros_like(value)), err_msg=path)
        outcome = session.train(96, 60, threading.Event(), lambda done, metrics: None)
        assert outcome.steps == 3
        assert int(model.optimizer.iterations.numpy()) == 3


async def test_a_rehearsal_that_is_cut_off_leaves_the_session_begun(tmp_path: Path) -> None:
    """Otherwise the first round would begin from the rehearsal's weights."""
    from node.engine.shards import ShardPart
    from node.engine.training import TrainingSession

    class SetAtTheSecondLook(threading.Event):
        looks = 0

        def is_set(self) -> bool:
            self.looks += 1
            return self.looks > 1

    x, y = blobs(64)
    files = Files(tmp_path)
    (shard,) = files.arrays(1, x=x, y=y)
    session = TrainingSession(dense(), seed=0)
    session.use_data(training(None, (shard,)), [ShardPart(files.paths[shard.blob.sha256], 0, shard.count)])
    with pytest.raises(Cancelled):
        session.rehearse(SetAtTheSecondLook(), lambda: None)
    assert session.begun
    fresh = TrainingSession(dense(), seed=0)
    fresh.use_data(training(None, (shard,)), [ShardPart(files.paths[shard.blob.sha256], 0, shard.count)])
    fresh.rehearse(threading.Event(), lambda: None)
    assert not fresh.begun


async def test_two_rounds_are_as_good_as_one(lab: Lab) -> None:
    """With everything that has a state: Adam's moments, batch statistics, dropout's seeds, the position in the data."""
    x, y = blobs(200)
    blob, data = lab.files.model(dense()), lab.files.arrays(2, x=x, y=y)
    # The first training of a process differs in the third decimal. So the compared ones come after it.
    await lab.run(training(blob, data, samples=32), "first of the process")
    at_once = await lab.run(training(blob, data, samples=32 * 20), "at once")
    first = await lab.run(training(blob, data, samples=32 * 8), "in parts")
    second = await lab.run(training(blob, data, samples=32 * 12, weights=lab.after(first), round=1), "in parts")
    for ours, theirs in zip(lab.weights(second), lab.weights(at_once), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


async def test_the_first_round_asked_again_begins_where_it_began(lab: Lab) -> None:
    """After a withdrawn attempt, or for another share of the same round. It does not begin from weights that have moved on."""
    x, y = blobs(64)
    task = training(lab.files.model(dense()), lab.files.arrays(1, x=x, y=y), samples=64)
    first = await lab.run(task, "again")
    again = await lab.run(task, "again")
    for ours, theirs in zip(lab.weights(again), lab.weights(first), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


async def test_a_batch_larger_than_the_data(lab: Lab) -> None:
    x, y = blobs(10)
    result = await lab.run(
        training(lab.files.model(dense()), lab.files.arrays(3, x=x, y=y), batch_size=512, samples=25)
    )
    assert (result.samples, result.steps) == (30, 3)


async def test_other_data_and_other_batches_in_the_next_round(lab: Lab) -> None:
    x, y = blobs(300)
    blob, data = lab.files.model(dense()), lab.files.arrays(3, x=x, y=y)
    first = await lab.run(training(blob, data[:1], samples=320), "moved")
    task = training(blob, data[1:], samples=320, weights=lab.after(first), round=1, batch_size=16)
    second = await lab.run(task, "moved")
    assert (second.samples, second.steps) == (320, 20)
    assert second.metrics["loss"] < first.metrics["loss"]


async def test_weights_of_another_model_are_refused_and_change_nothing(lab: Lab) -> None:
    x, y = blobs(50)
    model = dense()
    blob, slices = lab.files.model(model), whole(lab.files.arrays(1, x=x, y=y))
    own = await lab.run(evaluation(blob, slices))
    shapes = [weight.shape for weight in model.weights]
    wrong = [{f"w{i:05}": np.zeros(shape, np.float32) for i, shape in enumerate(shapes[:-1])}]
    wrong.append(wrong[0] | {f"w{len(shapes) - 1:05}": np.zeros((7,), np.float32)})
    for arrays in wrong:
        with pytest.raises((InvalidModel, InvalidData), match="weights"):
            await lab.run(evaluation(blob, slices, weights=lab.files.put(save(arrays))))
        with pytest.raises((InvalidModel, InvalidData), match="weights"):
            await lab.run(evaluation(blob, slices, weights=lab.files.put(b"nothing")))
        assert (await lab.run(evaluation(blob, slices))).sums == own.sums


async def test_regression_learns_with_other_targets_than_classes(lab: Lab) -> None:
    x, _ = blobs(256)
    y = (x @ np.arange(8)).astype(np.float64)
    model = dense(units=1, activation="linear", loss="mse", metrics=["mae"], optimizer=_adam(0.01))
    blob, data = lab.files.model(model), lab.files.arrays(2, x=x.astype(np.float64), y=y)
    first = await lab.run(training(blob, data, samples=256 * 4), "regression")
    second = await lab.run(training(blob, data, samples=256 * 40, weights=lab.after(first), round=1), "regression")
    assert second.metrics["mae"] < first.metrics["mae"] / 2


async def test_words_as_numbers(lab: Lab) -> None:
    """Token ids in int64 for an Embedding, with one label for each text."""
    import keras

    random = np.random.default_rng(0)
    y = random.integers(0, 2, 200)
    x = np.where(random.random((200, 12)) < 0.7, y[:, None] * 20 + random.integers(0, 20, (200, 12)), 45)
    model = keras.Sequential(
        [keras.Input((12,), dtype="int32"), keras.layers.Embedding(50, 8), keras.layers.GlobalAveragePooling1D(),
         keras.layers.Dense(1, activation="sigmoid")]
    )  # fmt: skip
    model.compile(optimizer=keras.optimizers.Adam(0.05), loss="binary_crossentropy", metrics=["accuracy"])
    blob, data = lab.files.model(model), lab.files.arrays(2, x=x, y=y)
    result = await lab.run(training(blob, data, samples=200 * 20), "words")
    scored = await lab.run(evaluation(blob, whole(data), weights=lab.after(result)))
    assert np.trace(np.array(scored.confusion)) >= 195


async def test_equal_parts_give_the_same_bits_where_xla_was_asked_for(lab: Lab) -> None:
    """Keras asks for XLA by default on a GPU."""
    x, y = blobs(320, features=32)
    data = lab.files.arrays(1, x=x, y=y)
    model = dense(features=32)
    model.compile("adam", "sparse_categorical_crossentropy", jit_compile=True)
    ref = lab.files.model(model)
    found = [
        b"".join(
            array.tobytes() for array in lab.weights(await lab.run(training(ref, data, parts=2, samples=320), job))
        )
        for job in ("once", "again")
    ]
    assert found[0] == found[1]


# --- images of all kinds ----------------------------------------------------------------------------------------------


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


async def test_every_kind_of_image_becomes_the_models_input(lab: Lab) -> None:
    import keras

    pixels = np.full((10, 14, 3), (200, 100, 50), np.uint8)
    colour = Image.fromarray(pixels)
    items = [
        encoded(colour, "PNG"), encoded(colour, "JPEG", quality=95), encoded(colour, "BMP"), encoded(colour, "GIF"),
        encoded(colour.convert("RGBA"), "PNG"), encoded(colour.convert("P"), "PNG"), encoded(colour.convert("L"), "PNG"),
        encoded(colour.convert("L"), "JPEG"), encoded(colour.convert("1"), "PNG"),
    ]  # fmt: skip
    shard = lab.files.images([(data, None) for data in items])
    grey = np.dot([0.299, 0.587, 0.114], [200, 100, 50])
    for channels, expected in ((1, [grey]), (3, [200, 100, 50]), (4, [200, 100, 50, 255])):
        model = keras.Sequential([keras.Input((5, 7, channels)), keras.layers.GlobalAveragePooling2D()])
        result = await lab.run(prediction(lab.files.model(model), whole([shard]), format=IMAGES))
        means = to_numpy(result.outputs[0])
        assert means.shape == (len(items), channels)
        np.testing.assert_allclose(means[:6], [np.array(expected) / 255] * 6, atol=0.02)
        assert means.min() >= 0
        assert means.max() <= 1


@pytest.mark.parametrize(("scale", "rescaled"), [(1 / 255, False), (1.0, False), (None, True), (None, False)])
async def test_pixels_in_arrays_are_scaled_as_they_are_in_requests(
    tmp_path: Path, scale: float | None, rescaled: bool
) -> None:
    """If image options are registered with the model, the same array gives the same result by every way in."""
    import keras

    from node.engine import fitting, inputs
    from node.engine.keras_models import signature
    from node.engine.pixels import expected
    from node.engine.shards import ShardPart

    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), np.uint8)
    first = keras.layers.Rescaling(1 / 255) if rescaled else keras.layers.ReLU()
    model = keras.Sequential([keras.Input((5, 7, 3)), first])
    files = Files(tmp_path)
    parts = [ShardPart(files.paths[shard.blob.sha256], 0, shard.count) for shard in files.arrays(1, x=pixels)]
    data, options = DataFormat(kind="arrays", inputs=("x",)), ImageOptions(height=5, width=7, scale=scale)
    source = inputs.source_for(model, data, options)
    asked = [from_numpy("x", pixels)]
    specs, dtypes = signature(model).inputs, [np.dtype(np.float32)]
    registered = expected(model) if scale is None else scale
    if not registered:
        for way in (lambda: fitting.fit(asked, specs, dtypes, registered), lambda: source.load(parts)):
            with pytest.raises(InvalidRequest, match="nothing says whether the model takes them as 0 to 255 or as 0"):
                way()
        return
    (right,) = fitting.fit(asked, specs, dtypes, registered)
    np.testing.assert_array_equal(source.load(parts)[0], right)
    np.testing.assert_array_equal(np.concatenate([batch for (batch,) in source.batches(parts, 2)]), right)
    (plain,) = inputs.source_for(model, data, None).load(parts)
    np.testing.assert_array_equal(plain, pixels.astype(np.float32))


async def test_an_image_of_another_size_for_a_model_that_takes_any(lab: Lab) -> None:
    import keras

    model = keras.Sequential([keras.Input((None, None, 3)), keras.layers.GlobalAveragePooling2D()])
    shard = lab.files.images(pictures(5))
    options = ImageOptions(height=9, width=4)
    blob = lab.files.model(model)
    result = await lab.run(prediction(blob, whole([shard]), format=IMAGES, image=options))
    assert to_numpy(result.outputs[0]).shape == (5, 3)


# --- replicas ---------------------------------------------------------------------------------------------------------


async def test_texts_as_inputs(lab: Lab) -> None:
    import keras

    model = keras.Sequential(
        [
            keras.Input((2,), dtype="string"),
            keras.layers.StringLookup(vocabulary=["a", "b"]),
            keras.layers.Embedding(3, 2),
        ]
    )
    path = lab.files.paths[lab.files.model(model).sha256]
    signature, *_ = await lab.engine.load_model("texts", path)
    assert signature.inputs[0].datatype == "BYTES"
    words = Tensor(name="x", datatype="BYTES", shape=(1, 2), data=["a", "b"])
    numbers = Tensor(name="x", datatype="BYTES", shape=(1, 2), data=["a", 3])
    outcomes, _ = await lab.engine.infer("texts", [(words,), (numbers,), (words,)])
    assert [outcome.error is None for outcome in outcomes] == [True, False, True]
    np.testing.assert_allclose(
        to_numpy(outcomes[2].outputs[0]), model(np.array([["a", "b"]], dtype=object)).numpy(), atol=1e-6
    )


async def test_requests_with_impossible_shapes_fail_alone(lab: Lab) -> None:
    await lab.engine.load_model("shapes", lab.files.paths[lab.files.model(dense()).sha256])
    good = (from_numpy("x", np.zeros((1, 8), np.float32)),)
    bad = [
        Tensor(name="x", datatype="FP32", shape=(2**53, 0), data=b""),
        Tensor(name="x", datatype="FP32", shape=(2**53, 2**53, 0), data=[]),
        Tensor(name="x", datatype="FP32", shape=(1,) * 64, data=[1.0]),
        Tensor(name="x", datatype="INT32", shape=(1, 8), data=[1.5] * 8),
        Tensor(name="x", datatype="BYTES", shape=(1,), data=nested(400)),
        Tensor(name="x", datatype="FP32", shape=(1, 8), data=nested(400)),
    ]
    outcomes, _ = await lab.engine.infer("shapes", [good, *((tensor,) for tensor in bad), good])
    assert [outcome.error is None for outcome in outcomes] == [True, *[False] * len(bad), True]
    assert {outcome.error.code for outcome in outcomes if outcome.error} == {"invalid_request"}


def nested(depth: int) -> list[Any]:
    found: list[Any] = ["a"]
    for _ in range(depth):
        found = [found]
    return found


async def test_a_question_that_cannot_be_read_fails_but_not_the_engine(lab: Lab) -> None:
    await lab.engine.load_model("there", lab.files.paths[lab.files.model(dense()).sha256])
    odd = Tensor(name="x", datatype="FP32", shape=(-1, -8), data=[0.0] * 8)  # made by hand, so it was not checked
    with pytest.raises(BadMessage, match="cannot be read"):
        await lab.engine.infer("there", [(odd,)])
    outcomes, _ = await lab.engine.infer("there", [(from_numpy("x", np.zeros((1, 8), np.float32)),)])
    assert outcomes[0].error is None
    assert frames.number_of(b"nothing") == 0


async def test_memory_of_replicas_comes_back(lab: Lab) -> None:
    """Models of 40 MB are loaded and unloaded one after the other."""
    import keras

    assert lab.engine.pid is not None
    process = psutil.Process(lab.engine.pid)
    model = keras.Sequential([keras.Input((1000,)), keras.layers.Dense(10_000)])
    path = lab.files.paths[lab.files.model(model).sha256]
    used = []
    for number in range(8):
        await lab.engine.load_model(f"large {number}", path)
        await lab.engine.unload_model(f"large {number}")
        used.append(process.memory_info().rss // 2**20)
    assert used[-1] - used[1] < 100, used


async def test_memory_of_training_comes_back(lab: Lab) -> None:
    """Jobs with models of 40 MB, whose Adam takes 80 MB more."""
    import keras

    assert lab.engine.pid is not None
    process = psutil.Process(lab.engine.pid)
    model = keras.Sequential([keras.Input((1000,)), keras.layers.Dense(10_000), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    ref, data = lab.files.model(model), lab.files.arrays(x=np.zeros((64, 1000), np.float32), y=np.zeros(64, np.float32))
    used = []
    for number in range(6):
        await lab.run(training(ref, data, samples=64), job_id=f"job {number}")
        await lab.engine.forget_job(f"job {number}")
        await lab.run(evaluation(ref, whole(data)))  # waits until the job is forgotten
        used.append(process.memory_info().rss // 2**20)
    assert used[-1] - used[1] < 100, used


def _adam(rate: float) -> Any:
    import keras

    return keras.optimizers.Adam(rate)


def watched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Lists the parts that are decoded from now on."""
    from node.engine import inputs

    decoded: list[Any] = []
    ordinary = inputs.Source._fill

    def fill(self: Any, decoder: Any, rows: Any, part: Any) -> None:
        decoded.append(part)
        ordinary(self, decoder, rows, part)

    monkeypatch.setattr(inputs.Source, "_fill", fill)
    return decoded


async def test_images_are_not_decoded_again_when_their_options_become_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first round begins before anybody knows the size and scale of the model's images."""
    import keras

    from node.engine.shards import ShardPart
    from node.engine.training import TrainingSession

    files = Files(tmp_path)
    shards = [files.images(pictures(4, size)) for size in (12, 13)]
    parts = [ShardPart(files.paths[shard.blob.sha256], 0, shard.count) for shard in shards]
    model = keras.Sequential([keras.Input((12, 12, 3)), keras.layers.Flatten(), keras.layers.Dense(2)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    decoded = watched(monkeypatch)
    session = TrainingSession(model, 0)
    task = training(files.put(b"the model's file"), tuple(shards), format=IMAGES, batch_size=4)
    session.use_data(task, parts)
    assert session.image is not None
    session.use_data(replace(task, image=session.image), parts)
    assert decoded == parts
    session.use_data(replace(task, image=replace(session.image, scale=1.0)), parts)
    assert decoded == [*parts, *parts]


async def test_parts_that_stay_are_not_decoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When shares change, nodes get other shards, but most of them are the same as before."""
    import keras

    from node.engine import inputs
    from node.engine.shards import ShardPart

    files = Files(tmp_path)
    shards = [files.images(pictures(4, size)) for size in (12, 13, 14)]
    parts = [ShardPart(files.paths[shard.blob.sha256], 0, shard.count) for shard in shards]
    model = keras.Sequential([keras.Input((12, 12, 3)), keras.layers.Flatten(), keras.layers.Dense(2)])
    source = inputs.source_for(model, IMAGES, None)
    decoded = watched(monkeypatch)
    known: dict[ShardPart, Any] = {}
    source.load(parts[:2], known)
    (moved,) = source.load([parts[2], parts[1]], known)
    assert decoded == parts
    (anew,) = source.load([parts[2], parts[1]])
    np.testing.assert_array_equal(moved.numpy(), anew.numpy())
