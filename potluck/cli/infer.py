"""`potluck infer`: ask a deployed model about an image, a text, a recording, an array, or JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from potluck.cli.predict import read_array
from potluck.cli.session import ImageSize, Json, image_size, session

if TYPE_CHECKING:
    import numpy as np

    from potluck.messages import ImageOptions, ModelInfo

_SHOWN_CLASSES = 5


NO_IMAGES = (".npz", ".csv", ".parquet", ".tfrecord", ".keras", ".h5", ".pkl", ".zip")
"""Files that people try, and that are no images whatever is in them."""


def infer(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A deployed `name` or `name:version`.")],
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="An image, .txt or .wav file, .npy, .json, JSON itself, or - for JSON on standard input.",
        ),
    ],
    image: ImageSize = None,
    as_json: Json = False,
) -> None:
    """Ask a deployed model."""
    from potluck.cli import output
    from potluck.client.models import image_options

    size = image_size(image)
    with session(context).client() as client:
        info = client.get_model(model)
        asked = image_options(size, _input_shape(info))
        inputs = read_input(source, info, asked)
        found = client.infer(model, inputs)
    outputs = found if isinstance(found, dict) else {"": found}
    if as_json:
        output.emit({"model": f"{info.name}:{info.version}", "classes": info.classes, "outputs": found})
        return
    for name, array in outputs.items():
        if array.ndim == 2 and array.shape[1] == len(info.classes) and info.classes:
            output.show(_scores(array, info.classes))
        else:
            output.show(f"{name + ': ' if name else ''}{json.dumps(output.plain(array))}")


def read_input(source: str, info: ModelInfo, image: ImageOptions | None) -> Any:
    """What to ask: an array with its batch axis, or a map of them. Raises InvalidData; InvalidRequest for `image` with arrays."""
    import numpy as np

    from potluck.errors import InvalidData, InvalidRequest

    path = Path(source)
    is_json = source == "-" or source.lstrip()[:1] in ("[", "{") or path.suffix == ".json"
    if image is not None and (is_json or path.suffix.lower() in (".npy", ".txt", ".wav")):
        raise InvalidRequest("--image says how an image becomes a tensor, and the input is no image: leave it out")
    if path.suffix == ".npy":
        return _with_batch(read_array(path), info)
    if is_json:
        try:
            value = json.loads(
                sys.stdin.read() if source == "-" else path.read_text() if path.suffix == ".json" else source
            )
        except (ValueError, OSError) as error:
            raise InvalidData(f"the input is not JSON: {error}") from error
        try:
            if isinstance(value, dict):
                return {
                    name: np.asarray(array, dtype=np.float32) if _is_float(array) else np.asarray(array)
                    for name, array in value.items()
                }
            with np.errstate(over="ignore"):  # too large for float32 is infinite, as on a node
                return _with_batch(np.asarray(value, dtype=_dtype_of(info)), info)
        except (ValueError, TypeError) as error:
            raise InvalidData(f"the input is not an array that the model takes: {error}") from error
    try:
        there = path.is_file()
    except OSError:  # too long for a name, or in a folder that may not be read
        there = False
    if not there:
        raise InvalidData(f"there is no file {path}: give an image, .txt, .wav, .npy, .json, or JSON itself")
    if path.suffix.lower() == ".txt":
        return read_text(path, info)
    if path.suffix.lower() == ".wav":
        return read_recording(path, info)
    if path.suffix.lower() in NO_IMAGES:
        raise InvalidData(
            f"{path} is no image: give an image, .npy, or JSON (for several inputs a map of them by name)"
        )
    return read_image(path, image or info.image or _image_of(info))[np.newaxis]


def _dtype_of(info: ModelInfo) -> Any:
    """What JSON becomes: the datatype of the model's only input where that is whole numbers or text, else float32."""
    import numpy as np

    from potluck.tensors import DTYPES

    inputs = info.signature.inputs if info.signature is not None else ()
    if _takes_text(info):
        return np.dtype(object)
    wanted = DTYPES.get(inputs[0].datatype) if len(inputs) == 1 else None
    return wanted if wanted is not None and wanted.kind in "iub" else np.dtype(np.float32)


def _takes_text(info: ModelInfo) -> bool:
    return info.signature is not None and [spec.datatype for spec in info.signature.inputs] == ["BYTES"]


def read_text(path: Path, info: ModelInfo) -> np.ndarray[Any, Any]:
    """The whole file as one item. Raises InvalidData, InvalidRequest."""
    import numpy as np

    from potluck.errors import InvalidData, InvalidRequest

    if not _takes_text(info):
        raise InvalidRequest(f"{path} is text, and model {info.name}:{info.version} takes none")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidData(f"{path} cannot be read as text in UTF-8: {error}") from error
    return np.asarray([text], object).reshape([1] * len(_input_shape(info) or (1,)))


def read_recording(path: Path, info: ModelInfo) -> np.ndarray[Any, Any]:
    """A WAV file as the nodes make it: cut or padded to the model's input. Raises InvalidData, InvalidRequest."""
    import numpy as np

    from potluck.data.audio import fitted
    from potluck.data.folders import Unusable
    from potluck.errors import InvalidData, InvalidRequest

    shape = _input_shape(info)
    sizes = [size for size in shape[1:] if size is not None] if shape is not None else []
    if shape is None or len(shape) not in (2, 3) or len(sizes) != len(shape) - 1 or _takes_text(info):
        raise InvalidRequest(
            f"{path} is a recording, and model {info.name}:{info.version} does not take (samples,) or (samples, channels)"
        )
    try:
        return fitted(path.read_bytes(), tuple(sizes), info.rate)[np.newaxis]
    except (OSError, Unusable) as error:
        raise InvalidData(f"{path} cannot be read as a recording: {error}") from error


def read_image(path: Path, options: ImageOptions) -> np.ndarray[Any, Any]:
    """The pixels as the nodes make them: `channels`, resized bilinearly without smoothing, scaled; float32 (h, w, c)."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    from potluck.errors import InvalidData

    try:
        with Image.open(path) as opened:
            pixels = np.asarray(opened.convert({1: "L", 3: "RGB", 4: "RGBA"}[options.channels]), dtype=np.float32)
    except FileNotFoundError as error:
        raise InvalidData(f"there is no file {path}: give an image, .npy, .json, or JSON itself") from error
    except (UnidentifiedImageError, OSError) as error:
        raise InvalidData(f"{path} cannot be read as an image: give an image, .npy, .json, or JSON itself") from error
    pixels = pixels.reshape(*pixels.shape[:2], options.channels)
    pixels = _resize_axis(_resize_axis(pixels, 0, options.height), 1, options.width)
    return (pixels * options.scale).astype(np.float32)


def _resize_axis(pixels: np.ndarray[Any, Any], axis: int, size: int) -> np.ndarray[Any, Any]:
    """Bilinear with pixel centres at one half, as `tf.image.resize` does it without antialias."""
    import numpy as np

    before = pixels.shape[axis]
    if before == size:
        return pixels
    at = (np.arange(size) + 0.5) * before / size - 0.5
    low = np.floor(at)
    share = (at - low).astype(np.float32).reshape([-1 if index == axis else 1 for index in range(pixels.ndim)])
    first = pixels.take(np.clip(low, 0, before - 1).astype(int), axis)
    second = pixels.take(np.clip(low + 1, 0, before - 1).astype(int), axis)
    resized: np.ndarray[Any, Any] = first * (1 - share) + second * share
    return resized


def _input_shape(info: ModelInfo) -> tuple[int | None, ...] | None:
    if info.signature is None or len(info.signature.inputs) != 1:
        return None
    return tuple(None if size < 0 else size for size in info.signature.inputs[0].shape)


def _image_of(info: ModelInfo) -> ImageOptions:
    from potluck.client.models import image_options
    from potluck.errors import InvalidRequest

    shape = _input_shape(info)
    if shape is None or len(shape) != 4 or None in shape[1:3]:
        raise InvalidRequest(
            f"model {info.name}:{info.version} does not say what size its images have: add --image HxW"
        )
    made = image_options((shape[1] or 0, shape[2] or 0), shape)
    assert made is not None
    return made


def _with_batch(array: np.ndarray[Any, Any], info: ModelInfo) -> np.ndarray[Any, Any]:
    """A single item gets the batch axis that it lacks."""
    shape = _input_shape(info)
    return array[None] if shape is not None and array.ndim == len(shape) - 1 else array


def _is_float(value: Any) -> bool:
    while isinstance(value, list) and value:
        value = value[0]
    return isinstance(value, float)


def _scores(scores: np.ndarray[Any, Any], classes: tuple[str, ...]) -> Any:
    from potluck.cli import output

    rows = []
    for index, row in enumerate(scores):
        best = row.argsort()[::-1][:_SHOWN_CLASSES]
        rows.append((str(index), *(f"{classes[at]} {row[at]:.4f}" for at in best.tolist())))
    return output.table(("item", "best", *[""] * (min(_SHOWN_CLASSES, len(classes)) - 1)), rows)
