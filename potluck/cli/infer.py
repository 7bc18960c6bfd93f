"""`potluck infer`: ask a deployed model about an image, a text, a recording, an array, or JSON."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from potluck.cli import completion
from potluck.cli.session import ImageSize, Json, image_size, session
from potluck.wording import printable

if TYPE_CHECKING:
    import numpy as np

    from potluck.wire.questions import ModelInfo
    from potluck.wire.values import ImageOptions

_SHOWN_CLASSES = 5
_GIVE = "give an image, .txt, .wav, .npy, .json, or JSON itself"


def infer(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="A deployed `name`, `name:version` or `name:alias`.", autocompletion=completion.deployments
        ),
    ],
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Images, .txt, .wav or .npy files, or a folder of them; or a .json file, JSON itself, or - for JSON on standard input.",
        ),
    ],
    image: ImageSize = None,
    as_json: Json = False,
) -> None:
    """Ask a deployed model for its answer to an input."""
    import numpy as np

    from potluck.cli import output
    from potluck.client import files
    from potluck.client.models import image_options
    from potluck.data import images, items
    from potluck.errors import InvalidRequest
    from potluck.scores import of_classes

    if not all(sources):
        raise InvalidRequest(f"INPUT is empty: {_GIVE}")
    size = image_size(image)
    with session(context).client() as client:
        info = client.deployed_model(model)
        asked = image_options(size, items.input_shape(info))
        names: list[str] = []
        if len(sources) == 1 and not Path(sources[0]).is_dir():
            found = client.infer(model, read_input(sources[0], info, asked))
            names = [path for path in sources if Path(path).suffix.lower() in {*images.KIND.suffixes, ".txt", ".wav"}]
        else:
            paths = files.paths([Path(source) for source in sources], info)
            names = [str(path) for path in paths]
            found = client.infer(model, paths, image=asked)
    outputs = found if isinstance(found, dict) else {"": found}
    if any(array.dtype.kind == "f" and not np.isfinite(array).all() for array in outputs.values()):
        output.note("the answer has numbers that are not finite (infinite, or not a number): JSON shows them as null")
    if as_json:
        told = {"model": f"{info.name}:{info.version}", "classes": info.classes, "outputs": found}
        output.emit({**told, "files": names} if names else told)
        return
    for name, array in outputs.items():
        rows = names if len(names) == len(array) else list(map(str, range(len(array))))
        scores, labels = of_classes(array, info.classes) if array.ndim == 2 else (array, ())
        if labels:
            output.show(_scores(scores, labels, rows))
            continue
        before = f"{name}: " if name else ""
        if names:
            for row, answer in zip(rows, array, strict=True):
                output.show(f"{before}{printable(row)}: {json.dumps(output.plain(answer))}")
        else:
            output.show(f"{before}{json.dumps(output.plain(array))}")


def read_input(source: str, info: ModelInfo, image: ImageOptions | None) -> Any:
    """The model's input: an array with its batch axis, or a map of arrays. Raises InvalidData; InvalidRequest for `image` with arrays."""
    import numpy as np

    from potluck.client import files
    from potluck.data import items
    from potluck.errors import InvalidData, InvalidRequest

    path = Path(source)
    if source == "-" or source.lstrip()[:1] in ("[", "{", '"') or path.suffix == ".json":
        if image is not None:
            raise InvalidRequest("--image is only for images, and this input is not an image: leave --image out")
        try:
            value = json.loads(
                sys.stdin.read() if source == "-" else path.read_text() if path.suffix == ".json" else source
            )
        except (ValueError, OSError) as error:
            raise InvalidData(f"the input is not JSON: {error}") from error
        if (place := _not_finite(value)) is not None:
            raise InvalidData(f"the input has a number that is not finite{place and f' at {place}'}: give one that is")
        try:
            if isinstance(value, str):
                return items.text(value.encode(), info, "the input")
            if isinstance(value, dict):
                return {
                    name: np.asarray(array, dtype=np.float32) if _is_float(array) else np.asarray(array)
                    for name, array in value.items()
                }
            with np.errstate(over="ignore"):  # as on a node: a value too large for float32 becomes infinite
                return files.with_batch(np.asarray(value, dtype=_dtype_of(info)), info)
        except (ValueError, TypeError) as error:
            raise InvalidData(f"the model cannot take this input as an array: {error}") from error
    try:
        there = path.is_file()
    except OSError:  # the text is too long for a file's name, or its folder may not be read
        there = False
    if not there:
        raise InvalidData(f"there is no file {path}: {_GIVE}")
    return files.read([path], info, image)


def _dtype_of(info: ModelInfo) -> Any:
    """The dtype for JSON input: that of the model's only input where it takes whole numbers or text, else float32."""
    import numpy as np

    from potluck.data.items import takes_text
    from potluck.wire.tensors import DTYPES

    inputs = info.signature.inputs if info.signature is not None else ()
    if takes_text(info):
        return np.dtype(object)
    wanted = DTYPES.get(inputs[0].datatype) if len(inputs) == 1 else None
    return wanted if wanted is not None and wanted.kind in "iub" else np.dtype(np.float32)


def _not_finite(value: Any) -> str | None:
    """The place of the first number in JSON that is infinite (1e999 becomes so) or not a number, as `[0][2]`."""
    if isinstance(value, float):
        return None if math.isfinite(value) else ""
    within = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in within:
        if (place := _not_finite(item)) is not None:
            return f"[{json.dumps(key)}]{place}"
    return None


def _is_float(value: Any) -> bool:
    while isinstance(value, list) and value:
        value = value[0]
    return isinstance(value, float)


def _scores(scores: np.ndarray[Any, Any], classes: tuple[str, ...], items: list[str]) -> Any:
    from potluck.cli import output

    rows = []
    for item, row in zip(items, scores, strict=True):
        best = row.argsort()[::-1][:_SHOWN_CLASSES]
        rows.append((item, *(f"{classes[at]} {row[at]:.4f}" for at in best.tolist())))
    return output.table(("item", "best", *[""] * (min(_SHOWN_CLASSES, len(classes)) - 1)), rows)
