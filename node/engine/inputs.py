"""Items of data shards as tensors: tars of images and safetensors of arrays, decoded as the model wants them."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from safetensors import SafetensorError
from safetensors.numpy import load_file

from potluck.errors import InvalidData, InvalidModel, InvalidRequest
from potluck.messages import DataFormat, ImageOptions

MEMORY_LIMIT_BYTES = 1 << 30
"""Decoded items are kept in memory up to this size; beyond, images are decoded anew in each epoch."""

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Part:
    """Items `start` to `stop` (None: all) of the shard at `path`."""

    path: Path
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Labels:
    """How targets are encoded for the loss: `one_hot`, `sparse`, `binary`, or `plain` (as they are)."""

    kind: str
    units: int


def labels_for(model: Any, classes: Sequence[str]) -> Labels:
    """From the compiled loss and the output's shape. Raises InvalidModel when the classes do not fit the output."""
    units = int(model.outputs[0].shape[-1] or 0) if len(model.outputs[0].shape) > 1 else 1
    loss = model.loss
    name = loss if isinstance(loss, str) else getattr(loss, "name", None) or getattr(loss, "__name__", "")
    name = str(name).lower()
    if "sparse" in name:
        labels = Labels("sparse", units)
    elif "categorical" in name or "kl_divergence" in name:
        labels = Labels("one_hot", units)
    elif "binary" in name and units == 1:
        labels = Labels("binary", 1)
    elif classes and units == len(classes) and units > 1:
        labels = Labels("one_hot", units)
    else:
        labels = Labels("plain", units)
    wanted = 2 if labels.kind == "binary" else units
    if classes and labels.kind in ("one_hot", "sparse", "binary") and len(classes) > wanted:
        raise InvalidModel(f"the data has {len(classes)} classes, but the model's output has {units} units")
    return labels


def options_for(model: Any, image: ImageOptions | None) -> ImageOptions:
    """As asked, else the size of the model's own input. Raises InvalidModel where that says nothing, or something else."""
    shape = tuple(model.inputs[0].shape)[1:]
    if len(shape) != 3:
        raise InvalidModel(
            f"the data is images, but the model's input has shape {_shown(shape)}: expected height, width, channels"
        )
    if image is None:
        if None in shape:
            raise InvalidRequest(
                f"the model's input has shape {_shown(shape)}: say the size of the images (--image HxW)"
            )
        return ImageOptions(height=shape[0], width=shape[1], channels=shape[2])
    channels = shape[2] if shape[2] in (1, 3, 4) else image.channels
    asked = (image.height, image.width, channels)
    if any(want is not None and want != have for want, have in zip(shape, asked, strict=True)):
        raise InvalidRequest(f"images of shape {_shown(asked)} do not fit the model's input of shape {_shown(shape)}")
    return ImageOptions(height=image.height, width=image.width, channels=channels, scale=image.scale)


def read_images(part: Part) -> Iterator[tuple[bytes, int]]:
    """(encoded image, class index or -1) in the order of the tar. Raises InvalidData."""
    try:
        with tarfile.open(part.path) as tar:
            pending: dict[str, bytes] = {}
            key, index = "", 0
            for member in tar:
                stem, _, suffix = member.name.rpartition(".")
                file = tar.extractfile(member)
                if file is None:
                    continue
                if stem != key and pending:
                    yield from _item(pending, index, part)
                    index += 1
                    pending = {}
                    if part.stop is not None and index >= part.stop:
                        return
                key = stem
                pending[suffix] = file.read()
            if pending:
                yield from _item(pending, index, part)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise InvalidData(f"data shard {part.path.name[:12]} cannot be read: {error}") from error


def _item(files: dict[str, bytes], index: int, part: Part) -> Iterator[tuple[bytes, int]]:
    if index >= part.start:
        label = int(files.pop("cls", b"-1"))
        images = [data for suffix, data in files.items() if suffix != "cls"]
        if len(images) != 1:
            raise ValueError(f"item {index} has {len(images)} images")
        yield images[0], label


def load_images(parts: Sequence[Part], options: ImageOptions) -> tuple[Array, Array]:
    """All images (float32, n x height x width x channels) and class indexes (int64)."""
    encoded: list[bytes] = []
    labels: list[int] = []
    for part in parts:
        for data, label in read_images(part):
            encoded.append(data)
            labels.append(label)
    images = np.empty((len(encoded), options.height, options.width, options.channels), np.float32)
    dataset = tf.data.Dataset.from_generator(lambda: iter(encoded), output_signature=tf.TensorSpec((), tf.string))
    dataset = dataset.map(lambda data: decode(data, options), tf.data.AUTOTUNE).batch(256).prefetch(1)
    position = 0
    try:
        for batch in dataset.as_numpy_iterator():
            images[position : position + len(batch)] = batch
            position += len(batch)
    except tf.errors.InvalidArgumentError as error:
        raise InvalidData(f"an image after item {position} cannot be decoded: {error.message[:200]}") from error
    return images, np.asarray(labels, np.int64)


def decode(data: Any, options: ImageOptions) -> Any:
    """One encoded image as a float32 tensor."""
    image = tf.io.decode_image(data, channels=options.channels, expand_animations=False)
    image = tf.image.resize(image, (options.height, options.width), method="bilinear")
    return tf.ensure_shape(image * options.scale, (options.height, options.width, options.channels))


def load_arrays(parts: Sequence[Part], data: DataFormat) -> tuple[dict[str, Array], Array | None]:
    """Inputs by name and the target, joined over the parts. Raises InvalidData."""
    found: list[dict[str, Array]] = []
    for part in parts:
        try:
            stored = load_file(part.path)
        except (SafetensorError, OSError) as error:
            raise InvalidData(f"data shard {part.path.name[:12]} cannot be read: {error}") from error
        found.append({name: array[part.start : part.stop] for name, array in stored.items()})
    try:
        joined = {name: np.concatenate([arrays[name] for arrays in found]) for name in found[0]}
        inputs = {name: joined[name] for name in data.inputs}
    except KeyError as error:
        raise InvalidData(f"a data shard has no array {error}") from error
    return inputs, joined.get(data.target) if data.target else None


def fit_inputs(model: Any, inputs: dict[str, Array]) -> list[Array]:
    """The arrays in the order of the model's inputs, by name where names agree. Raises InvalidRequest naming both shapes."""
    wanted = [tensor.name for tensor in model.inputs]
    if len(inputs) != len(wanted):
        raise InvalidRequest(
            f"the model has {len(wanted)} inputs ({', '.join(wanted)}), the data {len(inputs)} ({', '.join(inputs)})"
        )
    ordered = [inputs[name] for name in wanted] if set(wanted) == set(inputs) else list(inputs.values())
    for tensor, array in zip(model.inputs, ordered, strict=True):
        shape = tuple(tensor.shape)[1:]
        if len(shape) != array.ndim - 1 or any(
            w is not None and w != h for w, h in zip(shape, array.shape[1:], strict=True)
        ):
            raise InvalidRequest(
                f"the model's input '{tensor.name}' has shape {_shown(shape)}, but the data has {_shown(array.shape[1:])} per item"
            )
    return [
        array.astype(tensor.dtype, copy=False) if array.dtype.kind in "fiub" else array
        for tensor, array in zip(model.inputs, ordered, strict=True)
    ]


def encode_targets(target: Array, labels: Labels) -> Array:
    """Targets as the loss wants them. Raises InvalidRequest for classes that the output has no unit for."""
    if (
        labels.kind in ("one_hot", "sparse")
        and target.ndim <= 1 + (labels.kind == "sparse")
        and target.dtype.kind in "iu"
    ):
        highest, lowest = int(target.max(initial=0)), int(target.min(initial=0))
        if highest >= labels.units or lowest < 0:
            raise InvalidRequest(
                f"the targets are classes {lowest} to {highest}, but the model's output has {labels.units} units"
            )
    if labels.kind == "one_hot" and target.ndim == 1:
        return np.eye(labels.units, dtype=np.float32)[target.astype(np.int64)]
    if labels.kind == "sparse":
        return target.astype(np.int64)
    if labels.kind == "binary":
        return target.reshape(len(target), -1).astype(np.float32)
    if target.dtype.kind in "iub":
        target = target.astype(np.float32)
    return target.reshape(len(target), 1) if target.ndim == 1 and labels.units == 1 else target


def _shown(shape: Sequence[int | None]) -> str:
    return "(" + ", ".join("any" if d is None else str(d) for d in shape) + ")"


def bytes_of(parts: Sequence[Part], options: ImageOptions, counts: Sequence[int]) -> int:
    """Memory that the decoded images of `parts` take."""
    return sum(counts) * options.height * options.width * options.channels * 4
