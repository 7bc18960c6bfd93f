"""Quantised updates: bounds of the error, the same bits on every machine, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from potluck.errors import Diverged, InvalidModel
from potluck.weights import files as weights
from potluck.weights import updates
from potluck.weights.updates import BLOCK, SMALL, apply_update, dequantise, norm, quantise, write_update

VALUES = arrays.arrays(
    np.float32,
    st.integers(1, 3 * BLOCK),
    elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
)
RNG = np.random.default_rng(0)


@settings(max_examples=200, deadline=None)
@given(VALUES, st.sampled_from(["int8", "int4"]))
def test_no_value_is_off_by_more_than_half_a_level_of_its_block(values: np.ndarray, kind: Any) -> None:
    codes, scales = quantise(values, kind)
    back = dequantise(codes, scales, kind, len(values))
    assert back.dtype == np.float32
    assert len(back) == len(values)
    assert codes.nbytes == (len(values) if kind == "int8" else -(-len(values) // 2))
    half = np.repeat(scales.astype(np.float64) / 2, BLOCK)[: len(values)]
    tiny = np.repeat(scales, BLOCK)[: len(values)] <= np.finfo(np.float32).tiny
    off = np.abs(back.astype(np.float64) - values)
    assert (tiny | (off <= half * 1.0001)).all()


@settings(max_examples=200, deadline=None)
@given(VALUES, st.sampled_from(["int8", "int4"]))
def test_codes_are_as_the_module_says(values: np.ndarray, kind: Any) -> None:
    """Value by value, in plain Python: other programs write and read such files too."""
    codes, scales = quantise(values, kind)
    levels = 127 if kind == "int8" else 7
    numbers = codes.tolist()
    if kind == "int4":
        numbers = [nibble - 8 for byte in numbers for nibble in (byte & 15, byte >> 4)]
        assert len(values) % 2 == 0 or numbers[len(values)] == 0
    assert all(abs(number) <= levels for number in numbers)
    expected = [np.float32(number) * scales[place // BLOCK] for place, number in enumerate(numbers[: len(values)])]
    assert dequantise(codes, scales, kind, len(values)).tolist() == expected


def test_zeros_and_the_largest_of_a_block_are_exact() -> None:
    values = np.zeros(BLOCK * 2, np.float32)
    values[5], values[300] = 7.0, -127.0
    for kind in ("int8", "int4"):
        back = dequantise(*quantise(values, kind), kind, len(values))  # type: ignore[arg-type]
        np.testing.assert_allclose(back, values, rtol=1e-6)
        assert (back[values == 0] == 0).all()


def test_errors_of_normal_values_are_those_that_documentation_states() -> None:
    values = RNG.normal(size=100_000).astype(np.float32)
    assert 0.10 < updates.error(values, "int4") < 0.14
    assert 0.005 < updates.error(values, "int8") < 0.008


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    for size in (10, SMALL):  # plain and quantised
        before, after = np.zeros(size, np.float32), np.zeros(size, np.float32)
        after[3] = bad
        weights.save(tmp_path / "before", [("w00000", before)])
        with pytest.raises(Diverged, match="look for values in the data that are not finite"):
            write_update(tmp_path / "update", tmp_path / "before", [after], "auto")


def model(seed: int = 0) -> list[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [
        ("w00000", rng.normal(size=(3, 3, 17, 40)).astype(np.float32)),
        ("w00001", rng.normal(size=40).astype(np.float32)),
        ("s00002", rng.normal(size=40).astype(np.float32)),
        ("s00003", np.int64(seed)),
        ("w00004", rng.normal(size=(100, 51))),
    ]


@pytest.mark.parametrize("compression", ["none", "int8", "int4", "auto"])
@pytest.mark.parametrize("piece", [updates.PIECE, BLOCK])
def test_an_update_leads_from_one_to_the_other(
    tmp_path: Path, compression: Any, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(updates, "PIECE", piece)
    before, after = model(0), [array for _, array in model(1)]
    weights.save(tmp_path / "before", before)
    write_update(tmp_path / "update", tmp_path / "before", after, compression)
    told = norm(tmp_path / "update", tmp_path / "before")
    assert norm(tmp_path / "update", tmp_path / "before") == pytest.approx(told, rel=1e-6)
    apply_update(tmp_path / "before", tmp_path / "update", tmp_path / "after")
    found = [array for _, array in weights.load(tmp_path / "after")]
    bound = {"none": 1e-6, "int8": 0.01, "int4": 0.2, "auto": 0.2}[compression]
    squares = 0.0
    for (name, old), new, got in zip(before, after, found, strict=True):
        assert got.dtype == new.dtype
        if new.size < SMALL:
            np.testing.assert_allclose(got, new, rtol=1e-5)
        assert np.linalg.norm(got - new) <= bound * np.linalg.norm(new - old) + 1e-12
        if name.startswith("w"):
            squares += float(np.linalg.norm(got - old) ** 2)
    assert told == pytest.approx(squares**0.5, rel=1e-5)
    sizes = {"none": 8, "int8": 1.1, "int4": 0.6, "auto": 0.6}
    assert (tmp_path / "update").stat().st_size < sum(array.size for array in after) * sizes[compression] + 4096


@pytest.mark.parametrize("compression", ["none", "int8", "int4"])
@pytest.mark.parametrize("count", [SMALL, SMALL + 1, SMALL + BLOCK - 1, 3 * SMALL + 7])
def test_the_norm_is_that_of_what_is_read(tmp_path: Path, compression: Any, count: int) -> None:
    before, after = np.zeros(count, np.float32), RNG.normal(size=count).astype(np.float32)
    weights.save(tmp_path / "before", [("w00000", before)])
    write_update(tmp_path / "update", tmp_path / "before", [after], compression)
    told = norm(tmp_path / "update", tmp_path / "before")
    with weights.Reader(tmp_path / "before") as base, updates.UpdateReader(tmp_path / "update", base) as update:
        read = update.read("w00000", 0, count)
    assert told == pytest.approx(float(np.linalg.norm(read.astype(np.float64))), rel=1e-6)


def test_state_travels_exactly_whatever_its_size_and_what_is_as_before_does_not_travel(tmp_path: Path) -> None:
    """Wide variances, if quantised, could become negative; a frozen kernel would cost as much as a trained one."""
    kernel, frozen = RNG.normal(size=(SMALL, 2)).astype(np.float32), RNG.normal(size=(SMALL, 2)).astype(np.float32)
    variance = np.where(np.arange(SMALL) % 16, 1e-4, 9.0).astype(np.float32)
    never, steps = np.float32([np.nan, np.inf]), np.int64(3)
    before = [("w00000", kernel), ("s00001", frozen), ("s00002", variance), ("s00003", never), ("s00004", steps)]
    weights.save(tmp_path / "before", before)
    after = [kernel * 1.1, frozen, variance * np.float32(0.97), never, np.int64(4)]
    write_update(tmp_path / "update", tmp_path / "before", after, "int4")
    with weights.Reader(tmp_path / "update") as file:
        assert set(file.specs) == {"w00000.int4", "w00000.scale", "s00002.mean", "s00004.value"}
    apply_update(tmp_path / "before", tmp_path / "update", tmp_path / "after")
    found = [array for _, array in weights.load(tmp_path / "after")]
    for ours, theirs in zip(found[1:], after[1:], strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_roles_are_those_of_the_model_not_of_the_names_in_the_file(tmp_path: Path) -> None:
    """A job may begin from another job's checkpoint and train weights that were frozen there, or freeze trained ones."""
    first, second = (RNG.normal(size=SMALL).astype(np.float32) for _ in range(2))
    weights.save(tmp_path / "before", [("w00000", first), ("s00001", second)])
    write_update(tmp_path / "update", tmp_path / "before", [first, second + 1], "int8", roles=["value", "trained"])
    assert norm(tmp_path / "update", tmp_path / "before") == pytest.approx(SMALL**0.5, rel=0.01)
    with weights.Reader(tmp_path / "update") as file:
        assert set(file.specs) == {"s00001.int8", "s00001.scale"}


def test_plain_whole_numbers_are_new_values(tmp_path: Path) -> None:
    """The name of a role in an update that has no other word for it."""
    weights.save(tmp_path / "before", [("s00000", np.int64([3, 4]))])
    weights.save(tmp_path / "update", [("s00000", np.int64([5, 4]))])
    apply_update(tmp_path / "before", tmp_path / "update", tmp_path / "after")
    assert dict(weights.load(tmp_path / "after"))["s00000"].tolist() == [5, 4]


def test_pieces_of_any_size_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights.save(tmp_path / "before", model(0))
    after = [array for _, array in model(1)]
    found = set()
    for piece in (updates.PIECE, BLOCK, 3 * BLOCK):
        monkeypatch.setattr(updates, "PIECE", piece)
        write_update(tmp_path / "update", tmp_path / "before", after, "auto")
        apply_update(tmp_path / "before", tmp_path / "update", tmp_path / "after")
        found.add(((tmp_path / "update").read_bytes(), (tmp_path / "after").read_bytes()))
    assert len(found) == 1


def test_eight_bits_where_four_lose_too_much(tmp_path: Path) -> None:
    even = RNG.normal(size=BLOCK * 64).astype(np.float32)
    spiky = even * 1e-3
    spiky[::BLOCK] = 1.0
    weights.save(tmp_path / "before", [("w00000", np.zeros_like(even)), ("w00001", np.zeros_like(even))])
    write_update(tmp_path / "update", tmp_path / "before", [even, np.where(spiky == 1.0, 0.05, spiky)], "auto")
    with weights.Reader(tmp_path / "update") as file:
        assert set(file.specs) == {"w00000.int4", "w00000.scale", "w00001.int8", "w00001.scale"}


def test_weights_in_another_order_are_told_by_their_numbers(tmp_path: Path) -> None:
    before = model(0)
    weights.save(tmp_path / "before", before[::-1])
    write_update(tmp_path / "update", tmp_path / "before", [array for _, array in model(1)], "none")
    apply_update(tmp_path / "before", tmp_path / "update", tmp_path / "after")
    found = dict(weights.load(tmp_path / "after"))
    for name, array in model(1):
        np.testing.assert_allclose(found[name], array, atol=1e-6)


def test_updates_for_other_weights_are_refused(tmp_path: Path) -> None:
    weights.save(tmp_path / "before", model(0))
    after = [array for _, array in model(1)]
    with pytest.raises(InvalidModel, match="do not fit"):
        write_update(tmp_path / "update", tmp_path / "before", after[:-1], "auto")
    write_update(tmp_path / "update", tmp_path / "before", after, "auto")
    for other in ([*model(0)[:-1], ("w00004", np.zeros((2, 2)))], [("w00009", np.zeros(3, np.float32))]):
        weights.save(tmp_path / "other", other)
        with pytest.raises(InvalidModel, match="does not fit"):
            apply_update(tmp_path / "other", tmp_path / "update", tmp_path / "after")
