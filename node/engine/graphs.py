"""Models that TensorFlow runs for inference: Keras models and SavedModels, each as one concrete function, traced once at load."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from node.engine import fitting, runtime
from node.engine.fitting import Array
from node.engine.wording import one_line
from potluck.errors import InvalidRequest
from potluck.messages import Signature

log = logging.getLogger(__name__)

ROWS_LIMIT = 256
"""Requests of more rows run in pieces, so that memory stays bounded."""


def bucket(rows: int) -> int:
    """The batch size that `rows` are padded to: the next of 1 to 8, 10, 12, 14, 16, 20, ..., so at most a quarter is waste.

    (Powers of two would waste up to half, and with a graph for any batch size nothing is traced anew either way.)
    """
    step = 1 << max(0, (rows - 1).bit_length() - 3)
    return math.ceil(rows / step) * step


class Graph:
    """`call` of tensors, as `specs` has them, as one concrete function.

    `exactly`: the only number of rows that it takes. `holds`: what has the variables, which live as long as it does.
    """

    def __init__(
        self,
        call: Callable[..., list[Any]],
        specs: Sequence[Any],
        signature: Signature,
        *,
        exactly: int | None = None,
        holds: Any,
    ) -> None:
        self.signature = signature
        self._holds = holds
        self.dtypes = tuple(np.dtype(tf.as_dtype(spec.dtype).as_numpy_dtype) for spec in specs)
        self._exactly = exactly
        self._function = tf.function(call, input_signature=list(specs)).get_concrete_function()
        self._call = self._shortest_call()

    def rows_at_once(self, rows: int) -> int:
        return self._exactly or (ROWS_LIMIT if rows > ROWS_LIMIT else bucket(rows))

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        try:
            return [output.numpy() for output in self._call(*[tf.constant(array) for array in arrays])]
        except (tf.errors.OpError, ValueError) as error:
            raise InvalidRequest(f"the model failed on this input: {one_line(error)}") from error

    def _shortest_call(self) -> Callable[..., list[Any]]:
        """The function without the checks of its arguments, which `fitting` has made: 130 us instead of 300 for a small model.

        That way is TensorFlow's own, but not in its interface: where it is gone, the ordinary one serves.
        """
        function = self._function
        try:
            inner, captured = function._inference_function, list(function.captured_inputs)
            arrays = fitting.zeros(self.signature.inputs, self.dtypes, self.rows_at_once(1))
            found: list[Any] = inner.call_flat(*[tf.constant(array) for array in arrays], *captured)
            assert len(found) == len(self.signature.outputs)
        except tf.errors.OpError:  # zeros do not suit it; the way is there
            assert len(function.outputs) == len(self.signature.outputs)
        except (AttributeError, TypeError, ValueError, AssertionError) as error:
            log.info("short call not usable: %s", error)
            return function  # type: ignore[no-any-return]
        return lambda *batch: inner.call_flat(*batch, *captured)


def load_keras(path: Path, scratch: Path) -> Graph:
    """A `.keras` or `.h5` file. Raises InvalidModel, CodeNotAllowed."""
    model = runtime.load_model(path, scratch, compiled=False)

    def call(*batch: Any) -> list[Any]:
        return runtime.flat(model(runtime.packed(model, batch), training=False))

    specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in model.inputs]
    return Graph(call, specs, runtime.signature(model), holds=model)
