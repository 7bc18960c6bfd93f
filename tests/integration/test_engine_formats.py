"""Replicas of every format: the same model gives the same outputs, and a model that cannot be served says why."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from potluck.errors import CodeNotAllowed, InvalidModel
from potluck.wire.reports import RequestOutcome
from potluck.wire.tasks import TrainResult
from potluck.wire.tensors import from_numpy, to_numpy
from potluck.wire.values import BlobRef, ModelFormat, Signature, Tensor
from support.engine_lab import Lab, engine_lab, training
from support.models import blobs, converted, dense, exported, saved

pytestmark = [pytest.mark.tensorflow, pytest.mark.asyncio(loop_scope="module")]

Array = np.ndarray[Any, Any]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    async with engine_lab(tmp_path_factory.mktemp("engine")) as lab:
        yield lab


async def load(lab: Lab, replica_id: str, ref: BlobRef, model_format: ModelFormat) -> Signature:
    signature, resident, _ = await lab.engine.load_model(replica_id, lab.files.paths[ref.sha256], model_format)
    assert resident >= 0
    return signature


async def ask(lab: Lab, replica_id: str, *arrays: Array) -> list[Array]:
    """The first output for each array, asked in one batch."""
    outcomes, _ = await lab.engine.infer(replica_id, [(from_numpy("x", array),) for array in arrays])
    return [answer(outcome) for outcome in outcomes]


def answer(outcome: RequestOutcome) -> Array:
    assert outcome.error is None, outcome.error
    return to_numpy(outcome.outputs[0])


async def test_one_model_in_every_format_answers_alike(lab: Lab, tmp_path: Path) -> None:
    model, folder = dense(), exported(tmp_path / "dense", dense())
    x, _ = blobs(400)
    expected = model(x).numpy()
    lite, small = converted(folder), converted(folder, x[:100])
    formats: list[tuple[ModelFormat, BlobRef, float]] = [
        ("h5", lab.files.h5(model), 1e-5),
        ("savedmodel", lab.files.saved_model(folder), 1e-5),
        ("tflite", lab.files.put(lite), 1e-5),
        ("tflite", lab.files.put(small), 0.1),
    ]
    for number, (model_format, ref, tolerance) in enumerate(formats):
        signature = await load(lab, f"{number}", ref, model_format)
        assert [(spec.datatype, spec.shape) for spec in signature.inputs] == [("FP32", (-1, 8))]
        assert [(spec.datatype, spec.shape) for spec in signature.outputs] == [("FP32", (-1, 3))]
        for sizes in ([1], [2, 1], [3, 5, 1], [33], [300, 1], [1] * 35):
            ends = np.cumsum([0, *sizes])
            parts = [x[start : start + size] for start, size in zip(ends, sizes, strict=False)]
            for start, found in zip(ends, await ask(lab, f"{number}", *parts), strict=False):
                np.testing.assert_allclose(found, expected[start : start + len(found)], atol=tolerance)
    await lab.engine.unload_model("2")
    assert len(small) < len(lite)


async def test_an_h5_file_is_trained_as_a_keras_file_is(lab: Lab) -> None:
    """Keras itself cannot: it reads the optimizer's state into variables of another model."""
    import keras

    x, y = blobs()
    model = dense()
    model.fit(x[:64], y[:64], verbose=0)  # so that its optimizer has a state
    keras.utils.set_random_seed(0)
    data = lab.files.arrays(1, x=x, y=y)
    done = [
        await lab.engine.run_task("h5", training(ref, data), lab.files.paths, lambda done, metrics: None)
        for ref in (lab.files.h5(model), lab.files.model(model))
    ]
    for result in done:
        assert isinstance(result, TrainResult)
        assert result.samples > 0
    assert done[0].metrics.keys() == done[1].metrics.keys()


async def test_a_bad_request_to_a_lite_model_fails_alone(lab: Lab, tmp_path: Path) -> None:
    await load(lab, "lite", lab.files.put(converted(exported(tmp_path / "m", dense()))), "tflite")
    good = np.zeros((1, 8), np.float32)
    text = Tensor(name="x", datatype="BYTES", shape=(1, 8), data=["a"] * 8)
    batch = [(from_numpy("x", good),), (from_numpy("x", good[:, :7]),), (text,), (from_numpy("x", good),)]
    outcomes, _ = await lab.engine.infer("lite", batch)
    assert answer(outcomes[0]).shape == answer(outcomes[3]).shape == (1, 3)
    assert outcomes[1].error is not None
    assert "takes FP32 of shape (any, 8)" in outcomes[1].error.message
    assert outcomes[2].error is not None
    assert "BYTES, which cannot be cast" in outcomes[2].error.message


async def test_several_inputs_and_outputs_go_by_name(lab: Lab, tmp_path: Path) -> None:
    import tensorflow as tf

    def function(left: Any, right: Any) -> Any:
        return {"total": tf.reduce_sum(left, 1) + tf.reduce_sum(right, 1), "left_again": left}

    specs = tf.TensorSpec((None, 2), tf.float32, name="left"), tf.TensorSpec((None, 3), tf.float32, name="right")
    folder = saved(tmp_path / "named", function, *specs)
    a, b = np.ones((2, 2), np.float32), np.full((2, 3), 2, np.float32)
    files: list[tuple[ModelFormat, BlobRef]] = [
        ("savedmodel", lab.files.saved_model(folder)),
        ("tflite", lab.files.put(converted(folder))),
    ]
    for model_format, ref in files:
        signature = await load(lab, f"named {model_format}", ref, model_format)
        assert {spec.name for spec in signature.inputs} == {"left", "right"}
        request = (from_numpy("right", b), from_numpy("left", a))
        [outcome], _ = await lab.engine.infer(f"named {model_format}", [request])
        outputs = {tensor.name: to_numpy(tensor).tolist() for tensor in outcome.outputs}
        assert outputs == {"total": [8.0, 8.0], "left_again": a.tolist()}


async def test_models_that_take_batches_of_one_size_are_asked_in_that(lab: Lab, tmp_path: Path) -> None:
    import tensorflow as tf

    for rows in (1, 4):
        folder = saved(tmp_path / f"m{rows}", lambda x: {"y": 2 * x}, tf.TensorSpec((rows, 2), tf.float32, name="x"))
        files: list[tuple[ModelFormat, BlobRef]] = [
            ("savedmodel", lab.files.saved_model(folder)),
            ("tflite", lab.files.put(converted(folder))),
        ]
        for model_format, ref in files:
            name = f"{rows} {model_format}"
            assert (await load(lab, name, ref, model_format)).inputs[0].shape == (-1, 2)
            x = np.arange(22, dtype=np.float32).reshape(11, 2)
            for found, asked in zip(await ask(lab, name, x, x[:1]), (x, x[:1]), strict=True):
                np.testing.assert_array_equal(found, 2 * asked)


async def test_savedmodels_that_cannot_be_served_are_refused(lab: Lab, tmp_path: Path) -> None:
    import tensorflow as tf

    spec = tf.TensorSpec((None, 2), tf.float32, name="x")

    def python(x: Any) -> Any:
        return {"y": tf.ensure_shape(tf.numpy_function(lambda value: value, [x], tf.float32), (None, 2))}

    def reader(x: Any) -> Any:
        return {"y": x + tf.cast(tf.strings.length(tf.io.read_file("/etc/hostname")), tf.float32)}

    def writer(x: Any) -> Any:
        tf.raw_ops.SaveV2(prefix="/tmp/x", tensor_names=["x"], shape_and_slices=[""], tensors=[x])
        return {"y": x}

    def total(x: Any) -> Any:
        return {"y": tf.reduce_sum(x)}

    def unready(x: Any) -> Any:
        table = tf.raw_ops.HashTableV2(key_dtype=tf.int64, value_dtype=tf.float32)
        found = tf.raw_ops.LookupTableFindV2(table_handle=table, keys=tf.cast(x, tf.int64), default_value=0.0)
        return {"y": tf.ensure_shape(found, (None, 2))}

    cases = [
        (python, InvalidModel, r"calls Python \(PyFunc\).* without tf\.py_function"),
        (reader, CodeNotAllowed, r"files of the machine it runs on \(ReadFile in its function"),
        (writer, CodeNotAllowed, r"files of the machine it runs on \(SaveV2 in its function"),
        (unready, InvalidModel, r"the model cannot run: .*Table not initialized"),
        (total, InvalidModel, r"output 'y' has shape \(\) for 1 item: it must have a row for each"),
    ]
    for number, (function, error, words) in enumerate(cases):
        ref = lab.files.saved_model(saved(tmp_path / f"{number}", function, spec))
        with pytest.raises(error, match=words):
            await load(lab, f"bad {number}", ref, "savedmodel")


async def test_lite_models_with_operations_that_litert_lacks_are_refused(lab: Lab, tmp_path: Path) -> None:
    import tensorflow as tf

    folder = saved(tmp_path / "m", lambda x: {"y": tf.math.tan(x)}, tf.TensorSpec((None, 2), tf.float32, name="x"))
    custom = converted(folder, allow_custom_ops=True)
    with pytest.raises(InvalidModel, match="operation Tan of its own, which LiteRT does not have"):
        await load(lab, "custom", lab.files.put(custom), "tflite")
    borrowed = converted(folder, target_spec=tf.lite.TargetSpec(supported_ops=[tf.lite.OpsSet.SELECT_TF_OPS]))
    with pytest.raises(InvalidModel, match="operations of TensorFlow that LiteRT does not have"):
        await load(lab, "borrowed", lab.files.put(borrowed), "tflite")
    for wrong in (b"no model at all", b"\0\0\0\0TFL3 and nothing more", custom[:300]):
        with pytest.raises(InvalidModel, match=r"not a \.tflite file|cannot be loaded"):
            await load(lab, "wrong", lab.files.put(wrong), "tflite")


async def test_a_blob_that_is_no_savedmodel_leaves_nothing_behind(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "saved_model.pb").write_bytes(b"x" * 9)
    damaged = lab.files.saved_model(tmp_path)
    (tmp_path / "saved_model.pb").rename(tmp_path / "other.pb")
    cases = [
        (lab.files.put(b"no tar"), "is not a tar of its folder"),
        (damaged, r"has no saved_model\.pb that can be read"),
        (lab.files.saved_model(tmp_path), r"has no saved_model\.pb that can be read"),
    ]
    for ref, words in cases:
        with pytest.raises(InvalidModel, match=words):
            await load(lab, "bad", ref, "savedmodel")
    assert not [path for path in lab.scratch.iterdir() if path.is_dir()]
