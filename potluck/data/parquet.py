"""Parquet files as tables, with pyarrow. Columns are treated as in CSV."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from potluck import extras
from potluck.data.packing import Array, Target, target_names
from potluck.data.tables import Table, check_width, listed, table_of, target_columns
from potluck.errors import InvalidData
from potluck.wording import counted

SUFFIXES = frozenset({".parquet"})
BATCH_ROWS = 65_536
READ_BYTES = 1 << 20
"""How many bytes of a column are read from the file at once."""
_PANDAS_INDEX = re.compile(r"__index_level_\d+__")


class _Pandas(msgspec.Struct):
    """The metadata that pandas adds to a table."""

    index_columns: list[str | dict[str, Any]] = []


def files_in(folder: Path) -> list[Path]:
    """Parquet files directly in `folder`, ordered by name: the parts of one table."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith((".", "_")) and path.is_file()
    )


def read(files: Sequence[Path], target: Target, sample_weight: str | None = None) -> Table:
    """The rows of all files, one file after the other.

    Needs memory for the table as float32 and one batch of rows. Raises InvalidData, naming file, row (from 1) and column: for columns
    that are not numbers; for missing, infinite or not-a-number values; for files with different columns; for damaged files; and where
    pyarrow is not installed.
    """
    wanted = (*target_names(target), *([sample_weight] if sample_weight else []))
    names, index, rows = _described(files[0], wanted)
    # No other column is left to be the input.
    if len(index) == 1 and {*wanted, *target_columns(names, target)}.issuperset(names):
        wanted = (*wanted, *index)
        names, index, rows = _described(files[0], wanted)
    check_width(files[0], len(names))
    for path in files[1:]:
        others, _, more = _described(path, wanted)
        if sorted(others) != sorted(names):
            raise InvalidData(f"{path} has other columns than {files[0].name}: {listed(others)}")
        rows += more
    if not rows:
        raise InvalidData(f"{files[0]} has no rows")
    table = table_of(files[0], _ParquetColumns(files, names, rows), target, sample_weight)
    remarks = [f"column {name!r} is left out: it is the index that pandas wrote" for name in index]
    return replace(table, remarks=(*table.remarks, *remarks))


@dataclass(frozen=True)
class _ParquetColumns:
    """`rows` is what the files claim; they may be wrong."""

    files: Sequence[Path]
    names: Sequence[str]
    rows: int

    def floats(self, names: Sequence[str]) -> Array:
        try:
            found = np.empty((self.rows, len(names)), np.float32)
        except (MemoryError, ValueError) as error:
            raise InvalidData(
                f"{self.files[0]}: {counted(self.rows, 'row')} of {counted(len(names), 'column')}: this is too large"
            ) from error
        done = 0
        for where, first, batch in self._batches(names):
            for place, name in enumerate(names):
                values = _float32(where, f"column {name!r}", first, batch.column(name))
                found[done : done + len(values), place] = values
            done += batch.num_rows
        return found

    def target(self, name: str) -> Array:
        import pyarrow as pa

        parts: list[Array] = []
        for where, first, batch in self._batches([name]):
            column = _decoded(batch.column(name))
            if column.null_count == 0 and _is_text(pa, column.type):
                try:
                    texts = [text.strip() for text in column.to_pylist()]
                except UnicodeDecodeError as error:
                    raise InvalidData(f"{where}: the target {name!r} has texts that are not UTF-8") from error
                if "" in texts:
                    raise _missing(where, first + texts.index(""), f"the target {name!r}")
                parts.append(np.asarray(texts, object))
            else:
                _float32(where, f"the target {name!r}", first, column)
                parts.append(_numbers(where, f"the target {name!r}", first, column))
        if len({part.dtype.kind == "O" for part in parts}) > 1:
            raise InvalidData(
                f"{self.files[0].parent}: the target {name!r} is text in some files and numbers in others"
            )
        return np.concatenate(parts)

    def _batches(self, names: Sequence[str]) -> Iterator[tuple[str, int, Any]]:
        """(file, number of the first row, rows) of each batch that has rows, with at least these columns."""
        # pyarrow would read a name with a dot as a part of a nested column.
        columns = None if any("." in name for name in names) else list(names)
        done = 0
        for path in self.files:
            first = 1
            with _opened(path) as file:
                for batch in file.iter_batches(BATCH_ROWS, columns=columns):
                    done += batch.num_rows
                    if done > self.rows:
                        raise InvalidData(f"{path} is damaged: it has more rows than it says")
                    if batch.num_rows:
                        yield str(path), first, batch
                    first += batch.num_rows
        if done < self.rows:
            raise InvalidData(f"{self.files[-1]} is damaged: it has fewer rows than it says")


def names_in(path: Path) -> tuple[str, ...]:
    """The columns of a file that can be read."""
    return tuple(_described(path)[0])


def _described(path: Path, wanted: Sequence[str] = ()) -> tuple[list[str], list[str], int]:
    """(its columns; those of them that pandas wrote as an index and that are not `wanted`; the number of rows that it claims)."""
    with _opened(path) as file:
        named = _named_index(file.schema_arrow.metadata or {})
        index = [
            name
            for name in file.schema_arrow.names
            if (name in named or _PANDAS_INDEX.fullmatch(name)) and name not in wanted
        ]
        names = [name for name in file.schema_arrow.names if name not in index]
        return names, index, max(0, file.metadata.num_rows)


def _named_index(metadata: Mapping[bytes, bytes]) -> list[str]:
    """The columns that pandas names as its index. A range of numbers is only described there, and has no column."""
    try:
        found = msgspec.json.decode(metadata.get(b"pandas", b"{}"), type=_Pandas)
    except msgspec.MsgspecError:  # another program wrote it
        return []
    return [column for column in found.index_columns if isinstance(column, str)]


def _decoded(column: Any) -> Any:
    """A column of categories as its values."""
    import pyarrow as pa

    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _is_text(pa: Any, kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _numbers(where: str, name: str, first: int, column: Any) -> Array:
    """A column's numbers, none missing; `first` is the number of its first row. Raises InvalidData."""
    import pyarrow as pa
    from pyarrow import compute

    column = _decoded(column)
    kind = column.type
    if column.null_count:
        raise _missing(where, first + compute.index(column.is_null(), True).as_py(), name)
    if pa.types.is_decimal(kind):
        column = column.cast(pa.float64())
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise InvalidData(
            f"{where}: {name} holds {kind}, not numbers: leave the column out, write numbers for it, or name it as the target (--target) if it is the class"
        )
    found: Array = column.to_numpy(zero_copy_only=False)
    return found


def _float32(where: str, name: str, first: int, column: Any) -> Array:
    """A column's numbers as float32. Raises InvalidData, also for numbers too large for float32."""
    numbers = _numbers(where, name, first, column)
    with np.errstate(over="ignore"):  # checked below
        found = numbers.astype(np.float32)
    bad = ~np.isfinite(found)
    if bad.any():
        row = int(bad.argmax())
        if np.isnan(numbers[row]):
            raise _missing(where, first + row, name)
        raise InvalidData(f"{where}, row {first + row}: {name} is {numbers[row]}, which is too large for float32")
    return found


def _missing(where: str, row: int, name: str) -> InvalidData:
    return InvalidData(f"{where}, row {row}: {name} has no value: fill it in, or leave the row out")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`. Raises InvalidData, naming the file, for pyarrow's errors in the block."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise InvalidData(f"{path}: reading Parquet files needs pyarrow: {extras.install('parquet')}") from None
    try:
        with parquet.ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False) as file:
            yield file
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise InvalidData(f"{path} is not a Parquet file that can be read: {error}") from error
