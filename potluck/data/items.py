"""One item, an image, a text or a recording, as the tensor that a model takes: just as the nodes make it of a data set."""

from __future__ import annotations

from typing import Any

import numpy as np

from potluck.data import images
from potluck.data.audio import fitted
from potluck.data.folders import Unusable
from potluck.errors import InvalidData, InvalidRequest
from potluck.messages import ImageOptions, ModelInfo

Array = np.ndarray[Any, Any]
PIXELS_LIMIT = 64_000_000
"""Of an image as it is in the file; decoded, it takes up to 4 bytes a pixel, twice."""
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")
"""What is decoded: Pillow knows others, some by way of other programs."""
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def input_shape(info: ModelInfo) -> tuple[int | None, ...] | None:
    """That of the model's only input, None for free sizes; None where it has several, or does not say."""
    if info.signature is None or len(info.signature.inputs) != 1:
        return None
    return tuple(None if size < 0 else size for size in info.signature.inputs[0].shape)


def takes_text(info: ModelInfo) -> bool:
    return info.signature is not None and [spec.datatype for spec in info.signature.inputs] == ["BYTES"]


def image(data: bytes, options: ImageOptions, what: str = "the image") -> Array:
    """float32 of (height, width, channels): `channels`, resized bilinearly without smoothing, scaled. Raises InvalidData."""
    try:
        with images.opened(data, FORMATS) as found:
            if found.width * found.height > PIXELS_LIMIT:
                raise Unusable(f"it has {found.width} x {found.height} pixels, and {PIXELS_LIMIT} are decoded at most")
            pixels = np.asarray(found.convert(_MODES[options.channels]))
    except Unusable as error:
        raise InvalidData(f"{what} cannot be read as an image: {error}") from error
    pixels = pixels.reshape(*pixels.shape[:2], options.channels)
    pixels = _resize_axis(_resize_axis(pixels, 0, options.height), 1, options.width)
    return (pixels.astype(np.float32, copy=False) * options.scale).astype(np.float32)


def text(data: bytes, info: ModelInfo, what: str = "the text") -> Array:
    """The whole of it as a batch of one. Raises InvalidData, InvalidRequest."""
    if not takes_text(info):
        raise InvalidRequest(f"{what} is text, and model {info.name}:{info.version} takes none")
    try:
        found = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidData(f"{what} cannot be read as text in UTF-8: {error}") from error
    return np.asarray([found], object).reshape([1] * len(input_shape(info) or (1,)))


def recording(data: bytes, info: ModelInfo, what: str = "the recording") -> Array:
    """A WAV file as a batch of one, cut or padded to the model's input. Raises InvalidData, InvalidRequest."""
    shape = input_shape(info)
    sizes = [size for size in shape[1:] if size is not None] if shape is not None else []
    if shape is None or len(shape) not in (2, 3) or len(sizes) != len(shape) - 1 or takes_text(info):
        raise InvalidRequest(
            f"{what} is a recording, and model {info.name}:{info.version} does not take (samples,) or (samples, channels)"
        )
    try:
        return fitted(data, tuple(sizes), info.rate)[np.newaxis]
    except Unusable as error:
        raise InvalidData(f"{what} cannot be read as a recording: {error}") from error


def image_options(info: ModelInfo, hint: str) -> ImageOptions:
    """How images become the model's input: as it was trained, else by its input's shape. Raises InvalidRequest, with `hint`."""
    if info.image is not None:
        return info.image
    shape = input_shape(info)
    if shape is not None and len(shape) == 4 and shape[1] and shape[2]:
        channels = shape[3] if shape[3] in _MODES else 3
        return ImageOptions(height=shape[1], width=shape[2], channels=channels)  # type: ignore[arg-type]
    raise InvalidRequest(f"model {info.name}:{info.version} does not say what size its images have{hint}")


def _resize_axis(pixels: Array, axis: int, size: int) -> Array:
    """Bilinear with pixel centres at one half, as `tf.image.resize` does it without antialias."""
    before = pixels.shape[axis]
    if before == size:
        return pixels
    at = (np.arange(size) + 0.5) * before / size - 0.5
    low = np.floor(at)
    share = (at - low).astype(np.float32).reshape([-1 if index == axis else 1 for index in range(pixels.ndim)])
    first = pixels.take(np.clip(low, 0, before - 1).astype(int), axis)
    second = pixels.take(np.clip(low + 1, 0, before - 1).astype(int), axis)
    resized: Array = first * (1 - share) + second * share
    return resized
