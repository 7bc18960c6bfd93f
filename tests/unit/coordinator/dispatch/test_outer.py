"""The outer step: numpy's mean where nothing is quantised, Nesterov momentum, and the same bits as on the nodes."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.dispatch.outer import MOMENTUM_LIMIT, Outer, agreement_of, combine, outer_for
from potluck.errors import Diverged, InvalidModel
from potluck.weights import files as weights
from potluck.weights.updates import apply_update, write_update

Array = np.ndarray[Any, Any]
PLAIN = Outer(1.0, 0.0)


class Lab:
    """A model's weights, nodes that move away from them, and outer steps."""

    def __init__(self, folder: Path, start: list[tuple[str, Array]]) -> None:
        self.folder = folder
        self.weights = folder / "weights-0"
        self.velocity: Path | None = None
        self.number = 0
        weights.save(self.weights, start)

    def step(
        self, after: list[tuple[list[Array], int]], outer: Outer = PLAIN, compression: Any = "none", roles: Any = None
    ) -> None:
        self.number += 1
        parts = []
        for place, (arrays, samples) in enumerate(after):
            path = self.folder / f"update-{place}"
            write_update(path, self.weights, arrays, compression, roles)
            parts.append((path, samples))
        new, moving = self.folder / f"weights-{self.number}", self.folder / f"velocity-{self.number}"
        step = self.folder / "step"
        self.square = combine(
            self.weights, parts, self.velocity, outer, compression, step=step, after=new, velocity_after=moving,
        )  # fmt: skip
        apply_update(self.weights, step, self.folder / "replica")
        assert (self.folder / "replica").read_bytes() == new.read_bytes()  # nodes and coordinator have the same bits
        self.weights, self.velocity = new, moving

    @property
    def values(self) -> dict[str, Array]:
        return dict(weights.load(self.weights))


def test_full_steps_without_momentum_are_the_mean_by_samples(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    start = [
        ("w00000", rng.normal(size=(30, 40)).astype(np.float32)),
        ("s00001", rng.normal(size=5)),
        ("s00002", np.int64(0)),
    ]
    lab = Lab(tmp_path, start)
    nodes = [
        ([rng.normal(size=(30, 40)).astype(np.float32), rng.normal(size=5), np.int64(number)], samples)
        for number, samples in enumerate((10, 30, 60))
    ]
    lab.step(nodes)
    for place, name in enumerate(("w00000", "s00001")):
        mean = sum(
            arrays[place].astype(np.float64) * share for (arrays, _), share in zip(nodes, (0.1, 0.3, 0.6), strict=True)
        )
        np.testing.assert_allclose(lab.values[name], mean, atol=1e-6)
    assert lab.values["s00002"] == 2  # the value of the node with most samples
    # State that is not trained says nothing about agreement.
    change = float(np.sum((lab.values["w00000"] - start[0][1]) ** 2))
    assert lab.square == pytest.approx(change, rel=1e-5)


def test_one_node_alone_goes_where_it_went(tmp_path: Path) -> None:
    start = np.float32([0.1, 1e-8, 3e8])
    lab = Lab(tmp_path, [("w00000", start)])
    lab.step([([start * 2], 7)])
    np.testing.assert_allclose(lab.values["w00000"], start * 2, rtol=1e-6)


def test_nesterov_momentum_is_that_of_keras(tmp_path: Path) -> None:
    """And state that is not trained has no momentum."""
    lab = Lab(tmp_path, [("w00000", np.zeros(3)), ("s00001", np.zeros(3))])
    w, v = np.zeros(3), np.zeros(3)
    for number in range(1, 5):
        change = np.full(3, 1.0 / number)
        now = lab.values
        lab.step([([now["w00000"] + change, now["s00001"] + change], 1)], Outer(0.7, 0.9))
        # keras.optimizers.SGD(0.7, momentum=0.9, nesterov=True) with the gradient -change
        v = 0.9 * v + 0.7 * change
        w = w + 0.9 * v + 0.7 * change
        np.testing.assert_allclose(lab.values["w00000"], w, rtol=1e-12)
    np.testing.assert_allclose(lab.values["s00001"], np.full(3, 1 + 1 / 2 + 1 / 3 + 1 / 4), rtol=1e-12)


def test_state_keeps_its_domain_whatever_was_quantised_and_pushed(tmp_path: Path) -> None:
    """Variances stay above 0, counters stay whole, unit vectors stay unit vectors, and frozen weights keep their bits."""
    rng = np.random.default_rng(3)
    size = 8192

    def unit() -> Array:
        vector = rng.normal(size=size).astype(np.float32)
        return vector / np.linalg.norm(vector)

    variance = np.where(np.arange(size) % 16, 1e-6, 10.0).astype(np.float32)
    frozen = rng.normal(size=size).astype(np.float32)
    kernel = np.zeros(size, np.float32)
    names = ["w00000", "s00001", "s00002", "s00003", "s00004"]
    roles = ["trained", "mean", "mean", "value", "value"]
    start = [kernel, variance, frozen, np.float32(0), unit()]
    lab = Lab(tmp_path, list(zip(names, start, strict=True)))
    for number in range(1, 6):
        kernel, variance, frozen, _, _ = (lab.values[name] for name in names)
        vectors = [unit() for _ in range(3)]
        nodes = [
            (
                [kernel + vector, variance * np.float32(0.5 * share), frozen, np.float32(number * 10 + share), vector],
                share,
            )
            for share, vector in zip((1, 2, 4), vectors, strict=True)
        ]
        lab.step(nodes, Outer(1.0, 0.9), "int4", roles)
        found = lab.values
        mean = sum(arrays[1].astype(np.float64) * share for arrays, share in nodes) / 7
        np.testing.assert_allclose(found["s00001"], mean, rtol=1e-6)
        assert (found["s00001"] >= 0).all()
        assert found["s00002"].tobytes() == frozen.tobytes()
        assert found["s00003"] == number * 10 + 4
        assert found["s00004"].tobytes() == vectors[2].tobytes()
    with weights.Reader(tmp_path / "step") as step:
        assert set(step.specs) == {"w00000.int4", "w00000.scale", "s00001.mean", "s00003.value", "s00004.value"}
    assert lab.velocity is not None
    with weights.Reader(lab.velocity) as moving:
        assert set(moving.specs) == {"w00000"}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=5), st.floats(-(2.0**99), 2.0**99, width=32))
def test_the_mean_of_one_value_is_that_value(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], value: float
) -> None:
    lab = Lab(tmp_path_factory.mktemp("mean"), [("s00000", np.float32([0.5]))])
    lab.step([([np.float32([value])], count) for count in counts])
    assert lab.values["s00000"].tolist() == [value]


def test_nodes_that_do_not_agree_what_is_trained_are_refused(tmp_path: Path) -> None:
    weights.save(tmp_path / "before", [("w00000", np.zeros(3))])
    write_update(tmp_path / "one", tmp_path / "before", [np.ones(3)], "none", ["trained"])
    write_update(tmp_path / "two", tmp_path / "before", [np.ones(3)], "none", ["mean"])
    with pytest.raises(InvalidModel, match="whether weight w00000 is trained"):
        combine(
            tmp_path / "before", [(tmp_path / "one", 1), (tmp_path / "two", 1)], None, PLAIN, "none",
            step=tmp_path / "step", after=tmp_path / "after", velocity_after=tmp_path / "velocity",
        )  # fmt: skip


def test_momentum_rises_and_falls_to_nothing_at_the_end() -> None:
    rounds = [outer_for(number, (number + 1) / 100, 0.1) for number in range(100)]
    momenta = [one.momentum for one in rounds]
    assert {one.learning_rate for one in rounds} == {1.0}
    assert momenta[:4] == [0.0, 0.25, 0.4, 0.5]
    top = momenta.index(max(momenta))
    assert momenta[:top] == sorted(momenta[:top])
    assert max(momenta) == MOMENTUM_LIMIT
    assert momenta[70:] == sorted(momenta[70:], reverse=True)
    assert momenta[-1] == 0.0
    assert outer_for(50, 1.2, 0.0).momentum == 0.0


def test_nodes_that_agree_need_no_momentum_and_the_user_has_the_last_word() -> None:
    assert outer_for(50, 0.5, 1.0) == Outer(1.0, 0.0)
    assert outer_for(50, 0.5, 0.8).momentum == pytest.approx(0.36)
    assert outer_for(50, 0.5, -0.5).momentum == MOMENTUM_LIMIT
    assert outer_for(50, 0.99, 1.0, 0.7, 0.9) == Outer(0.7, 0.9)


def test_momentum_of_the_nodes_leaves_less_for_the_outer_step() -> None:
    assert outer_for(50, 0.5, 0.0, inner_momentum=0.9).momentum == pytest.approx(0.1 * MOMENTUM_LIMIT)
    assert outer_for(50, 0.5, 0.0, inner_momentum=1.5).momentum == 0.0
    assert outer_for(50, 0.5, 0.0, None, 0.9, 0.9) == Outer(1.0, 0.9), "the user has the last word"


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 6), st.integers(0, 10_000), st.sampled_from([0.0, 0.5, 1.0]))
def test_agreement_is_the_mean_cosine_of_updates_of_one_length(nodes: int, seed: int, common: float) -> None:
    rng = np.random.default_rng(seed)
    vectors = common * rng.normal(size=300) + (1 - common) * rng.normal(size=(nodes, 300))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    mean = vectors.mean(axis=0)
    cosines = [float(vectors[i] @ vectors[j]) for i in range(nodes) for j in range(nodes) if i != j]
    found = agreement_of(float(mean @ mean), [(1.0, 10)] * nodes, None)
    assert found == pytest.approx(np.mean(cosines), abs=1e-9)
    assert agreement_of(float(mean @ mean), [(1.0, 10)] * nodes, 0.5) == pytest.approx(0.4 + 0.2 * found)


def test_a_node_alone_agrees_with_itself() -> None:
    assert agreement_of(4.0, [(2.0, 10)], None) == 1.0
    assert agreement_of(4.0, [(2.0, 10)], 0.2) == pytest.approx(0.24), "others may come back"
    assert agreement_of(0.0, [(0.0, 10), (0.0, 10)], None) == 1.0


def test_quantised_steps_stay_near_the_mean(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    lab = Lab(tmp_path, [("w00000", rng.normal(size=(200, 100)).astype(np.float32))])
    start = lab.values["w00000"]
    nodes = [([start + rng.normal(size=start.shape).astype(np.float32)], 1) for _ in range(4)]
    lab.step(nodes, compression="int4")
    mean = sum(arrays[0] - start for arrays, _ in nodes) / 4
    assert np.linalg.norm(lab.values["w00000"] - start - mean) < 0.25 * np.linalg.norm(mean)


def test_memory_does_not_grow_with_the_nodes(tmp_path: Path) -> None:
    """Nor does it grow with the model: it is that of a few pieces of one tensor."""
    size = 4 * 2**20
    start = np.zeros(size, np.float32)
    weights.save(tmp_path / "weights", [("w00000", start)])
    write_update(tmp_path / "update", tmp_path / "weights", [start + 1], "int4")
    peaks = []
    for nodes in (2, 12):
        tracemalloc.start()
        combine(
            tmp_path / "weights", [(tmp_path / "update", 1)] * nodes, None, Outer(1.0, 0.5), "auto",
            step=tmp_path / "step", after=tmp_path / "after", velocity_after=tmp_path / "velocity",
        )  # fmt: skip
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] * 1.1
    assert peaks[1] < 3 * start.nbytes


def test_nothing_to_average_and_weights_that_run_away(tmp_path: Path) -> None:
    lab = Lab(tmp_path, [("w00000", np.float32([3e38]))])
    with pytest.raises(InvalidModel, match="no samples"):
        lab.step([])
    with pytest.raises(Diverged, match="lower the learning rate, or look for values in the data"):
        lab.step([([np.float32([3.3e38])], 1)], Outer(10.0, 0.0))
