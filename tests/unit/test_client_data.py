"""Data as a user gives it to the client: which array is what."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from potluck.client.sources import as_arrays
from potluck.errors import InvalidData

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
