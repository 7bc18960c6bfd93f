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

SMALL_WEIGHTS = 4_000_000
"""Of a model with fewer, how it is called matters more than on how many threads its operations run."""


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
            return [output.numpy() for output in self._call(*arrays)]
        except (tf.errors.OpError, ValueError) as error:
            raise InvalidRequest(f"the model failed on this input: {one_line(error)}") from error

    def _shortest_call(self) -> Callable[..., list[Any]]:
        """The function without the checks of its arguments, which `fitting` has made: 130 us instead of 300 for a small model.

        That way is TensorFlow's own, but not in its interface: where it is gone, the ordinary one serves.
        """
        function = self._function

        def ordinary(*arrays: Array) -> list[Any]:
            found: list[Any] = function(*[tf.constant(array) for array in arrays])
            return found

        zeros = fitting.zeros(self.signature.inputs, self.dtypes, self.rows_at_once(1))
        try:
            if sum(variable.shape.num_elements() for variable in function.graph.variables) < SMALL_WEIGHTS:
                direct = self._direct_call("SINGLE_THREADED_EXECUTOR")
                try:
                    assert len(direct(*zeros)) == len(self.signature.outputs)
                except tf.errors.OpError as error:  # it does not take every model: none with loops, say
                    log.info("not on one thread: %s", one_line(error))
                else:
                    return direct
            direct = self._direct_call("")
            assert len(direct(*zeros)) == len(self.signature.outputs)
        except tf.errors.OpError:  # zeros do not suit it; the way is there
            assert len(function.outputs) == len(self.signature.outputs)
        except (ImportError, AttributeError, TypeError, ValueError, AssertionError) as error:
            log.info("short call not usable: %s", error)
            return ordinary
        return direct

    def _direct_call(self, executor: str) -> Callable[..., list[Any]]:
        """What a concrete function comes to in the end. Inputs are not copied: nobody writes to them, and nothing keeps them.

        On one thread the operations run one after the other: in a small model, handing them to others takes longer than they do.
        """
        from tensorflow.python import pywrap_tfe
        from tensorflow.python.eager import context
        from tensorflow.python.framework.ops import EagerTensor

        inner, captured = self._function._inference_function, list(self._function.captured_inputs)
        where = context.context()
        handle, device = where._handle, where.device_name
        name, outputs = inner.name, len(inner.function_type.flat_outputs)
        attributes = ("executor_type", executor, "config_proto", where.function_call_options.config_proto_serialized)

        def call(*arrays: Array) -> list[Any]:
            inputs = [EagerTensor(array, device, None) for array in arrays]
            found: list[Any] = pywrap_tfe.TFE_Py_Execute(handle, device, name, inputs + captured, attributes, outputs)
            return found

        return call


def load_keras(path: Path, scratch: Path) -> Graph:
    """A `.keras` or `.h5` file. Raises InvalidModel, CodeNotAllowed."""
    model = runtime.load_model(path, scratch, compiled=False)

    def call(*batch: Any) -> list[Any]:
        return runtime.flat(model(runtime.packed(model, batch), training=False))

    specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in model.inputs]
    return Graph(call, specs, runtime.signature(model), holds=model)
