"""Models that TensorFlow runs for inference: Keras models and SavedModels, each as one concrete function, traced once at load."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from node.engine import fitting, keras_models, pixels, tensorflow_parts
from node.engine.fitting import Array
from node.engine.memory import shortage
from node.engine.wording import one_line
from potluck.errors import InvalidModel, ModelFailed
from potluck.logs import fields
from potluck.wire.values import Signature

log = logging.getLogger(__name__)

Call = Callable[..., list[Array]]
"""A function of arrays, by position."""

BY_VALUES = (tf.errors.InvalidArgumentError, tf.errors.OutOfRangeError, tf.errors.UnknownError)
"""Errors that other input values might not cause (UnknownError: from Python in the model). Other errors are the model's fault."""

ROWS_LIMIT = 256
"""Requests of more rows run in pieces, so that memory stays bounded."""

SMALL_WEIGHTS = 4_000_000
"""A model with fewer weights is called in a session. With 13 million weights, a session is only 3 % to 10 % faster, takes 200 MB
more, and loads in 4 s instead of 0.4."""


def bucket(rows: int) -> int:
    """The batch size that `rows` are padded to: the next of 1 to 8, 10, 12, 14, 16, 20, ..., so at most a quarter is waste.

    (Powers of two would waste up to half. The graph takes any batch size, so no size is traced again.)
    """
    step = 1 << max(0, (rows - 1).bit_length() - 3)
    return math.ceil(rows / step) * step


class Graph:
    """`call`, a function of tensors as `specs` describes them, as one concrete function.

    `exactly`: the only number of rows that it takes. `holds`: the object that owns the variables and must be kept alive.
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
            return self._call(*arrays)
        except (*BY_VALUES, ValueError) as error:
            raise shortage(error) or ModelFailed(f"the model failed on this input: {one_line(error)}") from error
        except tf.errors.OpError as error:
            raise shortage(error) or InvalidModel(f"the model cannot run: {one_line(error)}") from error

    def _shortest_call(self) -> Call:
        """The function without the checks of its arguments, which `fitting` has made already.

        A model of 64-128-10 on one row takes 300 us if called as usual, 130 us directly, 8 us in a session (200 and 50 us if it is
        not in the processor's cache). The two short ways are not in TensorFlow's public interface. If a way is missing, or does
        not take this model, the next one is used.
        """
        small = sum(variable.shape.num_elements() for variable in self._function.graph.variables) < SMALL_WEIGHTS
        some = fitting.invented(self.signature.inputs, self.dtypes, self.rows_at_once(1))
        for make in (self._session_call, self._direct_call) if small else (self._direct_call,):
            try:
                call = make()
                try:
                    count = len(call(*some))
                except BY_VALUES:  # the model does not take zeros, but the call works
                    count = len(self._function.outputs)
                assert count == len(self.signature.outputs)
            except (ImportError, AttributeError, TypeError, ValueError, AssertionError, tf.errors.OpError) as error:
                if found := shortage(error):  # no other way has memory either, and TensorFlow waits 10 s each time
                    raise found from error
                log.info("no short call %s", fields(way=make.__name__.strip("_"), reason=one_line(error)))
            else:
                return call
        return self._ordinary_call()

    def _session_call(self) -> Call:
        """A session of the function with its variables as constants. Its operations run one after the other.

        In a small model, handing operations to threads takes longer than computing them, and so does each layer between Python and
        them. Constant weights can be laid out for the processor once (MobileNetV2: 1.3 to 1.6 times as fast). The cost is a few
        copies of the weights. Raises ValueError for a function that reads or keeps more than variables.
        """
        if tf.config.list_logical_devices("GPU"):
            raise ValueError("it is for models that run on CPUs")
        held = [tensor for tensor in self._function.captured_inputs if tensor.dtype == tf.resource]
        if len(held) > len(self._function.graph.variables):
            raise ValueError("it holds more than variables: a table, it may be")
        frozen = tensorflow_parts.with_constants(self._function)
        stateful = {operation.type for operation in frozen.graph.get_operations() if operation.op_def.is_stateful}
        if frozen.captured_inputs or stateful - {"Placeholder"}:
            raise ValueError(f"it does more than compute: {', '.join(sorted(stateful))}")
        graph = tf.Graph()
        with graph.as_default():
            tf.import_graph_def(frozen.graph.as_graph_def(), name="")
        session = tf.compat.v1.Session(graph=graph, config=tf.compat.v1.ConfigProto(inter_op_parallelism_threads=-1))
        names = [[tensor.name for tensor in tensors] for tensors in (frozen.inputs, frozen.outputs)]
        return tensorflow_parts.session_call(session, *names)

    def _direct_call(self) -> Call:
        return tensorflow_parts.direct_call(self._function)

    def _ordinary_call(self) -> Call:
        function = self._function
        return lambda *arrays: [output.numpy() for output in function(*[tf.constant(array) for array in arrays])]


def load_keras(path: Path, scratch: Path) -> Graph:
    """A `.keras` or `.h5` file. Raises InvalidModel, CodeNotAllowed."""
    model = keras_models.load_model(path, scratch, compiled=False)

    def call(*batch: Any) -> list[Any]:
        return keras_models.flat(model(keras_models.packed(model, batch), training=False))

    specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in model.inputs]
    return Graph(call, specs, pixels.described(model), holds=model)
