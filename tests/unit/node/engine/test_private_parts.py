"""Private names of Keras and TensorFlow: if a version lacks one, this test fails by that name, instead of somebody's job."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from node.engine import keras_parts, tensorflow_parts


def trained() -> Any:
    """A functional model with two outputs, after a step with a schedule."""
    inputs = keras.Input((4,), name="left")
    hidden = keras.layers.Dense(3)(inputs)
    model = keras.Model({"left": inputs}, {"a": keras.layers.Dense(2)(hidden), "b": keras.layers.Dense(1)(hidden)})
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    model.compile(keras.optimizers.Adam(schedule), loss={"a": "mse", "b": "mae"}, loss_weights={"a": 2.0, "b": 1.0})
    x = np.ones((8, 4), np.float32)
    model.fit({"left": x}, {"a": np.ones((8, 2)), "b": np.ones((8, 1))}, epochs=1, batch_size=4, verbose=0)
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return trained()


KERAS: dict[str, Callable[[Any], bool]] = {
    "Model._compile_loss": lambda model: keras_parts.compiled_losses(model) is not None,
    "CompileLoss.metrics": lambda model: len(keras_parts.compiled_losses(model).metrics) == 2,  # type: ignore[union-attr]
    "CompileLoss._flat_losses": lambda model: (
        [one.loss_weights for one in keras_parts.flat_losses(keras_parts.compiled_losses(model))] == [2.0, 1.0]
    ),
    "Model._loss_tracker": lambda model: keras_parts.loss_mean(model).name == "loss",
    "Layer._flatten_layers": lambda model: len(keras_parts.all_layers(model)) == 5,
    "Optimizer._iterations": lambda model: int(keras_parts.steps(model.optimizer)) == 2,
    "Optimizer._learning_rate": lambda model: keras_parts.schedule(model.optimizer) is not None,
    "Optimizer._trainable_variables": lambda model: len(keras_parts.trained_by(model.optimizer)) == 6,
    "Functional._inputs_struct": lambda model: list(keras_parts.inputs_of(model) or ()) == ["left"],
    "Functional._outputs_struct": lambda model: sorted(keras_parts.outputs_of(model) or ()) == ["a", "b"],
    "KerasTensor._keras_history": lambda model: keras_parts.history(model.inputs[0]) is not None,
    "saving_lib.H5IOStore": lambda model: hasattr(keras_parts.saving().H5IOStore, "__getitem__"),
    "saving_lib.safe_get_h5_dataset": lambda model: callable(keras_parts.saving().safe_get_h5_dataset),
}


@pytest.mark.parametrize("name", KERAS)
def test_keras_has(name: str, model: Any) -> None:
    assert KERAS[name](model)


def test_keras_has_sequential_functional() -> None:
    assert keras_parts.functional(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])) is not None


def test_a_plain_learning_rate_is_no_schedule() -> None:
    assert keras_parts.schedule(keras.optimizers.SGD(0.1)) is None


def test_tensorflow_has_what_the_short_calls_rest_on(model: Any) -> None:
    function = tf.function(lambda x: model({"left": x})["a"]).get_concrete_function(
        tf.TensorSpec((None, 4), tf.float32)
    )
    x = np.ones((3, 4), np.float32)
    expected = model({"left": x})["a"].numpy()
    (direct,) = tensorflow_parts.direct_call(function)(x)
    np.testing.assert_allclose(direct, expected, rtol=1e-6)
    frozen = tensorflow_parts.with_constants(function)
    graph = tf.Graph()
    with graph.as_default():
        tf.import_graph_def(frozen.graph.as_graph_def(), name="")
    call = tensorflow_parts.session_call(
        tf.compat.v1.Session(graph=graph), [one.name for one in frozen.inputs], [one.name for one in frozen.outputs]
    )
    np.testing.assert_allclose(call(x)[0], expected, rtol=1e-5)
    assert tensorflow_parts.is_operation("MatMul")
    assert not tensorflow_parts.is_operation("NoSuchOperation")
