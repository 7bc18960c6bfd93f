"""The private names of TensorFlow that the engine needs, all in this module, each with its purpose.

Tested with TensorFlow 2.21. If the two short calls do not work, `graphs` uses the ordinary call, with one line in the log. A test
names what a later version does not have any more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tensorflow.python.framework import op_def_registry


def is_operation(name: str) -> bool:
    """Whether TensorFlow has an operation of that name, in this process."""
    return op_def_registry.get(name) is not None


def with_constants(function: Any) -> Any:
    """A concrete function with its variables as constants."""
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    return convert_variables_to_constants_v2(function)


def session_call(session: Any, inputs: list[str], outputs: list[str]) -> Callable[..., list[Any]]:
    """A function of arrays, from tensors of a session by name. `Session.run` would look up its arguments each time."""
    from tensorflow.core.protobuf import config_pb2

    options = config_pb2.CallableOptions()
    options.feed.extend(inputs)
    options.fetch.extend(outputs)
    return session._make_callable_from_options(options)  # type: ignore[no-any-return]


def direct_call(function: Any) -> Callable[..., list[Any]]:
    """The innermost call of a concrete function, for arrays. They are not copied: no code writes to them or keeps them."""
    from tensorflow.python import pywrap_tfe
    from tensorflow.python.eager import context
    from tensorflow.python.framework.ops import EagerTensor

    inner, captured = function._inference_function, list(function.captured_inputs)
    where = context.context()
    handle, device = where._handle, where.device_name
    name, outputs = inner.name, len(inner.function_type.flat_outputs)
    attributes = ("executor_type", "", "config_proto", where.function_call_options.config_proto_serialized)

    def call(*arrays: Any) -> list[Any]:
        tensors = [EagerTensor(array, device, None) for array in arrays]
        found = pywrap_tfe.TFE_Py_Execute(handle, device, name, tensors + captured, attributes, outputs)
        return [output.numpy() for output in found]

    return call
