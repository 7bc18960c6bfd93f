"""Parquet files: the same columns as in CSV give the same data set, and errors name file, row and column."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet
from sklearn.datasets import load_iris

from potluck.blobs.store import BlobStore
from potluck.data.pack import pack
from potluck.data.parquet import BATCH_ROWS
from potluck.errors import InvalidData
from support.shards import arrays_of, check_manifest, keys_of, new_store


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return new_store(tmp_path)


def write(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pa.table(columns), path)
    return path


def test_iris_is_the_same_as_from_csv(tmp_path: Path, store: BlobStore) -> None:
    iris = load_iris()
    names = [name.removesuffix(" (cm)") for name in iris.feature_names]
    species = iris.target_names[iris.target]
    columns = {name: iris.data[:, place] for place, name in enumerate(names)} | {"species": species}
    path = write(tmp_path / "iris.parquet", **columns)
    table = tmp_path / "iris.csv"
    rows = [",".join([*map(str, row), label]) for row, label in zip(iris.data.tolist(), species, strict=True)]
    table.write_text("\n".join([",".join([*names, "species"]), *rows, ""]))
    dataset = pack(path, "iris", store, target="species")
    check_manifest(dataset, store)
    assert dataset == pack(table, "iris", store, target="species")
    assert dataset.format.classes == ("setosa", "versicolor", "virginica")
    found, keys = arrays_of(dataset, store), keys_of(dataset, store)
    assert np.array_equal(found["x"], iris.data[keys].astype(np.float32))
    assert np.array_equal(found["y"], iris.target[keys])


def test_several_targets_and_weights_are_the_same_as_from_csv(tmp_path: Path, store: BlobStore) -> None:
    columns = {"a": [1.5, 2.0, 3.0], "left": [0, 1, 0], "right": [0.5, 1.5, 2.5], "sure": [1.0, 0.5, 0.0]}
    path = write(tmp_path / "t.parquet", **columns)
    table = tmp_path / "t.csv"
    rows = [",".join(map(str, row)) for row in zip(*columns.values(), strict=True)]
    table.write_text("\n".join([",".join(columns), *rows, ""]))
    dataset = pack(path, "t", store, target=("left", "right"), sample_weight="sure")
    assert dataset == pack(table, "t", store, target=("left", "right"), sample_weight="sure")
    assert (dataset.format.targets, dataset.format.weight) == (("left", "right"), "sample_weight")
    found, keys = arrays_of(dataset, store), keys_of(dataset, store)
    assert found["sample_weight"].tolist() == [columns["sure"][key] for key in keys]
    with pytest.raises(InvalidData, match="no column 'weight'"):
        pack(path, "t", store, sample_weight="weight")


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (pa.array([0, 1, 2], pa.int8()), np.int64),
        (pa.array([0, 1, 2**62]), np.int64),
        (pa.array([True, False, True]), np.int64),
        (pa.array([1.0, 2.0, 3.0]), np.int64),
        (pa.array([0.5, 1, 2]), np.float32),
        (pa.array(np.array([0.5, 1, 2], np.float16)), np.float32),
        (pa.array([1, 2, 2**64 - 1], pa.uint64()), np.float32),
    ],
)
def test_targets_of_numbers(tmp_path: Path, store: BlobStore, values: Any, dtype: type) -> None:
    dataset = pack(write(tmp_path / "t.parquet", a=[1, 1, 1], Label=values), "t", store, shuffle=False)
    y = arrays_of(dataset, store)["y"]
    assert y.dtype == dtype
    np.testing.assert_allclose(y, np.array([float(value) for value in values.to_pylist()]), rtol=1e-7)
    assert dataset.format.classes == ()


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_targets_of_text_are_classes(tmp_path: Path, store: BlobStore, kind: Any) -> None:
    path = write(tmp_path / "t.parquet", a=[1, 2, 3], y=pa.array(["Katze, groß", " Hund", "Hund "]).cast(kind))
    dataset = pack(path, "t", store, shuffle=False)
    assert dataset.format.classes == ("Hund", "Katze, groß")
    assert arrays_of(dataset, store)["y"].tolist() == [1, 0, 0]


def test_inputs_of_every_kind_of_number(tmp_path: Path, store: BlobStore) -> None:
    path = write(
        tmp_path / "t.parquet",
        **{
            "a.b": pa.array([1, 2], pa.uint8()),
            "flag": [True, False],
            "price": pa.array(["1.50", "-2.25"]).cast(pa.decimal128(8, 2)),
            "category": pa.array([7, 8]).dictionary_encode(),
            "__index_level_0__": ["row one", "row two"],  # as pandas writes its index
        },
    )
    dataset = pack(path, "t", store, shuffle=False)
    assert arrays_of(dataset, store)["x"].tolist() == [[1, 1, 1.5, 7], [2, 0, -2.25, 8]]
    assert dataset.format.target == ""
    assert dataset.remarks == ("column '__index_level_0__' is left out: it is the index that pandas wrote",)


def test_an_index_with_a_name_is_left_out_and_named(tmp_path: Path, store: BlobStore) -> None:
    plain = pack(write(tmp_path / "plain.parquet", a=[1.5, 2.5], y=[0, 1]), "t", store)

    path = tmp_path / "named.parquet"
    pd.DataFrame({"a": [1.5, 2.5], "y": [0, 1]}, pd.Index(["row one", "row two"], name="id")).to_parquet(path)
    dataset = pack(path, "t", store)
    assert dataset.shards == plain.shards
    assert dataset.remarks == ("column 'id' is left out: it is the index that pandas wrote",)
    assert pack(path, "t", store, target="id").format.classes == ("row one", "row two")
    pd.DataFrame({"y": [0, 1]}, pd.Index([1.5, 2.5], name="a")).to_parquet(path)  # no other column is left
    assert pack(path, "t", store) == plain
    pd.DataFrame({"a": [1.5, 2.5], "y": [0, 1]}, pd.RangeIndex(2, name="id")).to_parquet(path)  # it stores no column
    assert pack(path, "t", store) == plain
    for odd in (b"[1", b'{"index_columns": 7}'):
        table = pa.table({"a": [1.5, 2.5], "y": [0, 1]})
        parquet.write_table(table.replace_schema_metadata({b"pandas": odd}), path)
        assert pack(path, "t", store) == plain


def test_many_batches_and_the_parts_of_a_folder_are_one_table(tmp_path: Path, store: BlobStore) -> None:
    rows = 2 * BATCH_ROWS + 10
    values = np.arange(rows, dtype=np.float32)
    whole = pack(write(tmp_path / "whole.parquet", a=values, b=-values), "t", store, shuffle=False)
    assert np.array_equal(arrays_of(whole, store)["x"], np.stack([values, -values], 1))
    write(tmp_path / "parts" / "part-0.parquet", a=values[:100], b=-values[:100])
    write(tmp_path / "parts" / "part-1.parquet", b=-values[100:], a=values[100:])
    write(tmp_path / "parts" / ".part-2.parquet", c=["hidden"])
    (tmp_path / "parts" / "_SUCCESS").touch()
    assert pack(tmp_path / "parts", "t", store, shuffle=False) == whole
    write(tmp_path / "parts" / "year=2020" / "part.parquet", a=values[:9], b=-values[:9])
    (tmp_path / "parts" / "notes.txt").touch()
    about = ("2 beside the data files left out: notes.txt, year=2020",)
    assert pack(tmp_path / "parts", "t", store, shuffle=False).remarks == about


@pytest.mark.parametrize(
    ("columns", "target", "message"),
    [
        ({"a": [1, 2], "b": [1.0, None]}, None, "row 2: column 'b' has no value: fill it in"),
        ({"a": [1, 2], "b": [1.0, float("nan")]}, None, "row 2: column 'b' has no value"),
        ({"a": [1, 2], "b": [1e50, 1]}, None, r"row 1: column 'b' is 1e\+50, which is too large for float32"),
        ({"a": [1, 2], "b": ["red", "blue"]}, None, "column 'b' holds string, not numbers: leave the column out"),
        ({"a": [1, 2], "b": [[1.0], [2.0]]}, None, "column 'b' holds list<.*>, not numbers"),
        ({"a": [1, 2], "b": pa.array([0, 1], pa.timestamp("s"))}, None, "column 'b' holds timestamp"),
        ({"a": [1, 2], "y": ["cat", None]}, None, "row 2: the target 'y' has no value"),
        ({"a": [1, 2], "y": ["cat", "  "]}, None, "row 2: the target 'y' has no value"),
        ({"a": [1, 2], "y": [1.0, None]}, None, "row 2: the target 'y' has no value"),
        ({"a": [1, 2], "y": [b"a", b"b"]}, None, "the target 'y' holds binary"),
        ({"a": [1], "b": [2]}, "c", "no column 'c': its columns are a, b"),
        ({"y": [1]}, None, "no columns besides the target 'y'"),
        ({"a": pa.array([], pa.int8())}, None, "has no rows"),
    ],
)
def test_errors_name_row_and_column(
    tmp_path: Path, store: BlobStore, columns: dict[str, Any], target: str | None, message: str
) -> None:
    with pytest.raises(InvalidData, match=message) as caught:
        pack(write(tmp_path / "table.parquet", **columns), "t", store, target=target)
    assert "table.parquet" in caught.value.message


def test_a_row_of_a_later_batch_is_numbered_in_its_file(tmp_path: Path, store: BlobStore) -> None:
    values = np.zeros(BATCH_ROWS + 5)
    values[BATCH_ROWS + 2] = np.nan
    with pytest.raises(InvalidData, match=f"row {BATCH_ROWS + 3}: column 'a'"):
        pack(write(tmp_path / "t.parquet", a=values, b=values * 0 + 1), "t", store)


def test_a_name_twice_and_files_that_differ(tmp_path: Path, store: BlobStore) -> None:
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    parquet.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(InvalidData, match="two columns have the name 'a'"):
        pack(tmp_path / "twice.parquet", "t", store)
    write(tmp_path / "parts" / "0.parquet", a=[1], y=["x"])
    write(tmp_path / "parts" / "1.parquet", b=[1], y=["x"])
    with pytest.raises(InvalidData, match=r"1.parquet has other columns than 0.parquet: b, y"):
        pack(tmp_path / "parts", "t", store)
    write(tmp_path / "parts" / "1.parquet", a=[1], y=[3])
    with pytest.raises(InvalidData, match="the target 'y' is text in some files and numbers in others"):
        pack(tmp_path / "parts", "t", store)
    (tmp_path / "parts" / "a.tfrecord").touch()
    with pytest.raises(InvalidData, match="has TFRecord and Parquet files"):
        pack(tmp_path / "parts", "t", store)


def test_damaged_files_are_named(tmp_path: Path, store: BlobStore) -> None:
    path = write(tmp_path / "t.parquet", a=np.arange(1000), y=np.arange(1000) % 2)
    data = path.read_bytes()
    random = np.random.default_rng(0)
    damaged = [b"", b"PAR1", data[:-100], data[100:]]
    for _ in range(300):
        changed = bytearray(data)
        for place in random.integers(0, len(data), int(random.integers(1, 20))):
            changed[place] = random.integers(256)
        damaged.append(bytes(changed))
    refused = []
    for changed in damaged:
        path.write_bytes(changed)
        try:
            pack(path, "t", store)
        except InvalidData as error:
            refused.append(error.message)
    assert len(refused) > 100
    assert [message for message in refused if "t.parquet" not in message] == []


def test_without_pyarrow_it_is_said_what_to_install(
    tmp_path: Path, store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "t.parquet", a=[1])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        InvalidData, match=r"t.parquet: reading Parquet files needs pyarrow: .* -m pip install .*\[parquet\]"
    ):
        pack(path, "t", store)
