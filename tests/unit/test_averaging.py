"""Averages of weights equal numpy's, by samples."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from coordinator.training.averaging import average
from potluck.errors import InvalidModel


def test_weighted_mean_of_floats_and_counters_of_the_largest(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    files, parts = [], []
    for number, samples in enumerate((10, 30, 60)):
        weights = {
            "w00000": rng.normal(size=(3, 4)).astype(np.float32),
            "w00001": rng.normal(size=(5,)).astype(np.float16),
            "w00002": np.array([number], np.int64),
        }
        save_file(weights, tmp_path / str(number))
        files.append((tmp_path / str(number), samples))
        parts.append(weights)
    average(files, tmp_path / "mean")
    mean = load_file(tmp_path / "mean")
    for name in ("w00000", "w00001"):
        expected = sum(
            part[name].astype(np.float64) * share for part, share in zip(parts, (0.1, 0.3, 0.6), strict=True)
        )
        assert mean[name].dtype == parts[0][name].dtype
        np.testing.assert_array_equal(mean[name], expected.astype(mean[name].dtype))
    assert mean["w00002"] == [2]


def test_one_node_alone_is_its_own_average(tmp_path: Path) -> None:
    save_file({"w": np.float32([0.1, 1e-8, 3e8])}, tmp_path / "a")
    average([(tmp_path / "a", 7)], tmp_path / "mean")
    np.testing.assert_array_equal(load_file(tmp_path / "mean")["w"], np.float32([0.1, 1e-8, 3e8]))


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"v": np.zeros(2, np.float32)}, "other names"),
        ({"w": np.zeros(3, np.float32)}, "shape"),
        ({"w": np.float32([np.nan, 0])}, "diverged"),
    ],
)
def test_what_cannot_be_averaged_is_refused(tmp_path: Path, other: dict[str, np.ndarray], reason: str) -> None:
    save_file({"w": np.zeros(2, np.float32)}, tmp_path / "a")
    save_file(other, tmp_path / "b")
    with pytest.raises(InvalidModel, match=reason):
        average([(tmp_path / "a", 1), (tmp_path / "b", 1)], tmp_path / "mean")
