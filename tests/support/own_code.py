"""A user's own code, imported by nodes that allow it (`allow_code = ["own_code"]`, with this folder on PYTHONPATH)."""

from __future__ import annotations

import os
import time
from typing import Any

import keras


@keras.saving.register_keras_serializable(package="own")
class Scale(keras.layers.Layer):  # type: ignore[misc]
    """Multiplies by a trained factor."""

    def build(self, shape: Any) -> None:
        self.factor = self.add_weight(shape=(), initializer="ones", name="factor")

    def call(self, x: Any) -> Any:
        return x * self.factor


@keras.saving.register_keras_serializable(package="own")
def cubed_error(y: Any, predicted: Any) -> Any:
    return keras.ops.mean(keras.ops.abs(y - predicted) ** 3, axis=-1)


@keras.saving.register_keras_serializable(package="own")
class Largest(keras.metrics.Metric):  # type: ignore[misc]
    """The largest error so far: not a mean, so only training reports it."""

    def __init__(self, name: str = "largest", **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)
        self.value = self.add_weight(shape=(), initializer="zeros", name="value")

    def update_state(self, y: Any, predicted: Any, sample_weight: Any = None) -> None:
        self.value.assign(keras.ops.maximum(self.value, keras.ops.max(keras.ops.abs(y - predicted))))

    def result(self) -> Any:
        return self.value


@keras.saving.register_keras_serializable(package="own")
class Network(keras.Model):  # type: ignore[misc]
    """A subclassed model: its work is in `call`."""

    def __init__(self, units: int = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units = units
        self.hidden = keras.layers.Dense(units, activation="tanh")
        self.last = keras.layers.Dense(1)

    def call(self, x: Any) -> Any:
        return self.last(self.hidden(x))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable(package="own")
class Pair(keras.Model):  # type: ignore[misc]
    """A model with two inputs, in a list or a map, and two outputs."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sum, self.difference = keras.layers.Dense(1), keras.layers.Dense(1)

    def call(self, inputs: Any) -> Any:
        left, right = keras.tree.flatten(inputs)
        return {"sum": self.sum(left + right), "difference": self.difference(left - right)}


@keras.saving.register_keras_serializable(package="own")
class Stepping(Network):
    """A model with its own step: it learns the double of its targets."""

    def train_step(self, data: Any) -> Any:
        x, y = data[:2]
        return super().train_step((x, 2 * y))


@keras.saving.register_keras_serializable(package="own")
class Sleeper(keras.layers.Layer):  # type: ignore[misc]
    """If OWN_CODE_SLEEPS is set, a call never returns, not even when it is traced."""

    def call(self, x: Any) -> Any:
        if os.environ.get("OWN_CODE_SLEEPS"):
            time.sleep(1e6)
        return x


@keras.saving.register_keras_serializable(package="own")
class Looper(keras.layers.Layer):  # type: ignore[misc]
    """A call never returns for numbers above 100."""

    def call(self, x: Any) -> Any:
        return keras.ops.while_loop(lambda y: keras.ops.max(y) > 100, lambda y: (y + 1,), (x,))[0]
