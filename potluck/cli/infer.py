"""`potluck infer`: ask a deployed model about an image, a text, a recording, an array, or JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from potluck.cli import completion
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
    model: Annotated[
        str,
        typer.Argument(
            help="A deployed `name`, `name:version` or `name:alias`.", autocompletion=completion.deployments
        ),
    ],
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
    from potluck.data.items import input_shape
    from potluck.scores import of_classes

    size = image_size(image)
    with session(context).client() as client:
        info = client.get_model(model)
        asked = image_options(size, input_shape(info))
        inputs = read_input(source, info, asked)
        found = client.infer(model, inputs)
    outputs = found if isinstance(found, dict) else {"": found}
    if as_json:
        output.emit({"model": f"{info.name}:{info.version}", "classes": info.classes, "outputs": found})
        return
    for name, array in outputs.items():
        scores, labels = of_classes(array, info.classes) if array.ndim == 2 else (array, ())
        if labels:
            output.show(_scores(scores, labels))
        else:
            output.show(f"{name + ': ' if name else ''}{json.dumps(output.plain(array))}")


def read_input(source: str, info: ModelInfo, image: ImageOptions | None) -> Any:
    """What to ask: an array with its batch axis, or a map of them. Raises InvalidData; InvalidRequest for `image` with arrays."""
    import numpy as np

    from potluck.data import items
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
        return items.text(_read(path, "text"), info, str(path))
    if path.suffix.lower() == ".wav":
        return items.recording(_read(path, "a recording"), info, str(path))
    if path.suffix.lower() in NO_IMAGES:
        raise InvalidData(
            f"{path} is no image: give an image, .npy, or JSON (for several inputs a map of them by name)"
        )
    options = image or items.image_options(info, ": add --image HxW")
    return items.image(_read(path, "an image"), options, str(path))[np.newaxis]


def _dtype_of(info: ModelInfo) -> Any:
    """What JSON becomes: the datatype of the model's only input where that is whole numbers or text, else float32."""
    import numpy as np

    from potluck.data.items import takes_text
    from potluck.tensors import DTYPES

    inputs = info.signature.inputs if info.signature is not None else ()
    if takes_text(info):
        return np.dtype(object)
    wanted = DTYPES.get(inputs[0].datatype) if len(inputs) == 1 else None
    return wanted if wanted is not None and wanted.kind in "iub" else np.dtype(np.float32)


def _read(path: Path, what: str) -> bytes:
    from potluck.errors import InvalidData

    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidData(f"{path} cannot be read as {what}: {error.strerror}") from error


def _with_batch(array: np.ndarray[Any, Any], info: ModelInfo) -> np.ndarray[Any, Any]:
    """A single item gets the batch axis that it lacks."""
    from potluck.data.items import input_shape

    shape = input_shape(info)
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
