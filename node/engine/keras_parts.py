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
    """The loss of each output, with its weight in the sum. Keras has no public way to read `loss_weights`."""
    return list(compiled._flat_losses)


def loss_mean(model: Any) -> Any:
    """The metric that Keras shows as `loss`. Our own training step must update it, as `train_step` does."""
    return model._loss_tracker


def all_layers(model: Any) -> list[Any]:
    """The layers at every depth. `Model.layers` has only the uppermost."""
    return list(model._flatten_layers())


def steps(optimizer: Any) -> Any:
    """The counter of steps that a schedule uses. With accumulated gradients, `optimizer.iterations` is another number."""
    return optimizer._iterations


def schedule(optimizer: Any) -> Any | None:
    """The schedule of the learning rate; None if it has none. `optimizer.learning_rate` gives only the present number."""
    found = getattr(optimizer, "_learning_rate", None)
    return found if isinstance(found, keras.optimizers.schedules.LearningRateSchedule) else None


def trained_by(optimizer: Any) -> list[Any]:
    """The variables that it was built for, in the order of its state."""
    return optimizer._trainable_variables  # type: ignore[no-any-return]


def inputs_of(model: Any) -> Any | None:
    """The inputs of a functional model in their structure: a map keeps its keys, which `Model.inputs` does not have."""
    return getattr(model, "_inputs_struct", None)


def outputs_of(model: Any) -> Any | None:
    """The outputs of a functional model, in the same way."""
    return getattr(model, "_outputs_struct", None)


def history(tensor: Any) -> Any | None:
    """The operation that made a symbolic tensor. `pixels` follows operations to see how a model scales its input."""
    return getattr(tensor, "_keras_history", None)


def functional(model: Any) -> Any | None:
    """The functional model within a sequential one."""
    return getattr(model, "_functional", None)


def saving() -> Any:
    """The module that reads and writes `.keras` files. Keras has no option for how it reads weights (`keras_models._weights_from_disk`)."""
    from keras.src.saving import saving_lib

    return saving_lib
