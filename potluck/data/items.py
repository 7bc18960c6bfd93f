"""One item (an image, a text or a recording) as a tensor for a model, exactly as nodes make it from a data set."""

from __future__ import annotations

from typing import Any

import numpy as np
from msgspec.structs import replace

from potluck.data import images
from potluck.data.audio import fitted
from potluck.data.folders import Unusable
from potluck.errors import InvalidData, InvalidRequest
from potluck.wire.questions import ModelInfo
from potluck.wire.tensors import DTYPES, shape_text
from potluck.wire.values import ImageOptions

Array = np.ndarray[Any, Any]
CHANNELS = (1, 3, 4)
"""How many channels an image may have."""


def input_shape(info: ModelInfo) -> tuple[int | None, ...] | None:
    """The shape of the model's only input, with None for free sizes; None where it has several inputs or does not say."""
    if info.signature is None or len(info.signature.inputs) != 1:
        return None
    return tuple(None if size < 0 else size for size in info.signature.inputs[0].shape)


def takes_text(info: ModelInfo) -> bool:
    return info.signature is not None and [spec.datatype for spec in info.signature.inputs] == ["BYTES"]


def input_dtype(info: ModelInfo) -> np.dtype[Any]:
    """The dtype of the model's only input; float32 where it has several, takes text, or does not say."""
    inputs = info.signature.inputs if info.signature is not None else ()
    return DTYPES.get(inputs[0].datatype, np.dtype(np.float32)) if len(inputs) == 1 else np.dtype(np.float32)


def image(data: bytes, options: ImageOptions, what: str = "the image", dtype: Any = np.float32) -> Array:
    """(height, width, channels) of `dtype`, as `images.tensor` makes it. Raises InvalidData."""
    dtype = np.dtype(dtype)
    try:
        return images.tensor(data, options, whole=dtype.kind in "iu").astype(dtype, copy=False)
    except Unusable as error:
        raise InvalidData(f"{what} cannot be read as an image: {error}") from error


def text(data: bytes, info: ModelInfo, what: str = "the text") -> Array:
    """The whole text as a batch of one. Raises InvalidData, InvalidRequest."""
    if not takes_text(info):
        raise InvalidRequest(f"{what} is text, but model {info.name}:{info.version} takes no text")
    try:
        found = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidData(f"{what} cannot be read as text in UTF-8: {error}") from error
    if not found.strip():
        raise InvalidData(f"{what} is empty: give a text with words in it")
    return np.asarray([found], object).reshape([1] * len(input_shape(info) or (1,)))


def recording(data: bytes, info: ModelInfo, what: str = "the recording") -> Array:
    """A WAV file as a batch of one, cut or padded to the model's input. Raises InvalidData, InvalidRequest."""
    shape = input_shape(info)
    sizes = [size for size in shape[1:] if size is not None] if shape is not None else []
    if shape is None or len(shape) not in (2, 3) or len(sizes) != len(shape) - 1 or takes_text(info):
        raise InvalidRequest(
            f"{what} is a recording, but model {info.name}:{info.version} does not take (samples,) or (samples, channels)"
        )
    try:
        return fitted(data, tuple(sizes), info.rate)[np.newaxis]
    except Unusable as error:
        raise InvalidData(f"{what} cannot be read as a recording: {error}") from error


def are_pixels(array: Array, dtype: np.dtype[Any]) -> bool:
    """Whether these are 8-bit images for an input of floats: only a decoder of images makes such arrays."""
    return array.dtype == np.uint8 and np.dtype(dtype).kind == "f" and array.ndim == 4 and array.shape[3] in CHANNELS


def image_options(info: ModelInfo, hint: str, asked: ImageOptions | None = None) -> ImageOptions:
    """How images become the model's input, complete: as asked, else as registered, else as the input and its layers show.

    Raises InvalidRequest: with `hint` where the size of images is unknown, for a model that takes no images, and where `scale` leaves
    nothing of the pixels.
    """
    shape = input_shape(info)
    if shape is not None and len(shape) != 4:
        raise InvalidRequest(
            f"model {info.name}:{info.version} takes no images: its input has the shape {shape_text(shape)}"
        )
    known = asked or info.image
    if known is None:
        if shape is None or not shape[1] or not shape[2]:
            raise InvalidRequest(f"model {info.name}:{info.version} does not say what size its images have{hint}")
        known = ImageOptions(height=shape[1], width=shape[2])
    if shape is not None and len(shape) == 4 and shape[3] in CHANNELS:
        known = replace(known, channels=shape[3])
    if known.scale is None:
        known = replace(known, scale=scale(info))
    check_scale(known, input_dtype(info))
    return known


def scale(info: ModelInfo) -> float:
    """The factor for pixels of 0 to 255, where nobody gives one for this image."""
    if info.image is not None and info.image.scale is not None:
        return info.image.scale
    return scale_of(info.signature.pixel_scale if info.signature is not None else 0.0, input_dtype(info))


def scale_of(expected: float, dtype: np.dtype[Any]) -> float:
    """The default factor for a model whose layers expect pixels times `expected` (0: unknown), and whose input has this dtype."""
    return 1.0 if dtype.kind in "iu" else expected or images.DEFAULT_SCALE


def check_scale(options: ImageOptions, dtype: np.dtype[Any]) -> None:
    """Raises InvalidRequest where the dtype of a model's input cannot hold the pixels."""
    if dtype.kind not in "iu":
        return
    if (largest := np.iinfo(dtype).max) < 255:
        raise InvalidRequest(
            f"the model's input is whole numbers of at most {largest} ({dtype.name}), but pixels are 0 to 255: begin the model with an "
            "input of uint8, or of floats"
        )
    if options.scale is not None and (options.scale < 1 or 255 * options.scale > largest):
        raise InvalidRequest(
            f"the model's input is whole numbers ({dtype.name}), but pixels of 0 to 255 times {options.scale:g} do not fit into them: "
            "leave out the scale"
        )


def pixels_text(options: ImageOptions) -> str:
    """How images become a model's input, as a text for people."""
    size = f"{options.height}x{options.width}x{options.channels}"
    if options.scale is None:
        return f"{size}, pixels as the model's own layers expect them"
    if options.scale == 1.0:
        return f"{size}, pixels 0 to 255"
    if abs(options.scale * 255 - 1) < 1e-6:
        return f"{size}, pixels 0 to 1 (times 1/255)"
    return f"{size}, pixels times {options.scale:g}"
