"""Files of weights: the library reads what was written, and the same tensors give the same bytes."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import load_file, save_file

from potluck.errors import InvalidModel
from potluck.weights import files as weights

DTYPES = st.sampled_from([np.float32, np.float64, np.float16, np.int64, np.int8, np.uint8, np.bool_])
TENSORS = st.lists(DTYPES.flatmap(lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, min_side=0))))


@settings(max_examples=60, deadline=None)
@given(TENSORS)
def test_the_library_reads_what_we_write_and_we_what_it_writes(
    tmp_path_factory: pytest.TempPathFactory, found: list
) -> None:
    folder = tmp_path_factory.mktemp("weights")
    named = {f"w{number:05}": array for number, array in enumerate(found)}
    weights.save(folder / "ours", named.items())
    if named:
        save_file(named, folder / "theirs")
    else:
        (folder / "theirs").write_bytes((folder / "ours").read_bytes())
    for read in (
        load_file(folder / "ours"),
        dict(weights.load(folder / "ours")),
        dict(weights.load(folder / "theirs")),
    ):
        assert read.keys() == named.keys()
        for name, array in named.items():
            assert read[name].dtype == array.dtype
            np.testing.assert_array_equal(read[name], array)


def test_pieces_are_read_and_written_as_the_whole_would_be(tmp_path: Path) -> None:
    values = np.arange(1000, dtype=np.float32).reshape(10, 100)
    weights.save(tmp_path / "whole", [("a", values), ("b", np.int64(7))])
    specs = [weights.Spec("a", values.dtype, (10, 100)), weights.Spec("b", np.dtype(np.int64), ())]
    with weights.Writer(tmp_path / "pieces", specs) as writer:
        for row in values:
            writer.write(row)
        writer.write(np.int64([7]))
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()
    with weights.Reader(tmp_path / "pieces") as reader:
        np.testing.assert_array_equal(reader.read("a", 150, 333), values.reshape(-1)[150:333])
        assert len(reader.read("a", 990, 2000)) == 10
        assert reader.whole("b") == 7


def test_what_was_not_written_is_noticed(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="4 bytes were not written"),
        weights.Writer(tmp_path / "a", [weights.Spec("a", np.dtype(np.float32), (3,))]) as writer,
    ):
        writer.write(np.zeros(2, np.float32))


def broken(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nothing of that kind",
        b"\xff" * 100,
        broken([1, 2]),
        broken({"a": 1}),
        broken({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}),  # ends too early
        broken({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"),
        broken({"a": {"dtype": "F32", "shape": [math.inf], "data_offsets": [0, 4]}}, b"1234"),
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
        broken({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}, b"1234"),
        broken({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
        broken({"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}, b"1234"),
        broken({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, b"1234"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(InvalidModel, match="cannot be read"):
        dict(weights.load(tmp_path / "a"))
