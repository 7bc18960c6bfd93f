"""Models that reach for files of the machine are refused before any of it runs. Models with files of their own are not."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from potluck.errors import CodeNotAllowed
from potluck.wire.tensors import from_numpy, to_numpy
from potluck.wire.values import Tensor
from support.engine_lab import Lab, engine_lab
from support.models import exported, saved

pytestmark = [pytest.mark.tensorflow, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    async with engine_lab(tmp_path_factory.mktemp("engine")) as lab:
        yield lab


def text(length: Any) -> Any:
    import tensorflow as tf

    return tf.cast(tf.strings.length(length), tf.float32)


def first(dataset: Any) -> Any:
    """The length of the text in a data set with one item."""
    import tensorflow as tf

    return text(tf.raw_ops.DatasetToSingleElement(dataset=dataset, output_types=[tf.string], output_shapes=[()])[0])


def table(raw: Any, path: str) -> Any:
    import tensorflow as tf

    made = raw.HashTableV2(key_dtype=tf.string, value_dtype=tf.int64)
    raw.InitializeTableFromTextFileV2(table_handle=made, filename=path, key_index=-2, value_index=-1)
    return tf.cast(raw.LookupTableSizeV2(table_handle=made), tf.float32)


def record(raw: Any, path: str) -> Any:
    import tensorflow as tf

    queue = raw.FIFOQueueV2(component_types=[tf.string])
    return text(raw.ReaderReadV2(reader_handle=raw.WholeFileReaderV2(), queue_handle=queue)[1])


def summary(raw: Any, path: str) -> Any:
    writer = raw.SummaryWriter()
    raw.CreateSummaryFileWriter(writer=writer, logdir=path, max_queue=1, flush_millis=1, filename_suffix="x")
    return 0.0


def cached(raw: Any, path: str) -> Any:
    import tensorflow as tf

    items = raw.TensorDataset(components=["a"], output_shapes=[()])
    return first(raw.CacheDataset(input_dataset=items, filename=path, output_types=[tf.string], output_shapes=[()]))


def printed(raw: Any, path: str) -> Any:
    raw.PrintV2(input="x", output_stream=f"file://{path}")
    return 0.0


def written(raw: Any, path: str) -> Any:
    raw.WriteFile(filename=path, contents="x")
    return 0.0


def stored(raw: Any, path: str) -> Any:
    raw.SaveV2(prefix=path, tensor_names=["x"], shape_and_slices=[""], tensors=[1.0])
    return 0.0


def constant(raw: Any, path: str) -> Any:
    import tensorflow as tf

    return raw.ImmutableConst(dtype=tf.float32, shape=(), memory_region_name=path)


def restored(raw: Any, path: str) -> Any:
    import tensorflow as tf

    return raw.RestoreV2(prefix=path, tensor_names=["x"], shape_and_slices=[""], dtypes=[tf.float32])[0]


def sampled(raw: Any, path: str) -> Any:
    import tensorflow as tf

    found = raw.FixedUnigramCandidateSampler(
        true_classes=tf.constant([[0]], tf.int64), num_true=1, num_sampled=1, unique=False, range_max=2, vocab_file=path
    )
    return found[1][0, 0]


DANGEROUS: dict[str, Callable[[Any, str], Any]] = {
    "ReadFile": lambda raw, path: text(raw.ReadFile(filename=path)),
    "MatchingFiles": lambda raw, path: text(raw.MatchingFiles(pattern="/etc/*")[0]),
    "TextLineDataset": lambda raw, path: first(raw.TextLineDataset(filenames=path, compression_type="", buffer_size=0)),
    "FixedLengthRecordDataset": lambda raw, path: first(
        raw.FixedLengthRecordDataset(filenames=path, header_bytes=0, record_bytes=4, footer_bytes=0, buffer_size=0)
    ),
    "DebugIdentityV2": lambda raw, path: raw.DebugIdentityV2(input=1.0, debug_urls=[f"file://{path}"]),
    "WholeFileReaderV2": record, "InitializeTableFromTextFileV2": table, "CreateSummaryFileWriter": summary, "CacheDataset": cached,
    "PrintV2": printed, "WriteFile": written, "SaveV2": stored, "ImmutableConst": constant, "RestoreV2": restored,
    "FixedUnigramCandidateSampler": sampled,
}  # fmt: skip


@pytest.mark.parametrize("operation", DANGEROUS)
async def test_operations_that_reach_for_files_are_refused_by_name(lab: Lab, tmp_path: Path, operation: str) -> None:
    import tensorflow as tf

    def function(x: Any) -> Any:
        return {
            "y": tf.cond(
                tf.size(x) > 0, lambda: x + DANGEROUS[operation](tf.raw_ops, str(tmp_path / "file")), lambda: x
            )
        }

    folder = saved(tmp_path / "m", function, tf.TensorSpec((None, 2), tf.float32, name="x"))
    ref = lab.files.saved_model(folder)
    with pytest.raises(CodeNotAllowed, match=rf"{operation} in its function '.*\"lambda\" in allow_code"):
        await lab.engine.load_model("evil", lab.files.paths[ref.sha256], "savedmodel")
    assert os.listdir(tmp_path) == ["m"]  # noqa: PTH208


def edited(lab: Lab, model: Any, member: str, edit: Callable[[bytes], bytes]) -> Path:
    """The model's `.keras` file with one part of it changed."""
    source = lab.files.paths[lab.files.model(model).sha256]
    target = source.with_suffix(".edited")
    with zipfile.ZipFile(source) as whole, zipfile.ZipFile(target, "w") as changed:
        for name in whole.namelist():
            changed.writestr(name, edit(whole.read(name)) if name == member else whole.read(name))
    return target


async def test_keras_models_that_name_files_are_refused(lab: Lab, tmp_path: Path) -> None:
    import h5py
    import keras

    words = keras.Sequential([keras.Input((1,), dtype="string"), keras.layers.StringLookup(vocabulary=["a"])])
    plain = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, name="dense")])

    def layer(changed: dict[str, Any], **config: Any) -> Callable[[bytes], bytes]:
        def edit(data: bytes) -> bytes:
            found = json.loads(data)
            found["config"]["layers"][-1].update(changed)
            found["config"]["layers"][-1]["config"].update(config)
            return json.dumps(found).encode()

        return edit

    def elsewhere(data: bytes) -> bytes:
        (tmp_path / "weights").write_bytes(data)
        linked(tmp_path / "weights")
        return (tmp_path / "weights").read_bytes()

    def linked(path: Path) -> None:
        """Let the kernel be bytes of another file."""
        with h5py.File(path, "r+") as file:
            names: list[str] = []
            file.visititems(lambda name, item: names.append(name) if getattr(item, "shape", ()) == (2, 3) else None)
            del file[names[0]]
            file.create_dataset(names[0], (2, 3), "float32", external=[("/etc/passwd", 0, 24)])

    other = {
        "class_name": "TFSMLayer",
        "module": "keras.layers",
        "config": {"filepath": "/etc"},
        "registered_name": None,
    }
    old = lab.files.paths[lab.files.h5(plain).sha256]
    linked(old)
    cases = [
        (edited(lab, words, "config.json", layer({}, vocabulary="/etc/passwd")), "keras"),
        (edited(lab, plain, "config.json", layer(other)), "keras"),
        (edited(lab, plain, "model.weights.h5", elsewhere), "keras"),
        (old, "h5"),
    ]
    for path, kind in cases:
        with pytest.raises(CodeNotAllowed, match="the model names files of the machine it runs on"):
            await lab.engine.load_model("evil", path, kind)  # type: ignore[arg-type]


async def test_savedmodels_of_many_kinds_answer_as_before(lab: Lab, tmp_path: Path) -> None:
    import keras
    import tensorflow as tf

    (tmp_path / "words.txt").write_text("a\nb\n")
    layers = keras.layers
    looked = keras.Sequential(
        [keras.Input((1,), dtype="string"), layers.StringLookup(vocabulary=str(tmp_path / "words.txt"))]
    )
    whole = keras.Sequential([keras.Input((1,), dtype="int64"), layers.IntegerLookup(vocabulary=[3, 4])])
    read = keras.Sequential(
        [keras.Input((1,), dtype="string"), layers.TextVectorization(vocabulary=["a", "b"], ragged=False), layers.Embedding(4, 3),
         layers.Bidirectional(layers.GRU(3)), layers.Dense(2, "softmax")]
    )  # fmt: skip
    shaken = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.RandomFlip(), layers.Resizing(4, 4), layers.Conv2D(2, 3), layers.BatchNormalization(),
         layers.Dropout(0.5), layers.Flatten(), layers.Dense(2)]
    )  # fmt: skip

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def clipped(x: Any) -> Any:
        return tf.clip_by_value(x, 0, 1), lambda upstream: upstream

    def loops(x: Any) -> Any:
        _, total = tf.while_loop(lambda i, t: i < 3, lambda i, t: (i + 1, t + clipped(x)), (0, tf.zeros_like(x)))
        rows = tf.RaggedTensor.from_row_lengths(tf.reshape(x, (-1,)), tf.fill((tf.shape(x)[0],), 2))
        return {"y": total + rows.to_tensor(shape=(None, 2)) + 0 * tf.random.uniform(tf.shape(x))}

    def decodes(x: Any) -> Any:
        def one(data: Any) -> Any:
            return tf.reduce_mean(tf.image.resize(tf.io.decode_image(data, 3, expand_animations=False), (4, 4)), (0, 1))

        return {"y": tf.ensure_shape(tf.map_fn(one, x, fn_output_signature=tf.float32), (None, 3))}

    def tensorflows(folder: Path, x: Any) -> Any:
        """TensorFlow's own result, where Keras's differs."""
        [found] = tf.saved_model.load(folder).signatures["serving_default"](tf.constant(x)).values()
        return found.numpy()

    numbers = np.full((2, 2), 0.5, np.float32)
    image = tf.io.encode_png(np.full((5, 5, 3), 9, np.uint8)).numpy()
    strings = Tensor(name="x", datatype="BYTES", shape=(2, 1), data=["b", "z"])
    cases: list[tuple[Path, Tensor, Any]] = [
        (exported(tmp_path / "looked", looked), strings, [[2], [0]]),
        (exported(tmp_path / "whole", whole), from_numpy("x", np.array([[4], [9]])), [[2], [0]]),
        (exported(tmp_path / "read", read), strings, read(tf.constant([["b"], ["z"]])).numpy()),
        (exported(tmp_path / "shaken", shaken), from_numpy("x", np.ones((2, 8, 8, 3), np.float32)),
         tensorflows(tmp_path / "shaken", np.ones((2, 8, 8, 3), np.float32))),
        (saved(tmp_path / "loops", loops, tf.TensorSpec((None, 2), tf.float32, name="x")), from_numpy("x", numbers), 4 * numbers),
        (saved(tmp_path / "decodes", decodes, tf.TensorSpec((None,), tf.string, name="x")),
         Tensor(name="x", datatype="BYTES", shape=(1,), data=[image]), [[9, 9, 9]]),
    ]  # fmt: skip
    (tmp_path / "words.txt").unlink()
    for folder, given, expected in cases:
        ref = lab.files.saved_model(folder)
        signature, _, _ = await lab.engine.load_model(folder.name, lab.files.paths[ref.sha256], "savedmodel")
        request = Tensor(name=signature.inputs[0].name, datatype=given.datatype, shape=given.shape, data=given.data)
        [outcome], _ = await lab.engine.infer(folder.name, [(request,)])
        assert outcome.error is None, (folder.name, outcome.error)
        np.testing.assert_allclose(to_numpy(outcome.outputs[0]), expected, atol=1e-5)
        await lab.engine.unload_model(folder.name)
