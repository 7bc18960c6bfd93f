"""Items of data shards as the tensors that a model takes: images decoded and resized in tf.data, arrays by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from node.engine import runtime, shards
from node.engine.shards import Array, Part
from node.engine.wording import one_line
from node.engine.wording import shape as shown
from potluck.errors import InvalidData, InvalidModel, InvalidRequest
from potluck.messages import DataFormat, ImageOptions

GROUP_BYTES = 32 * 2**20
"""Encoded images that are in memory at once, beside those that are decoded."""


@dataclass(frozen=True)
class Source:
    """How the items of one data format become inputs of one model."""

    model: Any
    data: DataFormat
    options: ImageOptions | None
    """For images: how they are decoded."""

    def item_bytes(self) -> int:
        """Memory of one decoded image."""
        assert self.options is not None
        return self.options.height * self.options.width * self.options.channels * 4

    def targets(self, parts: Sequence[Part]) -> dict[str, Array]:
        """The targets by name, class numbers as `data` counts classes; none where there are none, or not for each item.

        Raises InvalidData.
        """
        places = np.array(self.data.places, np.int64)
        found = self._stored_targets(parts)
        return {name: places[target] for name, target in found.items()} if len(places) else found

    def _stored_targets(self, parts: Sequence[Part]) -> dict[str, Array]:
        if self.options is None:
            names = self.data.targets or ((self.data.target,) if self.data.target else ())
            return shards.load_arrays(parts, names)
        classes = np.concatenate([shards.image_classes(part) for part in parts]) if parts else np.zeros(0, np.int64)
        return {} if len(classes) and classes.min() < 0 else {"class": classes}

    def weights(self, parts: Sequence[Part]) -> Array | None:
        """Weights of the items in the loss, where the data has such. Raises InvalidData."""
        return shards.load_arrays(parts, [self.data.weight])[self.data.weight] if self.data.weight else None

    def batches(self, parts: Sequence[Part], batch_size: int) -> Iterator[list[Any]]:
        """Tensors in the order of the model's inputs, `batch_size` items at a time (the last may be fewer). Raises InvalidData."""
        if self.options is not None:
            for encoded in _groups(parts):
                yield from ([images] for images in self._decoded(encoded, batch_size))
            return
        arrays = fit(self.model, shards.load_arrays(parts, self.data.inputs))
        for start in range(0, len(arrays[0]), batch_size):
            yield [tf.convert_to_tensor(array[start : start + batch_size]) for array in arrays]

    def load(self, parts: Sequence[Part]) -> list[Array]:
        """All items, in the order of the model's inputs. Raises InvalidData, InvalidRequest."""
        if self.options is None:
            return fit(self.model, shards.load_arrays(parts, self.data.inputs))
        count = sum(part.count for part in parts)
        images = np.empty((count, self.options.height, self.options.width, self.options.channels), np.float32)
        position = 0
        for batch in self.batches(parts, 256):
            images[position : position + len(batch[0])] = batch[0].numpy()
            position += len(batch[0])
        return [images]

    def _decoded(self, encoded: list[bytes], batch_size: int) -> Iterator[Any]:
        dataset = tf.data.Dataset.from_tensor_slices(tf.constant(encoded))
        dataset = dataset.map(self.decode, tf.data.AUTOTUNE, deterministic=True).batch(batch_size).prefetch(2)
        done = 0
        try:
            for batch in dataset:
                yield batch
                done += len(batch)
        except tf.errors.InvalidArgumentError as error:
            raise undecodable(error, f"among {len(encoded) - done} after {done}") from error

    def decode(self, data: Any) -> Any:
        """One encoded image as a float32 tensor; to be used inside tf.data."""
        assert self.options is not None
        height, width, channels = self.options.height, self.options.width, self.options.channels
        image = _decoded_to(data, channels)
        image = tf.image.resize(image, (height, width), method="bilinear")
        return tf.ensure_shape(image * self.options.scale, (height, width, channels))


def source_for(model: Any, data: DataFormat, image: ImageOptions | None) -> Source:
    """Raises InvalidModel and InvalidRequest where data and model do not fit."""
    return Source(model, data, options_for(model, image) if data.kind == "images" else None)


def options_for(model: Any, image: ImageOptions | None) -> ImageOptions:
    """As asked, else the size of the model's own input. Raises InvalidModel where that says nothing, or something else."""
    shape = tuple(model.inputs[0].shape)[1:]
    if len(model.inputs) > 1 or len(shape) != 3:
        names = ", ".join(f"{spec.name} {shown(spec.shape[1:])}" for spec in runtime.signature(model).inputs)
        raise InvalidModel(f"the data is images, but the model takes {names}: expected one (height, width, channels)")
    if image is None:
        if None in shape:
            raise InvalidRequest(
                f"the model's input has shape {shown(shape)}: say the size of the images (--image HxW)"
            )
        asked = shape
    else:
        asked = (image.height, image.width, shape[2] or image.channels)
    if any(want is not None and want != have for want, have in zip(shape, asked, strict=True)):
        raise InvalidRequest(f"images of shape {shown(asked)} do not fit the model's input of shape {shown(shape)}")
    if asked[2] not in (1, 3, 4):
        raise InvalidModel(
            f"the model's input has shape {shown(shape)}: images have 1, 3 or 4 channels, in the last place"
        )
    scale = {} if image is None else {"scale": image.scale}
    return ImageOptions(height=asked[0], width=asked[1], channels=asked[2], **scale)


def fit(model: Any, inputs: dict[str, Array]) -> list[Array]:
    """The arrays in the order of the model's inputs, in their dtypes. Raises InvalidRequest naming both shapes."""
    specs = runtime.signature(model).inputs
    wanted = [spec.name for spec in specs]
    if len(inputs) != len(wanted):
        raise InvalidRequest(
            f"the model has {len(wanted)} inputs ({', '.join(wanted)}), the data {len(inputs)} ({', '.join(inputs)})"
        )
    if len(wanted) > 1 and set(wanted) != set(inputs):
        raise InvalidRequest(
            f"the model's inputs are named {', '.join(wanted)}, the data's {', '.join(inputs)}: name the arrays as the inputs"
        )
    ordered = [inputs[name] for name in wanted] if len(wanted) > 1 else list(inputs.values())
    found: list[Array] = []
    for spec, tensor, array in zip(specs, model.inputs, ordered, strict=True):
        given = array.shape[1:]
        if len(spec.shape) == 2 and spec.shape[1] == 1 and not given:
            array, given = array[:, None], (1,)
        if len(spec.shape) != array.ndim or any(w >= 0 and w != h for w, h in zip(spec.shape[1:], given, strict=True)):
            raise InvalidRequest(
                f"the model's input '{spec.name}' has shape {shown(spec.shape[1:])}, but the data has {shown(given)} per item"
            )
        found.append(array.astype(tensor.dtype, copy=False) if array.dtype.kind in "fiub" else array)
    return found


def undecodable(error: Exception, where: str) -> InvalidData:
    reason = one_line(getattr(error, "message", error), 200)
    return InvalidData(f"an image cannot be decoded ({where}): {reason}: TensorFlow reads PNG, JPEG, GIF and BMP")


def _decoded_to(data: Any, channels: int) -> Any:
    """Pixels of an encoded image; TensorFlow decodes to 1 channel from PNG and JPEG only, and to 4 from PNG only."""
    if channels == 3:
        return tf.io.decode_image(data, 3, expand_animations=False)
    known = tf.equal(tf.strings.substr(data, 0, 4), b"\x89PNG")
    if channels == 1:
        known = known | tf.io.is_jpeg(data)

    def converted() -> Any:
        image = tf.io.decode_image(data, 3, expand_animations=False)
        if channels == 1:
            return tf.image.rgb_to_grayscale(image)
        return tf.concat([image, tf.fill([*tf.unstack(tf.shape(image)[:2]), 1], tf.constant(255, tf.uint8))], axis=-1)

    return tf.cond(known, lambda: tf.io.decode_image(data, channels, expand_animations=False), converted)


def _groups(parts: Sequence[Part]) -> Iterator[list[bytes]]:
    group: list[bytes] = []
    size = 0
    for part in parts:
        for data in shards.encoded_images(part):
            group.append(data)
            size += len(data)
            if size >= GROUP_BYTES:
                yield group
                group, size = [], 0
    if group:
        yield group
