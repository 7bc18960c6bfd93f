"""The private names of Keras that the engine needs, all in this module, each with its purpose.

Tested with Keras 3.15.1. A test names each one that a later version does not have any more.
"""

from __future__ import annotations

from typing import Any

import keras


def compiled_losses(model: Any) -> Any | None:
    """The losses of a compiled model, with the metrics that follow them output by output; None where it has no loss.

    `Model.metrics` has these metrics, and does not say which they are.
    """
    return model._compile_loss


def flat_losses(compiled: Any) -> list[Any]:
    """One for each output, with its weight in the sum: `compile(loss_weights=...)` cannot be asked for them."""
    return list(compiled._flat_losses)


def loss_mean(model: Any) -> Any:
    """The metric that Keras shows as `loss`: a training step of our own has to feed it, as `train_step` does."""
    return model._loss_tracker


def all_layers(model: Any) -> list[Any]:
    """The layers at every depth; `Model.layers` has the uppermost alone."""
    return list(model._flatten_layers())


def steps(optimizer: Any) -> Any:
    """The counter of steps, by which a schedule goes; `optimizer.iterations` counts accumulated gradients otherwise."""
    return optimizer._iterations


def schedule(optimizer: Any) -> Any | None:
    """The schedule of the learning rate; None where it has none. `optimizer.learning_rate` gives today's number."""
    found = getattr(optimizer, "_learning_rate", None)
    return found if isinstance(found, keras.optimizers.schedules.LearningRateSchedule) else None


def trained_by(optimizer: Any) -> list[Any]:
    """The variables that it was built for, in the order of its state."""
    return optimizer._trainable_variables  # type: ignore[no-any-return]


def inputs_of(model: Any) -> Any | None:
    """The inputs of a functional model as it was given them: a map keeps its keys, which `Model.inputs` does not tell."""
    return getattr(model, "_inputs_struct", None)


def outputs_of(model: Any) -> Any | None:
    """The same of its outputs."""
    return getattr(model, "_outputs_struct", None)


def history(tensor: Any) -> Any | None:
    """Which operation made a symbolic tensor: what stands behind an input is looked at for how it scales pixels."""
    return getattr(tensor, "_keras_history", None)


def functional(model: Any) -> Any | None:
    """The functional model within a sequential one."""
    return getattr(model, "_functional", None)


def saving() -> Any:
    """The module that reads and writes `.keras` files: how it reads weights cannot be chosen (`keras_models._weights_from_disk`)."""
    from keras.src.saving import saving_lib

    return saving_lib
