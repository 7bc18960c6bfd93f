"""Data as a user gives them to the client: which array is what."""

from __future__ import annotations

import asyncio
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potluck.blobs.store import BlobStore
from potluck.client.connection import Connection
from potluck.client.matching import listed
from potluck.client.models import keras_file
from potluck.client.sources import as_arrays, given
from potluck.credentials import Credentials
from potluck.errors import DiskFull, InvalidData
from potluck.settings import ClientSettings
from potluck.wire.values import BlobRef

X, A, B = np.zeros((4, 2)), np.arange(4), np.ones((4, 3))
W = np.linspace(0, 1, 4)


@pytest.mark.parametrize(
    ("data", "arrays", "targets", "weight"),
    [
        ((X, A), {"x", "y"}, ("y",), None),
        ((X, A, None), {"x", "y"}, ("y",), None),
        ((X, A.tolist()), {"x", "y"}, ("y",), None),
        ((X, A, W), {"x", "y", "sample_weight"}, ("y",), "sample_weight"),
        ((X, {"kind": A, "size": B}), {"x", "kind", "size"}, ("kind", "size"), None),
        ((X, [A, B], W), {"x", "y_0", "y_1", "sample_weight"}, ("y_0", "y_1"), "sample_weight"),
        (({"left": X, "y": X}, A), {"left", "y", "target"}, ("target",), None),
        (X, {"x"}, None, None),
    ],
)
def test_what_each_array_is_for(data: Any, arrays: set[str], targets: Any, weight: str | None) -> None:
    given = as_arrays(data, None)
    assert isinstance(given.source, dict)
    assert set(given.source) == arrays
    assert (given.target, given.sample_weight) == (targets, weight)


def test_targets_stay_with_their_names() -> None:
    given = as_arrays((X, [A, B]), None)
    assert isinstance(given.source, dict)
    assert np.array_equal(given.source["y_0"], A)
    assert np.array_equal(given.source["y_1"], B)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (({"a": X}, {"a": A}), "'a' both as input and as target"),
        ((X, A, {"kind": W}), "sample_weight, one array with the weight of each item"),
        ((X, A, W, W), r"arrays \(x, y\) or \(x, y, sample_weight\)"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(data: Any, words: str) -> None:
    with pytest.raises(InvalidData, match=words):
        as_arrays(data, None)


def test_data_get_the_name_of_their_file(tmp_path: Path) -> None:
    np.save(tmp_path / "q.npy", X)
    found = given(str(tmp_path / "q.npy"), None)
    assert not isinstance(found, str)
    assert (found.stem, found.name) == ("q", ""), "a path with a folder is no name of a data set"


def test_of_many_columns_the_first_and_the_last_are_named() -> None:
    assert listed([str(number) for number in range(12)]) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11"
    assert listed([str(number) for number in range(13)]) == "0, 1, 2, 3, 4, 5, 6, 7, ..., 10, 11, 12; 13 in all"


SPARSE = "sparse_categorical_crossentropy"


@pytest.mark.parametrize(
    ("loss", "units", "outputs", "room"),
    [
        (SPARSE, 3, None, 3),
        ({"class_name": "SparseCategoricalCrossentropy", "config": {}}, 3, ["last", 0, 0], 3),
        ({"class_name": "function", "config": "categorical_crossentropy"}, 3, [["last", 0, 0]], 3),
        ("binary_crossentropy", 1, None, 2),
        ("binary_crossentropy", 3, None, None),
        ("mse", 3, None, None),
        ([SPARSE, SPARSE], 3, [["first", 0, 0], ["last", 0, 0]], None),
        (SPARSE, 3, {"a": ["last", 0, 0]}, None),
        (SPARSE, 3, ["other", 0, 0], None),
    ],
)
def test_how_many_classes_a_model_learns_is_read_from_its_file(
    tmp_path: Path, loss: Any, units: int, outputs: Any, room: int | None
) -> None:
    """Files of one and of several outputs, as Keras 3 writes them, with losses by name, object and function."""
    inner = {"layers": [{"class_name": "Dense", "config": {"name": "last", "units": units}}]}
    if outputs is not None:
        inner["output_layers"] = outputs
    with zipfile.ZipFile(tmp_path / "net.keras", "w") as archive:
        archive.writestr("config.json", json.dumps({"config": inner, "compile_config": {"loss": loss}}))
    assert keras_file(tmp_path / "net.keras", tmp_path, compiled=True).room == room


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        ([DiskFull("full"), DiskFull("full")], DiskFull),
        ([OSError("a cable"), DiskFull("full")], DiskFull),
        ([ValueError("the caller's own"), OSError("a cable")], ValueError),
    ],
)
async def test_uploads_that_fail_at_once_raise_one_error(
    raised: list[Exception], expected: type[Exception], tmp_path: Path
) -> None:
    store = BlobStore(tmp_path, 1 << 20)
    refs = [store.put_bytes(bytes([number])) for number in range(2)]
    errors = iter(raised)
    meeting = asyncio.Barrier(2)

    class Broken(Connection):
        async def push(self, source: Any) -> BlobRef:
            await meeting.wait()
            raise next(errors)

    with pytest.raises(expected):
        await Broken(ClientSettings(), Credentials()).push_blobs(store, refs, lambda ref: None)
