"""Arrays and .npz files as safetensors shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from msgspec.structs import replace

from potluck.blobs.store import BlobStore
from potluck.data.pack import pack
from potluck.errors import InvalidData
from support.digits import digits, split
from support.shards import arrays_of, check_manifest, keys_of, new_store


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return new_store(tmp_path)


def test_rows_keep_together_and_are_named_by_number(store: BlobStore) -> None:
    x, y = digits()
    dataset = pack({"x": x, "y": y}, "digits", store)
    check_manifest(dataset, store)
    assert (dataset.format.kind, dataset.format.inputs, dataset.format.target) == ("arrays", ("x",), "y")
    assert (dataset.count, len(dataset.shards)) == (1797, 32)
    found, keys = arrays_of(dataset, store), keys_of(dataset, store)
    assert sorted(keys) == list(range(1797))
    assert np.array_equal(found["x"], x[keys])
    assert np.array_equal(found["y"], y[keys])
    assert found["x"].dtype == np.float32
    start = 0
    for shard in dataset.shards:  # about 5.6 of each of ten classes
        counts = np.bincount(found["y"][start : start + shard.count], minlength=10)
        assert counts.min() >= 3
        assert counts.max() <= 8
        start += shard.count


def test_the_same_arrays_give_the_same_shards(store: BlobStore) -> None:
    x, y = digits()
    assert pack({"x": x, "y": y}, "d", store) == pack({"x": x.copy(), "y": y.copy()}, "d", store)
    assert pack({"x": x, "y": y}, "d", store, seed=1).shards != pack({"x": x, "y": y}, "d", store).shards


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    rows=st.integers(1, 60),
    dtype=st.sampled_from(["f2", "f4", "f8", "i1", "u1", "i8", ">i4", ">f4", "?"]),
    shard_bytes=st.integers(1, 2000),
)
def test_order_is_kept_without_shuffling(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, rows: int, dtype: str, shard_bytes: int
) -> None:
    store = BlobStore(tmp_path_factory.mktemp("store"), 1 << 30)
    shape = data.draw(hnp.array_shapes(max_dims=3, max_side=4, min_side=0))
    x = data.draw(hnp.arrays(dtype, (rows, *shape)))
    dataset = pack({"pixels": x}, "d", store, shuffle=False, shard_bytes=shard_bytes)
    check_manifest(dataset, store)
    found = arrays_of(dataset, store)["pixels"]
    assert found.dtype == x.dtype.newbyteorder("<")
    assert np.array_equal(found, x, equal_nan=x.dtype.kind == "f")
    assert (dataset.format.inputs, dataset.format.target) == (("pixels",), "")


def test_several_inputs_and_a_named_target(store: BlobStore) -> None:
    rows = np.arange(100)
    source = {"left": rows, "right": rows * 2, "price": rows / 3}
    dataset = pack(source, "d", store, target="price")
    assert (dataset.format.inputs, dataset.format.target) == (("left", "right"), "price")
    found = arrays_of(dataset, store)
    assert np.array_equal(found["right"], found["left"] * 2)
    assert np.allclose(found["price"], found["left"] / 3)
    assert pack({"left": rows, "right": rows}, "d", store).format.target == ""


def test_several_targets_and_weights_of_items(store: BlobStore, tmp_path: Path) -> None:
    rows = np.arange(100)
    source = {"x": rows, "kind": rows % 3, "size": rows / 2, "sample_weight": rows / 7}
    dataset = pack(source, "d", store, target=["kind", "size"])
    check_manifest(dataset, store)
    assert (dataset.format.inputs, dataset.format.target) == (("x",), "")
    assert (dataset.format.targets, dataset.format.weight) == (("kind", "size"), "sample_weight")
    found = arrays_of(dataset, store)
    assert found["sample_weight"].dtype == np.float32
    assert np.allclose(found["sample_weight"], found["x"] / 7)
    assert np.array_equal(found["kind"], found["x"] % 3)
    one = pack(source, "d", store, target=["kind"], sample_weight="size").format
    assert (one.target, one.targets, one.weight) == ("kind", (), "size")
    assert one.inputs == ("x", "sample_weight")
    np.savez(
        tmp_path / "sets.npz", **{f"{key}_{end}": value for key, value in source.items() for end in ("train", "test")}
    )
    for end in ("train", "test"):
        again = pack(tmp_path / "sets.npz", "d", store, target=[f"kind_{end}", f"size_{end}"])
        assert again.format == dataset.format


@pytest.mark.parametrize("kind", ["U", "S"])
def test_labels_of_text_become_classes(store: BlobStore, kind: str) -> None:
    y = np.asarray(["dog", "cat", "dog", "emu"], dtype=kind)
    dataset = pack({"x": np.arange(4), "y": y}, "pets", store, shuffle=False)
    assert dataset.format.classes == ("cat", "dog", "emu")
    assert dataset.class_counts == (1, 2, 1)
    assert arrays_of(dataset, store)["y"].tolist() == [1, 0, 1, 2]


@pytest.mark.parametrize("encode", [lambda y: y.astype(np.float32), lambda y: np.eye(10)[y], lambda y: y[:, None]])
def test_classes_are_spread_however_they_are_written(store: BlobStore, encode: Any) -> None:
    x, y = digits()
    by_class = np.argsort(y, kind="stable")
    dataset = pack({"x": x[by_class], "y": encode(y[by_class])}, "d", store)
    keys = keys_of(dataset, store)
    first = y[by_class][keys[: dataset.shards[0].count]]
    assert len(set(first.tolist())) == 10


def test_npz_in_its_usual_forms(tmp_path: Path, store: BlobStore) -> None:
    parts = split()
    file = tmp_path / "digits.npz"
    np.savez(file, x=parts["x_train"], y=parts["y_train"])
    plain = pack(file, "d", store)
    np.savez_compressed(file, x_train=parts["x_train"], y_train=parts["y_train"])
    assert pack(file, "d", store) == plain
    np.savez(file, **parts)
    assert pack(file, "d", store, target="y_train") == plain
    test = pack(file, "d", store, target="y_test")
    assert (test.count, test.format) == (359, plain.format)
    with pytest.raises(InvalidData, match=r"several sets .*'y_train' or 'y_test'"):
        pack(file, "d", store)
    np.savez(file, pixels=parts["x_train"], digit=parts["y_train"])
    assert pack(file, "d", store, target="digit").format.inputs == ("pixels",)
    np.savez(file, X=parts["x_train"], Y=parts["y_train"])
    upper = pack(file, "d", store)
    assert (upper.format.inputs, upper.format.target) == (("X",), "Y")
    np.savez(file, X=parts["x_train"], Y=parts["x_train"], y=parts["y_train"])
    assert pack(file, "d", store).format.target == "y"  # the usual name as it is written comes before other spellings
    np.savez(file, X_train=parts["x_train"], Y_train=parts["y_train"], X_test=parts["x_test"], Y_test=parts["y_test"])
    with pytest.raises(InvalidData, match=r"several sets .*'Y_train' or 'Y_test'"):
        pack(file, "d", store)
    assert pack(file, "d", store, target="Y_test").format == replace(plain.format, inputs=("X",), target="Y")
    np.save(tmp_path / "x.npy", parts["x_train"])
    assert pack(tmp_path / "x.npy", "d", store).format.inputs == ("x",)


def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, store: BlobStore) -> None:
    file = tmp_path / "bad.npz"
    file.write_bytes(b"nonsense")
    with pytest.raises(InvalidData, match=r"bad\.npz is not an \.npz file: "):
        pack(file, "d", store)
    np.savez(file, x=np.zeros((5, 2)))
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(InvalidData, match=r"bad\.npz is not an \.npz file that can be read"):
        pack(file, "d", store)
    np.savez(file, x=np.asarray([{}, []], dtype=object))
    with pytest.raises(InvalidData, match="holds Python objects, which are code"):
        pack(file, "d", store)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed, np.save])
def test_a_damaged_file_is_said_to_be_one_wherever_the_damage_is(
    tmp_path: Path, store: BlobStore, save: Callable[..., None]
) -> None:
    file = tmp_path / ("bad.npy" if save is np.save else "bad.npz")
    save(file, np.arange(400, dtype=np.float32).reshape(100, 4))
    whole = file.read_bytes()
    refused = 0
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        try:
            pack(file, "d", store)
        except InvalidData as error:
            refused += 1
            assert file.name in error.message or "array" in error.message  # noqa: PT017 - either is right
    assert refused > 50


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ({}, None, "no arrays"),
        ({"x": np.zeros(3), "y": np.zeros(4)}, None, "'x' has 3, 'y' has 4"),
        ({"x": np.zeros((0, 3))}, None, "no rows"),
        ({"x": np.zeros(3)}, "label", "no array 'label' to learn: the arrays are x"),
        ({"y": np.zeros(3)}, "y", "no input array"),
        ({"x": np.asarray(["a", "b"])}, None, "'x' has dtype <U1"),
        ({"x": np.asarray([object()])}, None, "'x' has dtype object"),
        ({"x": np.zeros(3, np.complex64)}, None, "dtype complex64"),
        ({"x": np.zeros(2), "a": np.asarray(["s", "t"]), "b": np.zeros(2)}, ["a", "b"], "'a' is text, and there are 2"),
        ({"x": np.zeros(2), "y": np.zeros(2), "sample_weight": np.asarray([1, np.nan])}, None, "not all finite"),
        ({"x": np.zeros(2), "y": np.zeros(2)}, ["y", "z"], "no array 'z' to learn"),
        ({"x": np.zeros(3, np.longdouble)}, None, "at most 64 bits"),
        ({"x": np.float32(3)}, None, "'x' is a single value"),
        ({"x": np.zeros(20_000), "y": np.arange(20_000).astype("U")}, None, "20000 different texts"),
    ],
)
def test_what_is_wrong_with_arrays_is_said(
    store: BlobStore, source: dict[str, Any], target: str | None, message: str
) -> None:
    with pytest.raises(InvalidData, match=message):
        pack(source, "d", store, target=target)
