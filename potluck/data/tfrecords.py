"""TFRecord files of `tf.train.Example`, without TensorFlow: the framing here, the messages by protobuf.

Format: https://www.tensorflow.org/tutorials/load_data/tfrecord (length, masked CRC of length, data, masked CRC of data).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from potluck.blobs.store import BlobStore
from potluck.data import arrays, images
from potluck.errors import InvalidData
from potluck.messages import Dataset

SUFFIXES = frozenset({".tfrecord", ".tfrecords"})
RECORD_LIMIT_BYTES = 256 * 2**20
_IMAGE = ("image/encoded", "image", "image_raw", "jpeg", "png")
_LABEL = ("image/class/label", "label", "class", "y", "target")
_TEXT = ("image/class/text", "label_name", "class_name")
_NEEDS = "needs protobuf and google-crc32c: pip install 'potluck[tfrecord]'"

Progress = Callable[[int, int], None]


def files_in(folder: Path) -> list[Path]:
    """TFRecord files directly in `folder`; also those named `name.tfrecord-00000-of-00010`."""
    return sorted(
        path for path in folder.iterdir() if path.is_file() and (path.suffix in SUFFIXES or ".tfrecord-" in path.name)
    )


def pack(
    files: Sequence[Path],
    name: str,
    store: BlobStore,
    target: str | None,
    shuffle: bool,
    seed: int,
    shard_bytes: int,
    progress: Progress,
) -> Dataset:
    """Records with an encoded image become images, records of numbers arrays. Raises InvalidData."""
    examples = [
        (f"{path.name}#{number}", _features(data, path, number)) for path in files for number, data in _records(path)
    ]
    if not examples:
        raise InvalidData(f"{files[0]} has no records")
    first = examples[0][1]
    image = next((key for key in _IMAGE if key in first and isinstance(first[key], list)), None)
    label = target or next((key for key in _LABEL if key in first), None)
    if image is not None:
        return _pack_images(examples, image, label, name, store, shuffle, seed, shard_bytes, progress)
    columns: dict[str, Any] = {}
    for key in first:
        if isinstance(first[key], list):
            continue  # bytes that are no image: nothing to compute with
        rows = [features.get(key) for _, features in examples]
        shapes = {None if row is None or isinstance(row, list) else row.shape for row in rows}
        if len(shapes) != 1 or None in shapes:
            raise InvalidData(f"feature {key!r} has not the same number of values in every record")
        stacked = np.stack([row for row in rows if isinstance(row, np.ndarray)])
        columns[key] = stacked[:, 0] if key == label and stacked.shape[1] == 1 else stacked
    if not columns:
        raise InvalidData(f"{files[0]}: records have neither an encoded image ({', '.join(_IMAGE)}) nor numbers")
    return arrays.pack(columns, name, store, label, shuffle, seed, shard_bytes, progress)


def _pack_images(
    examples: Sequence[tuple[str, dict[str, Any]]],
    image: str,
    label: str | None,
    name: str,
    store: BlobStore,
    shuffle: bool,
    seed: int,
    shard_bytes: int,
    progress: Progress,
) -> Dataset:
    names: dict[int, str] = {}
    items: list[images.Item] = []
    numbers = sorted({int(features[label][0]) for _, features in examples if label and label in features})
    index_of = {number: index for index, number in enumerate(numbers)}
    for key, features in examples:
        if image not in features or not features[image]:
            raise InvalidData(f"{key} has no image in feature {image!r}")
        index = index_of[int(features[label][0])] if label and label in features else -1
        text = next((features[one] for one in _TEXT if features.get(one)), None)
        if index >= 0:
            names[index] = text[0].decode(errors="replace") if text else str(numbers[index])
        items.append(images.Item(key, index, data=features[image][0]))
    classes = [names[index] for index in range(len(numbers))]
    return images.pack_items(items, classes, name, store, shuffle, seed, shard_bytes, progress)


def _records(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        number = 0
        while head := file.read(12):
            if len(head) < 12 or _masked_crc(head[:8]) != struct.unpack("<I", head[8:])[0]:
                raise InvalidData(f"{path}: record {number} is damaged, or the file is no TFRecord file")
            (length,) = struct.unpack("<Q", head[:8])
            if length > RECORD_LIMIT_BYTES:
                raise InvalidData(f"{path}: record {number} has {length} bytes; the limit is {RECORD_LIMIT_BYTES}")
            data, foot = file.read(length), file.read(4)
            if len(data) < length or len(foot) < 4 or _masked_crc(data) != struct.unpack("<I", foot)[0]:
                raise InvalidData(f"{path}: record {number} is damaged or cut off")
            yield number, data
            number += 1


def _features(data: bytes, path: Path, number: int) -> dict[str, Any]:
    """Features by name: bytes as a list, numbers as an array."""
    message, decode_error = _example()
    example = message()
    try:
        example.ParseFromString(data)
    except decode_error as error:
        raise InvalidData(f"{path}: record {number} is not a tf.train.Example: {error}") from error
    found: dict[str, Any] = {}
    for key, feature in sorted(example.features.feature.items()):
        kind = feature.WhichOneof("kind")
        if kind == "bytes_list":
            found[key] = list(feature.bytes_list.value)
        elif kind == "float_list":
            found[key] = np.asarray(feature.float_list.value, np.float32)
        elif kind == "int64_list":
            found[key] = np.asarray(feature.int64_list.value, np.int64)
    return found


@cache
def _example() -> tuple[Any, type[Exception]]:
    """The class of `tf.train.Example`, from a description of its fields (tensorflow/core/example/feature.proto)."""
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory
    except ImportError:
        raise InvalidData(f"reading TFRecord files {_NEEDS}") from None
    kind = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="potluck/example.proto", package="potluck.example", syntax="proto3")

    def add(name: str) -> Any:
        found = file.message_type.add()
        found.name = name
        return found

    def field(to: Any, name: str, number: int, type_: int, *, repeated: bool = False, type_name: str = "") -> Any:
        label = kind.LABEL_REPEATED if repeated else kind.LABEL_OPTIONAL
        added = to.field.add()
        added.name, added.number, added.type, added.label = name, number, type_, label
        if type_name:
            added.type_name = f".potluck.example.{type_name}"
        return added

    for name, type_ in (("BytesList", kind.TYPE_BYTES), ("FloatList", kind.TYPE_FLOAT), ("Int64List", kind.TYPE_INT64)):
        field(add(name), "value", 1, type_, repeated=True)
    feature = add("Feature")
    feature.oneof_decl.add().name = "kind"
    for number, name in enumerate(("BytesList", "FloatList", "Int64List"), 1):
        lower = {"BytesList": "bytes_list", "FloatList": "float_list", "Int64List": "int64_list"}[name]
        field(feature, lower, number, kind.TYPE_MESSAGE, type_name=name).oneof_index = 0
    features = add("Features")
    entry = features.nested_type.add()
    entry.name = "FeatureEntry"
    entry.options.map_entry = True
    field(entry, "key", 1, kind.TYPE_STRING)
    field(entry, "value", 2, kind.TYPE_MESSAGE, type_name="Feature")
    field(features, "feature", 1, kind.TYPE_MESSAGE, repeated=True, type_name="Features.FeatureEntry")
    field(add("Example"), "features", 1, kind.TYPE_MESSAGE, type_name="Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    described = pool.FindMessageTypeByName("potluck.example.Example")
    return message_factory.GetMessageClass(described), message.DecodeError


def _masked_crc(data: bytes) -> int:
    crc = _crc32c()(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@cache
def _crc32c() -> Callable[[bytes], int]:
    """CRC-32C (Castagnoli; RFC 3720, appendix B.4)."""
    try:
        import google_crc32c
    except ImportError:
        raise InvalidData(f"reading TFRecord files {_NEEDS}") from None
    value: Callable[[bytes], int] = google_crc32c.value
    return value
