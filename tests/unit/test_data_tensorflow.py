"""What was packed against TensorFlow itself: every image decodes to any number of channels; TFRecords that it wrote are read."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from potluck.data import images
from potluck.data.folders import Unusable
from potluck.data.pack import pack
from support.digits import digits
from support.shards import arrays_of, images_of, new_store

pytestmark = pytest.mark.tensorflow


@pytest.fixture(scope="module")
def tf() -> Any:
    import tensorflow

    return tensorflow


def variants() -> dict[str, bytes]:
    """A photograph in every mode and format that Pillow writes."""
    photo = Image.fromarray(load_sample_images().images[0]).resize((40, 30))
    wide = Image.fromarray((np.arange(1200).reshape(30, 40) * 50).astype(np.uint16))
    images = {mode: photo.convert(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")} | {"I;16": wide}
    found = {}
    for mode, image in images.items():
        for format in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "MPO"):
            buffer = io.BytesIO()
            try:
                image.save(buffer, format)
            except (OSError, KeyError, ValueError):
                continue  # this format has no such mode
            found[f"{mode}-{format}"] = buffer.getvalue()
    frames = [photo.convert("P"), photo.rotate(45).convert("P")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return found | {"animated-GIF": buffer.getvalue()}


def in_shard(data: bytes) -> bytes | None:
    """As it stands in a shard; None when it is refused."""
    try:
        return images.write(data, images.check(data))[1]
    except Unusable:
        return None


@pytest.mark.parametrize("channels", [1, 3])
def test_every_packed_image_decodes(tf: Any, channels: int) -> None:
    found = variants()
    assert len(found) > 25
    for name, data in found.items():
        packed = in_shard(data)
        assert packed is not None, name
        image = tf.io.decode_image(packed, channels=channels, expand_animations=False)
        assert tuple(image.shape) == (30, 40, channels), name
        with Image.open(io.BytesIO(data)) as original:
            if channels == 3 and original.mode in ("1", "L", "P", "RGB") and original.format not in ("JPEG", "MPO"):
                assert np.array_equal(image.numpy(), np.asarray(original.convert("RGB"))), name


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_images_that_are_taken_decode(tf: Any) -> None:
    rng = random.Random(4)
    found = [data for name, data in variants().items() if name.startswith(("RGB-", "L-", "P-"))]
    taken = 0
    for _ in range(1500):
        data = bytearray(rng.choice(found))
        if rng.random() < 0.3:
            del data[rng.randrange(1, len(data)) :]
        else:
            for _ in range(rng.choice((1, 1, 4))):
                data[rng.randrange(len(data))] = rng.randrange(256)
        packed = in_shard(bytes(data))
        if packed is not None:
            taken += 1
            assert tf.io.decode_image(packed, channels=3, expand_animations=False).shape[2] == 3
    assert taken > 100


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
