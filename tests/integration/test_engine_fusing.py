"""Optimizers of many weights step as one program of XLA, with the same numbers as Keras. If XLA cannot do it, Keras does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from node.engine.array_runtimes import TensorFlow
from node.engine.fusing import WORTHWHILE_NUMBERS, fuse, unfuse
from node.engine.tasks import Tasks
from potluck.wire.tasks import SyncTask
from support.engine_lab import training
from support.models import Files, stepwise

pytestmark = pytest.mark.tensorflow

UNITS = 720
STEPS = 6
LION_RATE = 0.0005


def wide(optimizer: Any, units: int = UNITS) -> Any:
    import keras

    keras.utils.set_random_seed(2)
    layers = [keras.layers.Dense(units, activation="relu") for _ in range(2)]
    model = keras.Sequential([keras.Input((units,)), *layers, keras.layers.Dense(3, activation="softmax")])
    model.compile(optimizer, "sparse_categorical_crossentropy")
    model.optimizer.build(model.trainable_variables)
    return model


def train(model: Any, units: int = UNITS) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(STEPS, 16, units)).astype(np.float32), rng.integers(0, 3, (STEPS, 16))
    for step in range(STEPS):
        model.train_on_batch(x[step], y[step])


def optimizers() -> dict[str, Callable[[Any], Any]]:
    return {
        "adam": lambda keras: keras.optimizers.Adam(0.002),
        "schedule": lambda keras: keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.01, 10, warmup_steps=2)),
        "adamw and a global norm": lambda keras: keras.optimizers.AdamW(0.002, global_clipnorm=0.1),
        "accumulated": lambda keras: keras.optimizers.Adam(0.002, gradient_accumulation_steps=2),
        "momentum": lambda keras: keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True, clipvalue=0.01),
        "rmsprop": lambda keras: keras.optimizers.RMSprop(0.0005, centered=True, momentum=0.5),
        "adafactor": lambda keras: keras.optimizers.Adafactor(0.002),
        "lion": lambda keras: keras.optimizers.Lion(LION_RATE, weight_decay=0.01),
        "nadam": lambda keras: keras.optimizers.Nadam(0.002, clipnorm=0.1),
    }  # fmt: skip


@pytest.mark.parametrize("name", optimizers())
def test_the_numbers_are_those_of_keras(name: str) -> None:
    import keras

    plain, fused = wide(optimizers()[name](keras)), wide(optimizers()[name](keras))
    assert fuse(fused.optimizer)
    train(stepwise(plain))
    train(fused)
    pairs = [*zip(fused.get_weights(), plain.get_weights(), strict=True)]
    pairs += [
        (ours.numpy(), theirs.numpy())
        for ours, theirs in zip(fused.optimizer.variables, plain.optimizer.variables, strict=True)
    ]
    for ours, theirs in pairs:
        if name == "lion":
            ours = flips_taken_back(ours, theirs)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-6)


def flips_taken_back(ours: Any, theirs: Any) -> Any:
    """All numbers except the few where a momentum near zero has another sign, which the last bits decide.

    Lion uses only that sign for its step, so such a weight is off by a step or two. A wrong optimizer would be off everywhere.
    """
    flipped = np.abs(ours - theirs) > 2e-6 + 1e-4 * np.abs(theirs)
    assert flipped.sum() <= max(1, ours.size // 100_000)
    assert np.all(np.abs(ours - theirs)[flipped] <= 2 * LION_RATE * STEPS)
    return np.where(flipped, theirs, ours)


def test_the_same_bits_again() -> None:
    first, second = wide("adam"), wide("adam")
    for model in (first, second):
        assert fuse(model.optimizer)
        train(model)
    for one, other in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_small_models_and_scaled_losses_are_left_alone() -> None:
    import keras

    small = wide("adam", 8)
    assert not fuse(small.optimizer)
    assert not fuse(wide(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam())).optimizer)
    assert not fuse(wide("sgd").optimizer)  # without momentum there is nothing to save


def test_embeddings_train_as_before() -> None:
    import keras

    def made() -> Any:
        keras.utils.set_random_seed(2)
        layers = keras.layers
        model = keras.Sequential([keras.Input((5,), dtype="int32"), layers.Embedding(WORTHWHILE_NUMBERS // 64, 64),
                                  layers.GlobalAveragePooling1D(), layers.Dense(3, activation="softmax")])  # fmt: skip
        model.compile("adam", "sparse_categorical_crossentropy")
        model.optimizer.build(model.trainable_variables)
        return model

    plain, fused = made(), made()
    assert fuse(fused.optimizer)
    x, y = np.random.default_rng(0).integers(0, 1000, (16, 5)), np.arange(16) % 3
    for model in (plain, fused):
        for _ in range(3):
            model.train_on_batch(x, y)
    for ours, theirs in zip(fused.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_after_unfuse_the_optimizer_is_kerass_own_again() -> None:
    model = wide("adam")
    own = model.optimizer.apply
    assert fuse(model.optimizer)
    assert model.optimizer.apply != own
    unfuse(model.optimizer)
    assert model.optimizer.apply == own


def unusual() -> Any:
    """Adam, with something in it that XLA cannot compile."""
    import keras
    import tensorflow as tf

    @keras.saving.register_keras_serializable(package="test_engine_fusing")
    class Unusual(keras.optimizers.Adam):
        def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
            same = tf.ensure_shape(tf.numpy_function(lambda array: array, [gradient], tf.float32), gradient.shape)
            super().update_step(same, variable, learning_rate)

    return Unusual(0.002)


@pytest.mark.parametrize("usual", [True, False])
@pytest.mark.parametrize("kind", ["round", "sync"])
def test_engines_fuse_the_step_and_train_without_where_xla_cannot_compile_it(
    tmp_path: Path, kind: str, usual: bool
) -> None:
    import keras

    files = Files(tmp_path / "blobs")
    model = wide(keras.optimizers.Adam(0.002) if usual else unusual())
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, UNITS)).astype(np.float32), rng.integers(0, 3, 16)
    blob, data = files.model(model), files.arrays(1, x=x, y=y)
    (tmp_path / "scratch").mkdir()
    tasks = Tasks(tmp_path / "scratch", TensorFlow(tmp_path / "scratch", threads=1).model)
    task: Any = training(blob, data, samples=3 * 16, batch_size=16)
    if kind == "sync":
        task = SyncTask(
            model=blob, data=data, image=None, formation="f", rank=0, format=task.format, members=("127.0.0.1:1",),
            batches=(16,), first_step=0, steps=3, begins=True,
        )  # fmt: skip
    paths = {sha256: str(path) for sha256, path in files.paths.items()}
    result: Any = tasks.run("job", task, paths, threading.Event(), lambda done, metrics: None)
    stepwise(model)
    for _ in range(3):
        model.train_on_batch(x, y)
    trained = tasks._member.model if kind == "sync" else tasks._sessions["job"].model  # type: ignore[union-attr]
    assert ("apply" in vars(trained.optimizer)) == usual
    assert result.steps == 3
    for ours, theirs in zip(trained.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
