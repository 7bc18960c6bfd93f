"""Tables as arrays: numeric columns become one input `x`, the target column becomes `y`. Reads CSV files (RFC 4180, with a header)."""

from __future__ import annotations

import csv
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Protocol

import numpy as np

from potluck.data.packing import WEIGHT_NAME, Array, Target, class_indexes, reading, target_names
from potluck.errors import InvalidData
from potluck.wording import counted

TARGET_NAMES = ("y", "target", "label", "class")
"""Usual names of the target column, in any case: used when the user names none."""
COLUMNS_LIMIT = 100_000
"""How many columns a table may have: genes are 60,000, and each column takes time. Wider data can be given as one array."""
_INDEX = re.compile(r"(Unnamed: \d+(\.\d+)*)?")
"""A column without a name, or one that pandas named so because it had none; pandas repeats the number for several."""
_BOOLEANS = {"true": 1.0, "false": 0.0}
"""As pandas and Parquet write them, in any case."""
_LISTED = 100
"""How many columns an error names."""
_NONE = -1.0
_WHOLE_LIMIT = 2.0**53
"""Up to here float64 represents every whole number exactly."""


@dataclass(frozen=True)
class Table:
    """`columns` become `x`, the target `y` (several targets keep their columns' names), and the weights `sample_weight`.

    `classes`: where the target was text. `remarks`: sentences about columns that were left out.
    """

    columns: dict[str, Array]
    target: Target
    classes: tuple[str, ...] = ()
    sample_weight: str | None = None
    remarks: tuple[str, ...] = ()


class Columns(Protocol):
    """The columns of a table in a file; both methods raise InvalidData, naming row and column."""

    @property
    def names(self) -> Sequence[str]: ...

    def floats(self, names: Sequence[str]) -> Array:
        """float32 of shape (rows, len(names)), all finite."""

    def target(self, name: str) -> Array:
        """Numbers, all finite, or texts as objects; none missing."""


def table_of(path: Path, columns: Columns, target: Target, sample_weight: str | None = None) -> Table:
    """The table of a file. A text target becomes class indexes in alphabetical order; whole numbers become int64, others float32.

    Raises InvalidData: no such target, no other column, a name used twice, and the errors of `columns`.
    """
    names = columns.names
    wanted = {*target_names(target), sample_weight}
    # Index columns come first: columns without a name, or with the name that pandas gives to a column without one.
    index = list(takewhile(lambda name: _INDEX.fullmatch(name) and name not in wanted, names))
    rest = names[len(index) :]
    if len(set(rest)) != len(rest):
        twice = next(name for name, count in Counter(rest).items() if count > 1)
        raise InvalidData(f"{path}: two columns have the name {twice!r}")
    for name in target_names(target):
        if name not in names:
            raise InvalidData(f"{path} has no column {name!r}: its columns are {listed(names)}")
    targets = target_columns(names, target)
    if sample_weight is not None and sample_weight not in names:
        raise InvalidData(f"{path} has no column {sample_weight!r}: its columns are {listed(names)}")
    weight = sample_weight or (WEIGHT_NAME if targets and WEIGHT_NAME in names else None)
    inputs = [name for name in rest if name not in targets and name != weight]
    if not inputs and len(index) == 1:  # no other column is left to be the input
        inputs, index = index, []
    if not inputs:
        raise InvalidData(f"{path} has no columns besides the target {', '.join(map(repr, targets))}")
    several = len(targets) > 1
    x = next(name for name in ("x", "inputs", "potluck.x") if not several or name not in targets)
    found, classes = {x: columns.floats(inputs)}, tuple[str, ...]()
    for name in targets:
        values = columns.target(name)
        if values.dtype.kind != "O":
            whole = values.dtype.kind in "ib" or bool(
                (values == np.round(values)).all() and (np.abs(values) < _WHOLE_LIMIT).all()
            )
            found[name if several else "y"] = values.astype(np.int64 if whole else np.float32)
        elif several:
            raise InvalidData(
                f"{path}: the target {name!r} is text, and there are {len(targets)} targets: with several targets, classes must be numbers"
            )
        else:
            found["y"], classes = class_indexes(values.tolist(), f"{path}: the target {name!r}")
    if weight is not None:
        found[WEIGHT_NAME] = columns.floats([weight])[:, 0]
    remarks = (
        (f"{_first(index)} left out as an index, such as pandas writes: give it a name if it is an input",)
        if index
        else ()
    )
    learnt: Target = targets if several else "y" if targets else None
    return Table(found, learnt, classes, WEIGHT_NAME if weight is not None else None, remarks)


def _first(names: Sequence[str]) -> str:
    """The first columns, as the beginning of a sentence."""
    shown = ", ".join(map(repr, names))
    return f"the first column, {shown}, is" if len(names) == 1 else f"the first {len(names)} columns, {shown}, are each"


def check_width(path: Path, columns: int) -> None:
    """Raises InvalidData for a table with too many columns."""
    if columns > COLUMNS_LIMIT:
        raise InvalidData(
            f"{path} has {columns} columns, but a table may have at most {COLUMNS_LIMIT}: save data this wide as an array (.npy, .npz)"
        )


def listed(names: Sequence[str]) -> str:
    """Names of columns for an error; of very many only the first."""
    return ", ".join(name or "(no name)" for name in names[:_LISTED]) + (
        f", ... ({len(names)} in all)" if len(names) > _LISTED else ""
    )


def target_columns(names: Sequence[str], target: Target) -> tuple[str, ...]:
    """The named targets, else the first column with a usual name."""
    return target_names(target) or tuple([name for name in names if name.lower() in TARGET_NAMES][:1])


def names_in(path: Path) -> tuple[str, ...]:
    """The columns of a CSV file that can be read."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        return _header(csv.reader(file, strict=True))


def read_csv(path: Path, target: Target, sample_weight: str | None = None) -> Table:
    """The table of a CSV file. Raises InvalidData, naming line and column: text, missing, infinite or not-a-number values, ragged lines."""
    return table_of(path, _CsvColumns(path, *_read(path)), target, sample_weight)


@dataclass(frozen=True)
class _CsvColumns:
    """`lines`: the line of the file at which each row ends."""

    path: Path
    names: Sequence[str]
    rows: list[list[str]]
    lines: list[int]

    def floats(self, names: Sequence[str]) -> Array:
        found = np.empty((len(self.rows), len(names)), np.float32)
        # Of several columns with one name, the first counts.
        indexes = {name: index for index, name in reversed(list(enumerate(self.names)))}
        for place, name in enumerate(names):
            index = indexes[name]
            values = _numbers([row[index] for row in self.rows])
            with np.errstate(over="ignore"):  # checked below
                found[:, place] = values
            bad = np.flatnonzero(~np.isfinite(found[:, place])).tolist()
            if bad:
                # In a column of booleans, the value that is none is wrong, not the first one.
                row = next((row for row in bad if not _is_boolean(self.rows[row][index])), bad[0])
                raise InvalidData(
                    f"{self.path}, line {self.lines[row]}: column {name!r} {_fault(self.rows[row][index], name)}"
                )
        return found

    def target(self, name: str) -> Array:
        index = self.names.index(name)
        texts = [row[index].strip() for row in self.rows]
        missing = next((line for line, text in zip(self.lines, texts, strict=True) if _is_missing(text)), None)
        if missing is not None:
            raise InvalidData(f"{self.path}, line {missing}: the target {name!r} has no value")
        numbers = _numbers(texts)
        return numbers if np.isfinite(numbers).all() else np.asarray(texts, object)


def _read(path: Path) -> tuple[list[str], list[list[str]], list[int]]:
    """(header, rows, the line at which each row ends)."""
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        with reading(path), path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = list(_header(reader))
            check_width(path, len(header))
            for row in reader:
                if row:
                    rows.append(row)
                    lines.append(reader.line_num)
    except (csv.Error, UnicodeDecodeError) as error:
        raise InvalidData(f"{path} cannot be read as CSV in UTF-8: {error}") from error
    if not header or not rows:
        raise InvalidData(f"{path} needs a header line and at least one row")
    if len(header) == 1 and any(sign in header[0] for sign in ";\t|"):
        raise InvalidData(f"{path}: its columns are not separated by commas: save it again with ','")
    if np.isfinite(_numbers(header)).all():
        raise InvalidData(f"{path} has no header: its first line must name the columns")
    for row, line in zip(rows, lines, strict=True):
        if len(row) != len(header):
            raise InvalidData(f"{path}, line {line}: {counted(len(row), 'value')} for {counted(len(header), 'column')}")
    return header, rows, lines


def _header(reader: Iterator[list[str]]) -> tuple[str, ...]:
    return tuple(name.strip() for name in next(reader, []))


def _numbers(texts: Sequence[str]) -> Array:
    """Numbers as float64, nan for a text that is no number. Where all texts are booleans: 0 and 1."""
    try:
        return np.asarray([float(text) for text in texts], np.float64)
    except ValueError:
        booleans = [_BOOLEANS.get(text.strip().lower(), _NONE) for text in texts]
        return np.asarray(booleans if _NONE not in booleans else [_number(text) for text in texts], np.float64)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _is_boolean(text: str) -> bool:
    return text.strip().lower() in _BOOLEANS


def _is_missing(text: str) -> bool:
    return text.strip().lower() in ("", "nan", "na", "n/a", "null", "none")


def _fault(text: str, name: str) -> str:
    if _is_missing(text):
        return "has no value: fill it in, or leave the row out"
    if np.isnan(_number(text)):
        return f"is {text!r}, not a number: leave the column out, write numbers for it, or name it as the target (--target {shlex.quote(name)}) if it is the class"
    return f"is {text!r}, which is too large for float32"
