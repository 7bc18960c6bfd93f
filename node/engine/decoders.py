"""Files of shards as tensors, inside tf.data: images resized, texts as they are, recordings cut or padded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import tensorflow as tf

from node.engine import keras_models, pixels
from node.engine.wording import one_line
from potluck.data import images
from potluck.data.folders import Unusable
from potluck.data.items import CHANNELS, check_scale
from potluck.errors import InvalidData, InvalidModel, InvalidRequest
from potluck.wire.specs import shown
from potluck.wire.values import DataFormat, ImageOptions

_NO_IMAGE, _END = "the image is refused: ", " (end)"
"""The texts before and after the reason: TensorFlow puts the reason among other lines of its error."""


class Decoder(Protocol):
    """`decode` makes one file of an item into a tensor of `shape` and `dtype`, in a graph."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...

    def decode(self, data: Any) -> Any: ...


@dataclass(frozen=True)
class ImageDecoder:
    """Makes (height, width, channels) of the model's dtype: pixels times `scale`, by `images.tensor` as everywhere."""

    options: ImageOptions
    dtype: Any = tf.float32

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.options.height, self.options.width, self.options.channels)

    def decode(self, data: Any) -> Any:
        # Not stateful: if operations must be deterministic, tf.data would call a stateful one item by item.
        found = tf.numpy_function(self._tensor, [data], tf.float32, stateful=False)
        return tf.cast(tf.ensure_shape(found, self.shape), self.dtype)

    def fill(self, rows: Any, files: Sequence[bytes]) -> None:
        """Decode the files into `rows`, as `decode` does, but without a graph. Raises Unusable."""
        for row, data in zip(rows, files, strict=True):
            row[...] = images.tensor(data, self.options, whole=self.dtype.is_integer)

    def _tensor(self, data: bytes) -> Any:
        """Called by TensorFlow, which keeps only the text of an error."""
        try:
            return images.tensor(data, self.options, whole=self.dtype.is_integer)
        except Unusable as error:
            raise ValueError(f"{_NO_IMAGE}{error}{_END}") from error


@dataclass(frozen=True)
class TextDecoder:
    """Makes the text itself, of shape () or (1,)."""

    shape: tuple[int, ...]
    dtype: Any = tf.string

    def decode(self, data: Any) -> Any:
        return tf.reshape(data, self.shape)


@dataclass(frozen=True)
class AudioDecoder:
    """Makes float32 (samples,) or (samples, channels) from -1 to 1. A longer recording is cut, a shorter one padded with zeros.

    One channel is the mean of the recording's channels. For more channels, the last one is repeated, or surplus ones are dropped.
    """

    shape: tuple[int, ...]
    dtype: Any = tf.float32

    def decode(self, data: Any) -> Any:
        channels = self.shape[1] if len(self.shape) > 1 else 1
        samples, _ = tf.audio.decode_wav(data, -1 if channels == 1 else channels, self.shape[0])
        if channels == 1:
            samples = tf.reduce_mean(samples, axis=1)
        return tf.reshape(samples, self.shape)


def decoder_for(model: Any, data: DataFormat, image: ImageOptions | None) -> Decoder | None:
    """The decoder for this data; None: arrays need none. Raises InvalidModel and InvalidRequest if data and model do not fit."""
    match data.kind:
        case "images":
            return ImageDecoder(options_for(model, image), tf.as_dtype(model.inputs[0].dtype))
        case "texts":
            return TextDecoder(_text_shape(model))
        case "audio":
            return AudioDecoder(_audio_shape(model))
        case "arrays":
            return None


def item_bytes(decoder: Decoder) -> int:
    """Memory of one decoded item; 0: the same as its file."""
    return 0 if decoder.dtype == tf.string else math.prod(decoder.shape) * int(decoder.dtype.size)


def options_for(model: Any, image: ImageOptions | None) -> ImageOptions:
    """The options that were asked for, else the size of the model's input and the scale that its layers expect. `scale` is set.

    Raises InvalidModel if the input takes no images of that size.
    """
    shape = _only_input(model)
    if shape is None or len(shape) != 3:
        raise _unfit(model, "images", "(height, width, channels)")
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
    if asked[2] not in CHANNELS:
        raise InvalidModel(
            f"the model's input has shape {shown(shape)}: images have 1, 3 or 4 channels, in the last place"
        )
    scale = image.scale if image is not None and image.scale is not None else pixels.scale_for(model)
    found = ImageOptions(height=asked[0], width=asked[1], channels=asked[2], scale=scale)
    check_scale(found, pixels.input_dtype(model))
    return found


def undecodable(error: Exception, where: str) -> InvalidData:
    text = str(error)
    if isinstance(error, Unusable) or _NO_IMAGE in text:
        reason = text if isinstance(error, Unusable) else text.partition(_NO_IMAGE)[2].partition(_END)[0]
        return InvalidData(f"an image cannot be decoded ({where}): {one_line(reason, 200)}")
    reason = one_line(getattr(error, "message", error), 200)
    return InvalidData(f"a recording cannot be decoded ({where}): {reason}: TensorFlow reads WAV files of 16-bit PCM")


def is_undecodable(error: Exception) -> bool:
    """Whether a step failed at the decoding of an item."""
    return any(sign in str(error) for sign in (_NO_IMAGE, "DecodeWav"))


def _text_shape(model: Any) -> tuple[int, ...]:
    shape = _only_input(model, text=True)
    if shape not in ((), (1,)):
        raise _unfit(
            model, "texts", "of text, keras.Input((), dtype='string'), with a TextVectorization layer behind it"
        )
    return shape


def _audio_shape(model: Any) -> tuple[int, ...]:
    shape = _only_input(model)
    if shape is None or len(shape) not in (1, 2):
        raise _unfit(model, "recordings", "(samples,) or (samples, channels)")
    if None in shape:
        raise InvalidModel(
            f"the model's input has shape {shown(shape)}: recordings are cut or padded to one length, so build the model "
            "with keras.Input((samples,)) or keras.Input((samples, channels))"
        )
    return shape


def _only_input(model: Any, *, text: bool = False) -> tuple[Any, ...] | None:
    """The shape of an item; None: the model has several inputs, or one of the wrong kind (text or not)."""
    if len(model.inputs) > 1 or (keras_models.signature(model).inputs[0].datatype == "BYTES") != text:
        return None
    return tuple(model.inputs[0].shape)[1:]


def _unfit(model: Any, items: str, expected: str) -> InvalidModel:
    names = ", ".join(
        f"{spec.name} {shown(spec.shape[1:])}{' of text' if spec.datatype == 'BYTES' else ''}"
        for spec in keras_models.signature(model).inputs
    )
    return InvalidModel(f"the data is {items}, but the model takes {names}: expected one {expected}")
