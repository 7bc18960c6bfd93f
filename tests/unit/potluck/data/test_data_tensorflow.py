"""Packed data against TensorFlow itself: every image decodes in an engine as it does elsewhere; TFRecords from TensorFlow can be read."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potluck.data import images, items
from potluck.data.folders import Unusable
from potluck.data.pack import pack
from potluck.wire.values import ImageOptions
from support.digits import digits
from support.pictures import pictures
from support.shards import arrays_of, images_of, new_store

pytestmark = pytest.mark.tensorflow


@pytest.fixture(scope="module")
def tf() -> Any:
    import tensorflow

    return tensorflow


def in_shard(data: bytes) -> bytes | None:
    """The file as it is in a shard; None when it is refused."""
    try:
        return images.write(data, images.check(data))[1]
    except Unusable:
        return None


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8", "int32"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_an_engine_decodes_every_kind_of_file_by_the_same_rule(tf: Any, channels: int, dtype: str) -> None:
    """Also for files that another program has put into shards unchanged."""
    from node.engine.decoders import ImageDecoder

    scale = 1.0 if dtype in ("uint8", "int32") else 1 / 255
    options = ImageOptions(height=9, width=5, channels=channels, scale=scale)  # type: ignore[arg-type]
    decoder = ImageDecoder(options, tf.as_dtype(dtype))
    found = pictures()
    assert len(found) > 40
    files = [picture.data for picture in found.values()]
    decoded = list(tf.data.Dataset.from_tensor_slices(files).map(decoder.decode))
    for name, picture, tensor in zip(found, found.values(), decoded, strict=True):
        resized = tf.image.resize(picture.pixels(channels), (9, 5)).numpy() * np.float32(scale)
        expected = np.rint(resized) if scale == 1.0 else resized
        tolerance = {"float16": 1e-3, "float32": 1e-6}.get(dtype, 1)  # a half may be rounded either way
        assert tensor.dtype == tf.as_dtype(dtype)
        assert np.abs(tensor.numpy().astype(np.float64) - expected).max() <= tolerance, name
        asked = items.image(picture.data, options, dtype=dtype)
        assert np.array_equal(tensor.numpy(), asked), f"{name}: as it is where it is asked about"


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_images_that_are_taken_decode(tf: Any) -> None:
    from node.engine.decoders import ImageDecoder

    decode = ImageDecoder(ImageOptions(height=4, width=4, scale=1.0)).decode
    rng = random.Random(4)
    found = [picture.data for picture in pictures().values()]
    taken = []
    for _ in range(1500):
        data = bytearray(rng.choice(found))
        if rng.random() < 0.3:
            del data[rng.randrange(1, len(data)) :]
        else:
            for _ in range(rng.choice((1, 1, 4))):
                data[rng.randrange(len(data))] = rng.randrange(256)
        packed = in_shard(bytes(data))
        if packed is not None:
            taken.append(packed)
    assert len(taken) > 100
    assert len(list(tf.data.Dataset.from_tensor_slices(taken).map(decode))) == len(taken)


def test_records_written_by_tensorflow(tf: Any, tmp_path: Path) -> None:
    store = new_store(tmp_path)
    x, y = digits()

    def write(name: str, rows: range, features: Any) -> Path:
        path = tmp_path / name
        with tf.io.TFRecordWriter(str(path)) as writer:
            for row in rows:
                example = tf.train.Example(features=tf.train.Features(feature=features(row)))
                writer.write(example.SerializeToString())
        return path

    def ints(value: int) -> Any:
        return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))

    numbers = write(
        "numbers.tfrecord",
        range(100),
        lambda row: {
            "x": tf.train.Feature(float_list=tf.train.FloatList(value=x[row])),
            "label": ints(int(y[row])),
        },
    )
    found = arrays_of(pack(numbers, "d", store, shuffle=False), store)
    assert np.array_equal(found["x"], x[:100])
    assert np.array_equal(found["label"], y[:100])

    def picture(row: int) -> bytes:
        pixels = (x[row].reshape(8, 8, 1) * 255).astype(np.uint8)
        encoded: bytes = tf.io.encode_png(pixels).numpy()
        return encoded

    pictures = write(
        "pictures.tfrecord",
        range(50),
        lambda row: {
            "image/encoded": tf.train.Feature(bytes_list=tf.train.BytesList(value=[picture(row)])),
            "image/class/label": ints(int(y[row])),
        },
    )
    dataset = pack(pictures, "d", store, shuffle=False)
    assert [(data, label) for _, data, label in images_of(dataset, store)] == [
        (picture(row), int(y[row])) for row in range(50)
    ]
