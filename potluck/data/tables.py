"""CSV files (RFC 4180, with a header) as arrays: numeric columns are one input `x`, the target column is `y`."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from potluck.data.packing import Array, class_indexes, reading
from potluck.errors import InvalidData

TARGET_NAMES = ("y", "target", "label", "class")
"""Columns that are taken for the target when none is named, in any case of letters."""
_WHOLE_LIMIT = 2.0**53
"""Up to here float64 holds every whole number."""


@dataclass(frozen=True)
class Table:
    """`columns` are `x` and, with a target, `y`; `classes` where the target was text."""

    columns: dict[str, Array]
    target: str | None
    classes: tuple[str, ...] = ()


def read_csv(path: Path, target: str | None) -> Table:
    """A target of text becomes class indexes in the order of the alphabet; whole numbers become int64, others float32.

    Raises InvalidData, naming line and column: for text, missing, infinite or not-a-number values, and for ragged lines.
    """
    header, rows, lines = _read(path)
    column = _target_column(path, header, target)
    inputs = [index for index, name in enumerate(header) if name != column]
    if not inputs:
        raise InvalidData(f"{path} has no columns beside the target {column!r}")
    x = np.empty((len(rows), len(inputs)), np.float32)
    for place, index in enumerate(inputs):
        values = _numbers([row[index] for row in rows])
        with np.errstate(over="ignore"):  # found below
            x[:, place] = values
        bad = ~np.isfinite(x[:, place])
        if bad.any():
            row = int(bad.argmax())
            raise InvalidData(f"{path}, line {lines[row]}: column {header[index]!r} {_fault(rows[row][index])}")
    if column is None:
        return Table({"x": x}, None)
    texts = [row[header.index(column)].strip() for row in rows]
    missing = next((line for line, text in zip(lines, texts, strict=True) if _is_missing(text)), None)
    if missing is not None:
        raise InvalidData(f"{path}, line {missing}: the target {column!r} is missing")
    numbers = _numbers(texts)
    if not np.isfinite(numbers).all():
        y, classes = class_indexes(texts, f"{path}: the target {column!r}")
        return Table({"x": x, "y": y}, "y", classes)
    whole = bool((numbers == np.round(numbers)).all() and (np.abs(numbers) < _WHOLE_LIMIT).all())
    return Table({"x": x, "y": numbers.astype(np.int64 if whole else np.float32)}, "y")


def _read(path: Path) -> tuple[list[str], list[list[str]], list[int]]:
    """(header, rows, the line at which each row ends)."""
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        with reading(path), path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            for row in reader:
                if row:
                    rows.append(row)
                    lines.append(reader.line_num)
    except (csv.Error, UnicodeDecodeError) as error:
        raise InvalidData(f"{path} cannot be read as CSV in UTF-8: {error}") from error
    if not header or not rows:
        raise InvalidData(f"{path} needs a header line and at least one row")
    if len(header) == 1 and any(sign in header[0] for sign in ";\t|"):
        raise InvalidData(f"{path}: its columns are not separated by commas: write it anew with ','")
    if len(set(header)) != len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise InvalidData(f"{path}: two columns have the name {twice!r}")
    if np.isfinite(_numbers(header)).all():
        raise InvalidData(f"{path} has no header: its first line must name the columns")
    for row, line in zip(rows, lines, strict=True):
        if len(row) != len(header):
            raise InvalidData(f"{path}, line {line}: {len(row)} values for {len(header)} columns")
    return header, rows, lines


def _target_column(path: Path, header: Sequence[str], target: str | None) -> str | None:
    if target is not None and target not in header:
        raise InvalidData(f"{path} has no column {target!r}: its columns are {', '.join(header)}")
    return target or next((name for name in header if name.lower() in TARGET_NAMES), None)


def _numbers(texts: Sequence[str]) -> Array:
    """Numbers as float64; nan for what is none."""
    try:
        return np.asarray([float(text) for text in texts], np.float64)
    except ValueError:
        return np.asarray([_number(text) for text in texts], np.float64)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _is_missing(text: str) -> bool:
    return text.strip().lower() in ("", "nan", "na", "n/a", "null", "none")


def _fault(text: str) -> str:
    if _is_missing(text):
        return "is missing: fill it in, or leave the row out"
    if np.isnan(_number(text)):
        return f"is {text!r}, not a number: leave the column out, or write numbers for it"
    return f"is {text!r}, which is more than float32 holds"
