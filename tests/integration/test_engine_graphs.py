"""How the engine calls a graph: in a session, directly, or as usual, with the same answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potluck.errors import InvalidRequest

pytestmark = pytest.mark.tensorflow


def small() -> tuple[Any, list[np.ndarray[Any, Any]]]:
    from keras import Input, Model, layers

    a, b = Input((8, 8, 3), name="a"), Input((4,), name="b")
    x = layers.Flatten()(layers.BatchNormalization()(layers.Conv2D(4, 3, activation="relu")(a)))
    model = Model([a, b], [layers.Dense(3)(layers.Concatenate()([x, b])), layers.Dropout(0.5)(b)])
    random = np.random.default_rng(0)
    return model, [random.random((5, 8, 8, 3), np.float32), random.random((5, 4), np.float32)]


def looping() -> tuple[Any, list[np.ndarray[Any, Any]]]:
    from keras import Input, Sequential, layers

    model = Sequential([Input((6,), dtype="int32"), layers.Embedding(10, 4), layers.GRU(5), layers.Dense(2)])
    return model, [np.random.default_rng(0).integers(0, 10, (3, 6)).astype(np.int32)]


def texts() -> tuple[Any, list[np.ndarray[Any, Any]]]:
    from keras import Input, Sequential, layers

    words = layers.TextVectorization(output_sequence_length=4, vocabulary=["red", "green"])
    model = Sequential([Input((1,), dtype="string"), words, layers.Embedding(5, 3), layers.Flatten()])
    return model, [np.array([[b"red green"], [b"blue"]], object)]


@pytest.mark.parametrize("made", [small, looping, texts])
def test_every_way_gives_the_same_answer(made: Any, tmp_path: Path) -> None:
    from node.engine import graphs

    model, inputs = made()
    model.save(tmp_path / "m.keras")
    graph = graphs.load_keras(tmp_path / "m.keras", tmp_path)
    usual = graph._ordinary_call()(*inputs)
    assert len(usual) == len(model.outputs)
    if made is texts:
        with pytest.raises(ValueError, match="more than variables"):  # its words are in a table
            graph._session_call()
    else:
        assert "Session" in type(graph._call).__qualname__ or "Session" in type(graph._call).__module__
    for outputs in (graph.run(inputs), graph._direct_call()(*inputs)):
        for output, expected in zip(outputs, usual, strict=True):
            assert output.dtype == expected.dtype
            np.testing.assert_allclose(output, expected, rtol=1e-6, atol=1e-6)


def test_a_large_model_is_not_held_several_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from node.engine import graphs

    model, inputs = small()
    model.save(tmp_path / "m.keras")
    monkeypatch.setattr(graphs, "SMALL_WEIGHTS", 100)
    monkeypatch.setattr(graphs.Graph, "_session_call", lambda graph: pytest.fail("copies of the weights"))
    assert graphs.load_keras(tmp_path / "m.keras", tmp_path).run(inputs)[0].shape == (5, 3)


def test_a_refused_input_gives_the_same_error_in_every_way_of_calling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from node.engine import graphs

    model, inputs = looping()
    model.save(tmp_path / "m.keras")
    for most in (graphs.SMALL_WEIGHTS, 0):
        monkeypatch.setattr(graphs, "SMALL_WEIGHTS", most)
        graph = graphs.load_keras(tmp_path / "m.keras", tmp_path)
        with pytest.raises(InvalidRequest, match=r"failed on this input: indices.*not in"):
            graph.run([inputs[0] + 99])


def test_without_the_short_ways_the_usual_one_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from node.engine import graphs

    def gone(graph: Any) -> Any:
        raise AttributeError("another release of TensorFlow")

    model, inputs = small()
    model.save(tmp_path / "m.keras")
    expected = graphs.load_keras(tmp_path / "m.keras", tmp_path).run(inputs)
    monkeypatch.setattr(graphs.Graph, "_direct_call", gone)
    monkeypatch.setattr(graphs.Graph, "_session_call", gone)
    found = graphs.load_keras(tmp_path / "m.keras", tmp_path).run(inputs)
    for output, usual in zip(found, expected, strict=True):
        np.testing.assert_allclose(output, usual, rtol=1e-6, atol=1e-6)
