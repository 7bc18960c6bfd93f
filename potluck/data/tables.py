"""CSV files (RFC 4180, with a header) as arrays: numeric columns are one input `x`, the target column is `y`."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from potluck.errors import InvalidData

Array = np.ndarray[Any, Any]


def read_csv(path: Path, target: str | None) -> tuple[dict[str, Array], tuple[str, ...], str | None]:
    """(arrays, class names, name of the target array). A target of text becomes class indexes in the order of the alphabet.

    Without `target` a column named `y`, `target`, `label` or `class` is taken, else there is none. Raises InvalidData,
    naming row and column.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            rows = [row for row in reader if row]
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise InvalidData(f"{path} cannot be read as CSV: {error}") from error
    if not header or not rows:
        raise InvalidData(f"{path} needs a header line and at least one row")
    if len(set(header)) != len(header):
        raise InvalidData(f"{path}: two columns have the same name")
    if all(_number(name) for name in header):
        raise InvalidData(f"{path} has no header: its first line must name the columns")
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise InvalidData(f"{path}, line {number}: {len(row)} values for {len(header)} columns")
    if target is not None and target not in header:
        raise InvalidData(f"{path} has no column {target!r}: its columns are {', '.join(header)}")
    column = target or next((name for name in header if name.lower() in ("y", "target", "label", "class")), None)
    inputs = [index for index, name in enumerate(header) if name != column]
    if not inputs:
        raise InvalidData(f"{path} has no columns beside the target {column!r}")
    x = np.empty((len(rows), len(inputs)), np.float32)
    for i, row in enumerate(rows):
        for j, index in enumerate(inputs):
            if not _number(row[index]):
                what = "is empty" if not row[index].strip() else f"is {row[index]!r}, not a number"
                raise InvalidData(f"{path}, line {i + 2}: column {header[index]!r} {what}")
            x[i, j] = float(row[index])
    if column is None:
        return {"x": x}, (), None
    texts = [row[header.index(column)].strip() for row in rows]
    missing = next((number for number, text in enumerate(texts, 2) if not text), None)
    if missing is not None:
        raise InvalidData(f"{path}, line {missing}: the target {column!r} is empty")
    if not all(_number(text) for text in texts):
        classes = tuple(sorted(set(texts)))
        indexes = {label: index for index, label in enumerate(classes)}
        return {"x": x, "y": np.asarray([indexes[text] for text in texts], np.int64)}, classes, "y"
    values = np.asarray([float(text) for text in texts])
    whole = bool((values == np.round(values)).all())
    return {"x": x, "y": values.astype(np.int64 if whole else np.float32)}, (), "y"


def _number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False
