"""`potluck predict`: outputs for a whole data set, as CSV, JSON or numpy."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from potluck.cli import completion
from potluck.cli.session import ImageSize, Json, check_output, image_size, session
from potluck.wording import counted

if TYPE_CHECKING:
    import numpy as np

    from potluck.client import Job

SUFFIXES = (".csv", ".json", ".npy", ".npz")


def predict(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="A .keras file, or a registered model.", autocompletion=completion.model_files)
    ],
    data: Annotated[
        str,
        typer.Argument(
            help="A folder of images, .txt or .wav files, an .npy, .npz, .csv, .parquet or TFRecord file, or a registered data set.",
            autocompletion=completion.data,
        ),
    ],
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    image: ImageSize = None,
    target: Annotated[
        list[str] | None, typer.Option(help="A column or array to leave out of the inputs. Repeat it for more.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write a .csv, .json, .npy or .npz file (default: CSV, printed)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Predict on the nodes: each item once, in input order."""
    from potluck.cli import following
    from potluck.cli import output as out

    if output is not None:
        check_output(output)
        check_suffix(output)
    size = image_size(image)
    with session(context).client() as client:
        with following.waiting("packing and sending the data", quiet=as_json):
            job = client.predict(model, data, batch_size=batch_size, image=size, target=target or None)
        if not as_json:
            following.name_data(job, data)
        classes = following.ended(job, as_json, verbose=session(context).verbose).classes
        outputs, keys = predicted(job), job.keys
    if output is not None:
        output = save(output, outputs, keys, classes)
    if as_json:
        out.emit(as_map(outputs, keys, classes) if output is None else {"job_id": job.id, "output": str(output)})
    elif output is None:
        sys.stdout.write(as_csv(outputs, keys, classes))
    else:
        out.show(f"{counted(len(next(iter(outputs.values()))), 'prediction')} written to {output}")


def check_suffix(path: Path) -> None:
    """Raises InvalidRequest where predictions cannot be written to a file with this suffix."""
    from potluck.errors import InvalidRequest

    if path.suffix not in SUFFIXES:
        raise InvalidRequest(f"--output {path}: the file's name must end with {', '.join(SUFFIXES)}")


def predicted(job: Job) -> dict[str, np.ndarray[Any, Any]]:
    """A job's predictions by output; a model's only output has the name ''."""
    found = job.predictions
    return found if isinstance(found, dict) else {"": found}


def save(path: Path, outputs: dict[str, np.ndarray[Any, Any]], keys: list[str], classes: tuple[str, ...]) -> Path:
    """Write the predictions, and tell where the file has another name than asked for. Raises InvalidRequest."""
    from potluck.cli.output import note

    written = write(path, outputs, keys, classes)
    if written != path:
        note(
            f"the model has {counted(len(outputs), 'output')}, and a .npy file holds only one: they are in a .npz file"
        )
    return written


def write(path: Path, outputs: dict[str, np.ndarray[Any, Any]], keys: list[str], classes: tuple[str, ...]) -> Path:
    """Write predictions in the suffix's format (several outputs: `.npz` instead of `.npy`); returns the path. Raises InvalidRequest."""
    import numpy as np

    from potluck.cli.output import plain
    from potluck.errors import InvalidRequest

    # The number of outputs is known only now, and the work is done: do not refuse it.
    if path.suffix == ".npy" and len(outputs) > 1:
        path = path.with_suffix(".npz")
    try:
        if path.suffix == ".npy":
            np.save(path, next(iter(outputs.values())))
        elif path.suffix == ".npz":
            np.savez(path, **{name or "predictions": array for name, array in outputs.items()})  # type: ignore[arg-type]
        elif path.suffix == ".json":
            path.write_text(json.dumps(plain(as_map(outputs, keys, classes)), allow_nan=False), encoding="utf-8")
        else:
            path.write_text(as_csv(outputs, keys, classes), encoding="utf-8", newline="")
    except OSError as error:
        raise InvalidRequest(f"--output {path} cannot be written: {error.strerror}") from error
    return path


def as_map(outputs: dict[str, np.ndarray[Any, Any]], keys: list[str], classes: tuple[str, ...]) -> dict[str, Any]:
    """Everything as JSON has it: `predictions` is a list, or a map of lists for a model with several outputs."""
    found: Any = outputs if len(outputs) > 1 else next(iter(outputs.values()))
    return {"keys": keys, "classes": list(classes), "predicted": labels(outputs, classes), "predictions": found}


def as_csv(outputs: dict[str, np.ndarray[Any, Any]], keys: list[str], classes: tuple[str, ...]) -> str:
    """One row per item: its key, the predicted class where there are classes, then every number."""
    count = len(next(iter(outputs.values())))
    predicted = labels(outputs, classes)
    flat = {name: array.reshape(count, -1) for name, array in outputs.items()}
    header = ["key", *(["predicted"] if predicted else [])]
    for name, array in flat.items():
        columns = classes if len(flat) == 1 and array.shape[1] == len(classes) else range(array.shape[1])
        header += [f"{name}_{column}" if len(flat) > 1 else str(column) for column in columns]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in range(count):
        key = keys[row] if row < len(keys) else str(row)
        numbers = [value for array in flat.values() for value in array[row].tolist()]
        writer.writerow([key, *([predicted[row]] if predicted else []), *numbers])
    return text.getvalue()


def labels(outputs: dict[str, np.ndarray[Any, Any]], classes: tuple[str, ...]) -> list[str]:
    """The class with the highest score for each item; empty where the outputs are not scores of these classes."""
    from potluck.scores import of_classes

    if len(outputs) != 1 or (scores := next(iter(outputs.values()))).ndim != 2:
        return []
    scores, found = of_classes(scores, classes)
    return [found[index] for index in scores.argmax(axis=1).tolist()] if found else []
