"""CSV files (RFC 4180, with a header) as arrays: numeric columns are one input `x`, the target column is `y`."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from potluck.data.packing import WEIGHT_NAME, Array, Target, class_indexes, reading, target_names
from potluck.errors import InvalidData

TARGET_NAMES = ("y", "target", "label", "class")
"""Columns that are taken for the target when none is named, in any case of letters."""
_WHOLE_LIMIT = 2.0**53
"""Up to here float64 holds every whole number."""


@dataclass(frozen=True)
class Table:
    """`columns` are `x`, with a target `y` (several targets have their columns' names), and with weights `sample_weight`.

    `classes` where the target was text.
    """

    columns: dict[str, Array]
    target: Target
    classes: tuple[str, ...] = ()
    sample_weight: str | None = None


def read_csv(path: Path, target: Target, sample_weight: str | None = None) -> Table:
    """A target of text becomes class indexes in the order of the alphabet; whole numbers become int64, others float32.

    Raises InvalidData, naming line and column: for text, missing, infinite or not-a-number values, and for ragged lines.
    """
    header, rows, lines = _read(path)
    targets = _target_columns(path, header, target)
    if sample_weight is not None and sample_weight not in header:
        raise InvalidData(f"{path} has no column {sample_weight!r}: its columns are {', '.join(header)}")
    weight = sample_weight or (WEIGHT_NAME if targets and WEIGHT_NAME in header else None)
    inputs = [index for index, name in enumerate(header) if name not in targets and name != weight]
    if not inputs:
        raise InvalidData(f"{path} has no columns beside the target {', '.join(map(repr, targets))}")

    def floats(indexes: Sequence[int]) -> Array:
        found = np.empty((len(rows), len(indexes)), np.float32)
        for place, index in enumerate(indexes):
            values = _numbers([row[index] for row in rows])
            with np.errstate(over="ignore"):  # found below
                found[:, place] = values
            bad = ~np.isfinite(found[:, place])
            if bad.any():
                row = int(bad.argmax())
                raise InvalidData(f"{path}, line {lines[row]}: column {header[index]!r} {_fault(rows[row][index])}")
        return found

    several = len(targets) > 1
    name = next(name for name in ("x", "inputs", "potluck.x") if not several or name not in targets)
    columns, classes = {name: floats(inputs)}, tuple[str, ...]()
    for column in targets:
        texts = [row[header.index(column)].strip() for row in rows]
        missing = next((line for line, text in zip(lines, texts, strict=True) if _is_missing(text)), None)
        if missing is not None:
            raise InvalidData(f"{path}, line {missing}: the target {column!r} is missing")
        numbers = _numbers(texts)
        if np.isfinite(numbers).all():
            whole = bool((numbers == np.round(numbers)).all() and (np.abs(numbers) < _WHOLE_LIMIT).all())
            columns[column if several else "y"] = numbers.astype(np.int64 if whole else np.float32)
        elif several:
            raise InvalidData(
                f"{path}: the target {column!r} is text, and there are {len(targets)}: number its classes"
            )
        else:
            columns["y"], classes = class_indexes(texts, f"{path}: the target {column!r}")
    if weight is not None:
        columns[WEIGHT_NAME] = floats([header.index(weight)])[:, 0]
    found: Target = targets if several else "y" if targets else None
    return Table(columns, found, classes, WEIGHT_NAME if weight is not None else None)


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


def _target_columns(path: Path, header: Sequence[str], target: Target) -> tuple[str, ...]:
    targets = target_names(target)
    for name in targets:
        if name not in header:
            raise InvalidData(f"{path} has no column {name!r}: its columns are {', '.join(header)}")
    return targets or tuple([name for name in header if name.lower() in TARGET_NAMES][:1])


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
