"""TFRecord files of `tf.train.Example`, without TensorFlow: read the framing here, the messages with protobuf.

Format: https://www.tensorflow.org/tutorials/load_data/tfrecord (length, masked CRC of length, data, masked CRC of data).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from potluck import extras
from potluck.data import arrays, folders, images
from potluck.data.packing import CLASSES_LIMIT, Packing, class_indexes, reading, some
from potluck.errors import InvalidData
from potluck.wire.values import Dataset

SUFFIXES = frozenset({".tfrecord", ".tfrecords"})
RECORD_LIMIT_BYTES = 256 * 2**20
_IMAGE = ("image/encoded", "image", "image_raw", "jpeg", "png")
_LABEL = ("image/class/label", "label", "class", "y", "target")
_TEXT = ("image/class/text", "label_name", "class_name")
Features = dict[str, Any]
"""Features by name: a list of bytes, or an array of numbers."""


@dataclass(frozen=True)
class Record:
    """The place of a record's data in its file. `where` names it in errors and keys."""

    path: Path
    number: int
    offset: int
    length: int

    @property
    def where(self) -> str:
        return f"{self.path.name}#{self.number}"

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.length)


def files_in(folder: Path) -> list[Path]:
    """TFRecord files directly in `folder`, also those named like `name.tfrecord-00000-of-00010`."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and (path.suffix.lower() in SUFFIXES or ".tfrecord-" in path.name)
    )


def pack(files: Sequence[Path], target: str | None, packing: Packing, remarks: Sequence[str] = ()) -> Dataset:
    """Pack records: with an encoded image as images, with numbers as arrays. `remarks` go into the manifest.

    Raises InvalidData, naming file and record.
    """
    found = ((record, _features(data, record)) for path in files for record, data in _records(path))
    first = next(found, None)
    if first is None:
        raise InvalidData(f"{files[0]} has no records")
    image = next((key for key in _IMAGE if isinstance(first[1].get(key), list)), None)
    label = target or next((key for key in _LABEL if key in first[1]), None)
    if target is not None and target not in first[1]:
        raise InvalidData(f"{first[0].where} has no feature {target!r}: its features are {', '.join(first[1])}")
    names = first[1].keys() - {label, *_TEXT}
    unused = sorted(names - {image} if image else [name for name in names if isinstance(first[1][name], list)])
    about = [*remarks, f"features left out: {some(unused)}"] if unused else remarks
    if image is not None:
        return _pack_images(_chained(first, found), image, label, packing, about)
    return _pack_arrays(_chained(first, found), label, packing, about)


def _chained(
    first: tuple[Record, Features], rest: Iterator[tuple[Record, Features]]
) -> Iterator[tuple[Record, Features]]:
    yield first
    yield from rest


def _pack_arrays(
    records: Iterator[tuple[Record, Features]], label: str | None, packing: Packing, remarks: Sequence[str]
) -> Dataset:
    columns: dict[str, list[Any]] = {}
    texts: list[str] = []
    for number, (record, features) in enumerate(records):
        if not number:  # bytes that are no image cannot be computed with, unless they are the labels
            columns = {key: [] for key, value in features.items() if key == label or not isinstance(value, list)}
        for key, column in columns.items():
            value = features.get(key)
            if key == label and isinstance(value, list):
                texts.append(str(_label(record, features, key)))
                value = np.zeros(1, np.int64)  # its number is known once all texts are
            if not isinstance(value, np.ndarray) or (column and value.shape != column[0].shape):
                wanted = f"{len(column[0])} numbers, as in the records before" if column else "numbers"
                raise InvalidData(f"{record.where}: feature {key!r} must hold {wanted}")
            column.append(value)
    if not set(columns) - {label}:
        raise InvalidData(f"the records have neither an encoded image ({', '.join(_IMAGE)}) nor numbers")
    stacked = {key: np.stack(column) for key, column in columns.items()}
    if label is not None and stacked[label].shape[1] == 1:
        stacked[label] = stacked[label][:, 0]
    classes: tuple[str, ...] = ()
    if texts:
        if len(texts) != len(stacked[str(label)]):
            raise InvalidData(f"label {label!r} is text in some records and numbers in others")
        stacked[str(label)], classes = class_indexes(texts, f"label {label!r}")
    return arrays.pack(stacked, label, packing, classes=classes, remarks=remarks)


def _pack_images(
    records: Iterator[tuple[Record, Features]], image: str, label: str | None, packing: Packing, remarks: Sequence[str]
) -> Dataset:
    """Pack records with images; the images stay in their files until they are packed."""
    kept: list[Record] = []
    labels: list[int | str] = []
    names: dict[int | str, str] = {}
    for record, features in records:
        if not isinstance(features.get(image), list) or not features[image]:
            raise InvalidData(f"{record.where} has no image in feature {image!r}")
        kept.append(record)
        if label is None:
            continue
        labels.append(_label(record, features, label))
        text = next((features[key] for key in _TEXT if isinstance(features.get(key), list) and features[key]), None)
        if text is not None:
            names[labels[-1]] = text[0].decode(errors="replace")
    indexes, classes = _classes(labels, names)
    items = [
        folders.Item(record.where, indexes[place] if indexes else -1, partial(_image_in, record, image))
        for place, record in enumerate(kept)
    ]
    return folders.pack_items(images.KIND, items, classes, packing, remarks=remarks)


def _classes(labels: Sequence[int | str], names: dict[int | str, str]) -> tuple[list[int], tuple[str, ...]]:
    """Numbers are class indexes as they are, so that a training and a test set agree; texts get indexes in alphabetical order."""
    if not labels:
        return [], ()
    if any(isinstance(label, str) for label in labels):
        found, classes = class_indexes([str(label) for label in labels], "the label")
        return found.tolist(), classes
    numbers = [int(label) for label in labels]
    if min(numbers) < 0 or max(numbers) >= CLASSES_LIMIT:
        raise InvalidData(
            f"labels run from {min(numbers)} to {max(numbers)}: class indexes must be from 0 to {CLASSES_LIMIT - 1}"
        )
    return numbers, tuple(names.get(number, str(number)) for number in range(max(numbers) + 1))


def _label(record: Record, features: Features, key: str) -> int | str:
    """A class index, or the text of a class."""
    value = features.get(key)
    if isinstance(value, list) and len(value) == 1:
        return str(value[0].decode(errors="replace"))
    if isinstance(value, np.ndarray) and len(value) == 1 and value.dtype.kind == "i":
        return int(value[0])
    raise InvalidData(f"{record.where}: label {key!r} must be one whole number or one text")


def _image_in(record: Record, feature: str) -> bytes:
    data: bytes = _features(record.read(), record)[feature][0]
    return data


def _records(path: Path) -> Iterator[tuple[Record, bytes]]:
    with reading(path), path.open("rb") as file:
        number = offset = 0
        while head := file.read(12):
            if not offset and head.startswith(b"\x1f\x8b"):
                raise InvalidData(f"{path} is compressed: unpack it with gunzip first")
            if len(head) < 12 or _masked_crc(head[:8]) != struct.unpack("<I", head[8:])[0]:
                raise InvalidData(f"{path}: record {number} is damaged, or this is not a TFRecord file")
            (length,) = struct.unpack("<Q", head[:8])
            if length > RECORD_LIMIT_BYTES:
                raise InvalidData(f"{path}: record {number} has {length} bytes; the limit is {RECORD_LIMIT_BYTES}")
            data, foot = file.read(length), file.read(4)
            if len(data) < length or len(foot) < 4 or _masked_crc(data) != struct.unpack("<I", foot)[0]:
                raise InvalidData(f"{path}: record {number} is damaged or cut off")
            yield Record(path, number, offset + 12, length), data
            number, offset = number + 1, offset + length + 16


def _features(data: bytes, record: Record) -> Features:
    """Features by name: bytes as a list, numbers as an array."""
    message, decode_error = _example()
    example = message()
    try:
        example.ParseFromString(data)
    except decode_error as error:
        raise InvalidData(f"{record.where} is not a tf.train.Example: {error}") from error
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
    """The class of `tf.train.Example`, made from a description of its fields (tensorflow/core/example/feature.proto)."""
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory
    except ImportError:
        raise _needs() from None
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
        raise _needs() from None
    value: Callable[[bytes], int] = google_crc32c.value
    return value


def _needs() -> InvalidData:
    return InvalidData(f"reading TFRecord files needs protobuf and google-crc32c: {extras.install('tfrecord')}")
