"""CSV files: what happens to columns, and errors that name line and column."""

from __future__ import annotations

import csv
import io
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from sklearn.datasets import load_iris

from potluck.blobs.store import BlobStore
from potluck.data.pack import pack
from potluck.data.tables import COLUMNS_LIMIT, read_csv
from potluck.errors import InvalidData
from support.shards import arrays_of, check_manifest, keys_of, new_store


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return new_store(tmp_path)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "table.csv"
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_iris_with_names_as_classes(tmp_path: Path, store: BlobStore) -> None:
    iris = load_iris()
    lines = [
        ",".join([*map(str, row), iris.target_names[label]]) for row, label in zip(iris.data, iris.target, strict=True)
    ]
    path = write(tmp_path, "\n".join(["sepal length,sepal width,petal length,petal width,species", *lines, ""]))
    dataset = pack(path, "iris", store, target="species")
    check_manifest(dataset, store)
    assert (dataset.format.inputs, dataset.format.target) == (("x",), "y")
    assert dataset.format.classes == ("setosa", "versicolor", "virginica")
    assert dataset.class_counts == (50, 50, 50)
    found, keys = arrays_of(dataset, store), keys_of(dataset, store)
    assert found["x"].dtype == np.float32
    assert np.array_equal(found["x"], iris.data[keys].astype(np.float32))
    assert np.array_equal(found["y"], iris.target[keys])


@pytest.mark.parametrize(
    ("values", "dtype"),
    [(["0", "1", "2"], np.int64), (["1.0", "2.0", "3.0"], np.int64), (["0.5", "1", "2"], np.float32)],
)
def test_targets_of_numbers(tmp_path: Path, store: BlobStore, values: list[str], dtype: type) -> None:
    path = write(tmp_path, "a,Label\n" + "".join(f"1,{value}\n" for value in values))
    dataset = pack(path, "t", store, shuffle=False)
    y = arrays_of(dataset, store)["y"]
    assert y.dtype == dtype
    assert y.tolist() == [float(value) for value in values]
    assert dataset.format.classes == ()


def test_several_targets_and_a_column_of_weights(tmp_path: Path, store: BlobStore) -> None:
    path = write(tmp_path, "a,x,y,w\n1,2,0.5,3\n4,5,1.5,0\n")
    dataset = pack(path, "t", store, target=["x", "y"], sample_weight="w", shuffle=False)
    check_manifest(dataset, store)
    assert (dataset.format.inputs, dataset.format.targets) == (("inputs",), ("x", "y"))
    found = arrays_of(dataset, store)
    assert found[dataset.format.weight].tolist() == [3, 0]
    assert found["inputs"].tolist() == [[1], [4]]
    assert (found["x"].tolist(), found["y"].tolist()) == ([2, 5], [0.5, 1.5])
    usual = write(tmp_path, "a,y,sample_weight\n1,cat,3\n4,dog,0\n")
    form = pack(usual, "t", store).format
    assert (form.inputs, form.target, form.weight, form.classes) == (("x",), "y", "sample_weight", ("cat", "dog"))


def test_what_is_wrong_with_targets_and_weights_is_said(tmp_path: Path, store: BlobStore) -> None:
    path = write(tmp_path, "a,b,y,w\n1,cat,2,3\n4,dog,5,x\n")
    with pytest.raises(
        InvalidData, match="'b' is text, and there are 2 targets: with several targets, classes must be numbers"
    ):
        pack(path, "t", store, target=["b", "w"])
    with pytest.raises(InvalidData, match="line 3: column 'w' is 'x', not a number"):
        pack(path, "t", store, target="b", sample_weight="w")
    with pytest.raises(InvalidData, match="has no column 'v'"):
        pack(path, "t", store, target="b", sample_weight="v")
    (tmp_path / "cat").mkdir()
    with pytest.raises(InvalidData, match="weights of items are read only from"):
        pack(tmp_path, "t", store, sample_weight="w")


def test_without_a_target(tmp_path: Path, store: BlobStore) -> None:
    dataset = pack(write(tmp_path, "a,b\r\n1,2\r\n\r\n3,4e1\r\n"), "t", store, shuffle=False)
    assert arrays_of(dataset, store)["x"].tolist() == [[1, 2], [3, 40]]
    assert dataset.format.target == ""


@pytest.mark.parametrize("head", ["", "Unnamed: 0", '""'])
def test_an_index_without_a_name_is_left_out_and_named(tmp_path: Path, store: BlobStore, head: str) -> None:
    plain = pack(write(tmp_path, "a,y\n1.5,0\n2.5,1\n"), "t", store)
    dataset = pack(write(tmp_path, f"{head},a,y\nrow 1,1.5,0\nrow 2,2.5,1\n"), "t", store)
    assert replace(dataset, remarks=()) == plain
    (remark,) = dataset.remarks
    assert remark.startswith(f"the first column, {head.strip(chr(34))!r}, is left out as an index")
    two = pack(write(tmp_path, f"{head},Unnamed: 1,a,y\n0,0,1.5,0\n0,1,2.5,1\n"), "t", store)
    assert two.shards == plain.shards
    assert two.remarks[0].startswith(
        f"the first 2 columns, {head.strip(chr(34))!r}, 'Unnamed: 1', are each left out as an"
    )
    wanted = pack(write(tmp_path, f"{head},a\n0,1.5\n1,2.5\n"), "t", store, target=head.strip('"'))
    assert (wanted.shards, wanted.remarks) == (plain.shards, ())
    alone = pack(write(tmp_path, f"{head},y\n1.5,0\n2.5,1\n"), "t", store)  # no other column is left
    assert (alone.shards, alone.remarks) == (plain.shards, ())
    with pytest.raises(InvalidData, match="two columns have the name ''"):
        pack(write(tmp_path, "a,,\n1,2,3\n"), "t", store)


@pytest.mark.parametrize("index", [["", "Unnamed: 0.1", "Unnamed: 0"], ["Unnamed: 0.1", "Unnamed: 0"]])
def test_an_index_that_was_saved_again_and_again_is_left_out(
    tmp_path: Path, store: BlobStore, index: list[str]
) -> None:
    plain = pack(write(tmp_path, "a,label\n1.5,0\n2.5,1\n"), "t", store)
    zeros = "0," * len(index)
    dataset = pack(write(tmp_path, f"{','.join(index)},a,label\n{zeros}1.5,0\n{zeros}2.5,1\n"), "t", store)
    assert dataset.shards == plain.shards
    (remark,) = dataset.remarks
    assert f"{', '.join(map(repr, index))}, are each left out as an index" in remark
    alike = pack(write(tmp_path, "Unnamed: 0.x,label\n1.5,0\n2.5,1\n"), "t", store)
    assert (alike.shards, alike.remarks) == (plain.shards, ())


def test_booleans_are_numbers(tmp_path: Path, store: BlobStore) -> None:
    plain = pack(write(tmp_path, "a,red,y\n1,1,0\n2,0,1\n"), "t", store)
    assert pack(write(tmp_path, "a,red,y\n1,True,False\n2, False ,True\n"), "t", store) == plain
    assert pack(write(tmp_path, "a,red,y\n1,TRUE,false\n2,FALSE,true\n"), "t", store) == plain
    for odd, message in {
        "yes": "line 3: column 'red' is 'yes', not a number",
        "": "line 3: column 'red' has no value: fill it in",
        "1": "line 2: column 'red' is 'True', not a number",
    }.items():
        with pytest.raises(InvalidData, match=message):
            pack(write(tmp_path, f"a,red,y\n1,True,0\n2,{odd},1\n"), "t", store)


def test_byte_order_mark_quotes_and_spaces(tmp_path: Path, store: BlobStore) -> None:
    path = write(tmp_path, '\ufeff"a", b ,y\n"1", 2 ,"Katze, groß"\n3,4,Hund\n')
    dataset = pack(path, "t", store, shuffle=False)
    assert arrays_of(dataset, store)["x"].tolist() == [[1, 2], [3, 4]]
    assert dataset.format.classes == ("Hund", "Katze, groß")


@pytest.mark.parametrize(
    ("text", "target", "message"),
    [
        ("", None, "needs a header line and at least one row"),
        ("a,b\n", None, "needs a header line and at least one row"),
        ("1,2\n3,4\n", None, "has no header"),
        ("a,a\n1,2\n", None, "two columns have the name 'a'"),
        ("a;b\n1;2\n", None, "not separated by commas"),
        ("a,b\n1,2\n3\n", None, "line 3: 1 value for 2 columns"),
        ("a,b\n1,2\n\n3,\n", None, "line 4: column 'b' has no value"),
        ("a,b\n1,2\n3,NaN\n", None, "line 3: column 'b' has no value"),
        ("a,b\n1,2\n3,red\n", None, "line 3: column 'b' is 'red', not a number"),
        ("a,b\n1,1e50\n", None, "line 2: column 'b' is '1e50', which is too large for float32"),
        ('a,b\n1,"x\ny"\n', None, "line 3: column 'b'"),
        ("a,y\n1,cat\n2,\n", None, "line 3: the target 'y' has no value"),
        ("a,b\n1,2\n", "c", "no column 'c': its columns are a, b"),
        (",b\n1,2\n", "c", "no column 'c': its columns are .no name., b"),
        ("y\n1\n", None, "no columns besides the target 'y'"),
        ('a,b\n1,"2\n', None, "cannot be read as CSV"),
    ],
)
def test_errors_name_line_and_column(
    tmp_path: Path, store: BlobStore, text: str, target: str | None, message: str
) -> None:
    with pytest.raises(InvalidData, match=message) as caught:
        pack(write(tmp_path, text), "t", store, target=target)
    assert "table.csv" in caught.value.message


def test_other_encodings_and_unreadable_files(tmp_path: Path, store: BlobStore) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes("a,y\n1,größer\n".encode("latin-1"))
    with pytest.raises(InvalidData, match="cannot be read as CSV in UTF-8"):
        pack(path, "t", store)
    path.unlink()
    path.mkdir()
    with pytest.raises(InvalidData, match="no class folders"):
        pack(path, "t", store)


def test_a_target_of_many_texts_is_no_class(tmp_path: Path, store: BlobStore) -> None:
    rows = "".join(f"1,name{number}\n" for number in range(10_001))
    with pytest.raises(InvalidData, match="the target 'y' has 10001 different texts"):
        pack(write(tmp_path, "a,y\n" + rows), "t", store)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(-(2**24), 2**24)), min_size=1
    )
)
def test_any_finite_numbers_come_through(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[float, int]]
) -> None:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    writer.writerow(["a", "b"])
    writer.writerows(rows)
    store = BlobStore(tmp_path_factory.mktemp("store"), 1 << 30)
    dataset = pack(write(tmp_path, buffer.getvalue()), "t", store, shuffle=False)
    assert np.array_equal(arrays_of(dataset, store)["x"], np.asarray(rows, np.float32))


def test_a_table_that_is_too_wide_is_refused_by_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "wide.csv"
    path.write_text(",".join(f"c{number}" for number in range(COLUMNS_LIMIT + 1)) + "\n\0 is read no further")
    with pytest.raises(InvalidData, match=r"has 100001 columns, but a table may have at most 100000: .* as an array"):
        read_csv(path, None)


def test_a_wide_table_takes_time_by_its_width(tmp_path: Path) -> None:
    columns, path = 20_000, tmp_path / "genes.csv"
    lines = [",".join([*(f"g{number}" for number in range(columns)), "label"])]
    lines += [",".join(["1.5"] * columns + [label]) for label in "ab"]
    path.write_text("\n".join(lines))
    began = time.process_time()
    assert read_csv(path, None).columns["x"].shape == (2, columns)
    assert time.process_time() - began < 2  # it took 6 s when each column was looked up among all
    with pytest.raises(InvalidData, match=r"has no column 'nosuch': .* g99, \.\.\. \(20001 in all\)"):
        read_csv(path, "nosuch")
