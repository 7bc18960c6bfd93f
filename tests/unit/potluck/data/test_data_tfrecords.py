"""TFRecord files, read without TensorFlow: framing and checksums, images and numbers."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from potluck.blobs.store import BlobStore
from potluck.data.pack import pack
from potluck.data.tfrecords import _example, _masked_crc
from potluck.errors import InvalidData
from support.digits import digits
from support.shards import arrays_of, check_manifest, images_of, keys_of, new_store


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return new_store(tmp_path)


def example(**features: Any) -> bytes:
    """A serialized tf.train.Example; `__` in names stands for `/`."""
    message = _example()[0]()
    for name, value in features.items():
        feature = message.features.feature[name.replace("__", "/")]
        values = list(value) if isinstance(value, list | tuple | np.ndarray) else [value]
        if isinstance(values[0], bytes):
            feature.bytes_list.value.extend(values)
        elif isinstance(values[0], float | np.floating):
            feature.float_list.value.extend(float(one) for one in values)
        else:
            feature.int64_list.value.extend(int(one) for one in values)
    return bytes(message.SerializeToString(deterministic=True))


def framed(data: bytes) -> bytes:
    head = struct.pack("<Q", len(data))
    return head + struct.pack("<I", _masked_crc(head)) + data + struct.pack("<I", _masked_crc(data))


def write(path: Path, *records: bytes) -> Path:
    path.write_bytes(b"".join(framed(record) for record in records))
    return path


def png(row: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((row.reshape(8, 8) * 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_checksum_is_masked_crc32c() -> None:
    crc = 0xE3069283  # CRC of "123456789": RFC 3720, B.4, and the usual check value
    assert _masked_crc(b"123456789") == (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def test_images_keep_their_bytes_and_class_numbers(tmp_path: Path, store: BlobStore) -> None:
    x, y = digits()
    for part in range(2):
        write(
            tmp_path / f"digits.tfrecord-0000{part}-of-00002",
            *(
                example(
                    image__encoded=png(x[n]), image__class__label=int(y[n]), image__class__text=f"no {y[n]}".encode()
                )
                for n in range(part, 100, 2)
                if y[n] != 4
            ),
        )
    dataset = pack(tmp_path, "digits", store)
    check_manifest(dataset, store)
    assert dataset.format.classes == tuple("4" if n == 4 else f"no {n}" for n in range(10))
    assert dataset.class_counts == tuple(int((y[:100] == n).sum()) if n != 4 else 0 for n in range(10))
    index_of = {}
    for part in range(2):
        rows = [n for n in range(part, 100, 2) if y[n] != 4]
        index_of |= {f"digits.tfrecord-0000{part}-of-00002#{place}": n for place, n in enumerate(rows)}
    for key, (suffix, data, label) in zip(keys_of(dataset, store), images_of(dataset, store), strict=True):
        assert suffix == "png"
        assert data == png(x[index_of[key]])
        assert label == y[index_of[key]]


def test_images_with_labels_of_text_or_none(tmp_path: Path, store: BlobStore) -> None:
    x, _ = digits()
    file = write(tmp_path / "a.tfrecord", *(example(image=png(x[n]), label=[b"odd", b"even"][n % 2]) for n in range(6)))
    dataset = pack(file, "d", store, shuffle=False)
    assert dataset.format.classes == ("even", "odd")
    assert [label for _, _, label in images_of(dataset, store)] == [1, 0, 1, 0, 1, 0]
    assert dataset.remarks == ()
    file = write(tmp_path / "b.tfrecord", *(example(image=png(x[n]), height=8, name=b"a") for n in range(6)))
    dataset = pack(file, "d", store, shuffle=False)
    assert dataset.format.classes == ()
    assert dataset.remarks == ("features left out: height, name",)
    assert [label for _, _, label in images_of(dataset, store)] == [-1] * 6


def test_numbers_become_arrays(tmp_path: Path, store: BlobStore) -> None:
    x, y = digits()
    file = write(
        tmp_path / "digits.tfrecords",
        *(example(pixels=x[n], label=int(y[n]), id=n, comment=b"text") for n in range(200)),
    )
    dataset = pack(file, "digits", store)
    check_manifest(dataset, store)
    assert (dataset.format.inputs, dataset.format.target) == (("id", "pixels"), "label")
    found, keys = arrays_of(dataset, store), keys_of(dataset, store)
    assert np.array_equal(found["pixels"], x[keys])
    assert np.array_equal(found["label"], y[keys])
    assert found["id"].shape == (200, 1)
    other = pack(file, "digits", store, target="id", shuffle=False)
    assert arrays_of(other, store)["id"].tolist() == list(range(200))


def test_numbers_with_labels_of_text(tmp_path: Path, store: BlobStore) -> None:
    file = write(tmp_path / "a.tfrecord", *(example(v=[float(n), 1.0], label=[b"b", b"a"][n % 2]) for n in range(4)))
    dataset = pack(file, "d", store, shuffle=False)
    assert dataset.format.classes == ("a", "b")
    assert arrays_of(dataset, store)["label"].tolist() == [1, 0, 1, 0]


GOOD = example(v=[1.0, 2.0], label=1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "has no records"),
        (b"nonsense that is long enough", "record 0 is damaged, or this is not a TFRecord file"),
        (b"\x1f\x8b\x08\x00nonsense that is long", "is compressed"),
        (framed(GOOD)[:-1], "record 0 is damaged or cut off"),
        (framed(GOOD) + framed(GOOD)[:5], "record 1 is damaged"),
        (framed(GOOD)[:-6] + b"\x00\x00" + framed(GOOD)[-4:], "record 0 is damaged or cut off"),
        (framed(GOOD) + framed(b"\xff\xff\xff"), "bad.tfrecord#1 is not a tf.train.Example"),
        (framed(GOOD) + framed(example(v=[1.0], label=1)), "bad.tfrecord#1: feature 'v' must hold 2 numbers"),
        (framed(GOOD) + framed(example(label=1)), "bad.tfrecord#1: feature 'v' must hold 2 numbers"),
        (framed(example(label=1)), "neither an encoded image"),
        (framed(example(text=b"x")), "neither an encoded image"),
        (framed(example(image=b"x", label=1.5)), "label 'label' must be one whole number"),
        (framed(example(image=b"x", label=-1)), "labels run from -1 to -1"),
        (framed(example(image=b"x", label=1)) + framed(example(label=1)), "bad.tfrecord#1 has no image in feature"),
        (framed(example(image=b"x", label=1)), "1 of 1 image cannot be used .*bad.tfrecord#0: not an image"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, store: BlobStore, data: bytes, message: str) -> None:
    (tmp_path / "bad.tfrecord").write_bytes(data)
    with pytest.raises(InvalidData, match=message):
        pack(tmp_path / "bad.tfrecord", "d", store)


def test_a_target_that_is_not_there(tmp_path: Path, store: BlobStore) -> None:
    with pytest.raises(InvalidData, match="no feature 'age': its features are label, v"):
        pack(write(tmp_path / "a.tfrecord", GOOD), "d", store, target="age")
