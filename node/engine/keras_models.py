"""Keras models as the engine loads them, and what it reads and sets in them."""

from __future__ import annotations

import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import keras
import numpy as np
import tensorflow as tf

from node.engine import archives, code, keras_parts, memory, state
from node.engine.memory import shortage
from node.engine.shards import ALIGNMENT, aligned
from node.engine.wording import one_line
from potluck.errors import InvalidModel
from potluck.weights import files as weights
from potluck.wire.specs import shown
from potluck.wire.tensors import datatype_of
from potluck.wire.values import Signature, TensorSpec

HDF5 = b"\x89HDF\r\n\x1a\n"
"""The first bytes of an HDF5 file."""


def load_model(path: Path, scratch: Path, *, compiled: bool) -> Any:
    """A model from a `.keras` or `.h5` file, with only the users' code that the node allows. The optimizer of a `.h5` starts anew.

    Raises InvalidModel, CodeNotAllowed, OutOfMemory.
    """
    if not _is_zip(path) and not _is_hdf5(path):
        raise InvalidModel(
            "the model is not a .keras file (Keras 3) or .h5 file: save it with model.save('name.keras')"
        )
    if not _is_hdf5(path):
        archives.check(path, memory.limit_bytes)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        # Keras needs the suffix, and a blob has none.
        link = Path(folder) / ("model.h5" if _is_hdf5(path) else "model.keras")
        link.symlink_to(path.absolute())
        try:
            with warnings.catch_warnings(), _weights_from_disk():
                warnings.simplefilter("ignore")  # no need to warn of an optimizer without state
                model = keras.saving.load_model(link, compile=compiled, safe_mode=code.safe_mode())
            code.describe(model)
        except Exception as error:
            # The reason is at the end of the text, after the model's whole configuration.
            found = code.refusal(one_line(error, 10_000)) or shortage(error)
            raise found or InvalidModel(_reason(error)) from error
    if not getattr(model, "inputs", None):
        raise InvalidModel("the model has no defined inputs: build it (keras.Input, or call it once) before saving")
    fixed = [tensor.shape[0] for tensor in model.inputs if tensor.shape[0] is not None]
    if fixed:
        raise InvalidModel(
            f"the model takes exactly {fixed[0]} items at once: give its inputs a shape without a batch size (keras.Input(shape))"
        )
    if compiled and _is_hdf5(path) and getattr(model, "optimizer", None) is not None:
        # Keras reads the optimizer's state for variables of another model, and the optimizer then refuses this model's.
        model.optimizer = type(model.optimizer).from_config(model.optimizer.get_config())
    return model


LARGE_BYTES = 2**24
"""Size of a large variable. Smaller ones may be in memory several times while they are loaded."""
RANDOM = (
    *(keras.initializers.VarianceScaling, keras.initializers.RandomNormal, keras.initializers.RandomUniform),
    *(keras.initializers.TruncatedNormal, keras.initializers.Orthogonal),
)


@contextmanager
def _weights_from_disk() -> Iterator[None]:
    """Let Keras read a model's weights from a file, one by one, and not draw random ones before.

    If there is memory for it, Keras first reads all weights into memory, twice for a moment. Before that, it draws random weights,
    which takes three times the size of a layer. Its interface has no option for either. Every variable of Keras's own layers is in
    the file, or loading fails. Layers of users may leave some out, so theirs are still drawn. Large variables are read into memory
    that TensorFlow takes over without a copy.
    """
    saving_lib = keras_parts.saving()

    def nothing(self: Any, shape: Any, dtype: Any = None, **_: Any) -> Any:
        return tf.raw_ops.Empty(shape=shape, dtype=keras.backend.standardize_dtype(dtype), init=False)

    ordinary = saving_lib.H5IOStore.__getitem__

    def large(self: Any, key: str) -> Any:
        stored = saving_lib.safe_get_h5_dataset(self._h5_entry_group, key)
        if stored.nbytes < LARGE_BYTES or stored.dtype.kind != "f" or "dtype" in stored.attrs:
            return ordinary(self, key)
        array = aligned(stored.shape, stored.dtype)
        stored.read_direct(array)
        return held(array)

    changes: list[tuple[Any, str, Any]] = [
        (saving_lib, "is_memory_sufficient", lambda model: False),
        (saving_lib.H5IOStore, "__getitem__", large),
        *((kind, "__call__", nothing) for kind in RANDOM if not code.runs_users()),
    ]
    with ExitStack() as stack:
        for owner, name, new in changes:
            if hasattr(owner, name):  # another version of Keras may do this differently: then leave it alone
                stack.enter_context(mock.patch.object(owner, name, new))
        yield


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # one of several parts of an archive
        return False


def _is_hdf5(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(HDF5)) == HDF5


def _reason(error: Exception) -> str:
    if isinstance(error, zipfile.BadZipFile | KeyError):
        return f"the model file is damaged: {type(error).__name__}: {one_line(error)}: save it again"
    return f"the model cannot be loaded: {type(error).__name__}: {one_line(error, 400)}"


def has_loss(model: Any) -> bool:
    return bool(getattr(model, "compiled", False)) and model.loss is not None


def need_trainable(model: Any) -> None:
    """Raises InvalidModel if the model has no loss, or if its optimizer's result is not the weights that it trains."""
    if not has_loss(model):
        raise InvalidModel(
            "the model is not compiled: call model.compile(optimizer=..., loss=..., metrics=[...]) before saving"
        )
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    if getattr(optimizer, "use_ema", False):
        raise InvalidModel(
            "the optimizer was made with use_ema=True: its moving average is over the steps of one machine, and would be lost here; "
            "compile the model without it"
        )


def signature(model: Any) -> Signature:
    """Inputs and outputs by name, the same in every process that loads the file; -1 for free dimensions."""
    ins, outs = zip(input_names(model), model.inputs, strict=True), zip(output_names(model), model.outputs, strict=True)
    return Signature(
        inputs=tuple(_spec(name, tensor) for name, tensor in ins),
        outputs=tuple(_spec(name, tensor) for name, tensor in outs),
    )


def input_names(model: Any) -> list[str]:
    """Input names in the order of `model.inputs`: the keys if the model takes a map, else the names of the layers."""
    struct = keras_parts.inputs_of(model)
    if isinstance(struct, dict) and len(struct) == len(model.inputs):
        keys = {id(tensor): str(key) for key, tensor in struct.items()}
        return [keys[id(tensor)] for tensor in model.inputs]
    return [_input_name(tensor) for tensor in model.inputs]


def output_names(model: Any) -> list[str]:
    """Output names in the order of `model.outputs`: the keys if the model returns a map, else the names of the layers."""
    count = len(model.outputs)
    struct = keras_parts.outputs_of(model)
    if isinstance(struct, dict) and len(struct) == count:
        keys = {id(tensor): str(key) for key, tensor in struct.items()}
        return [keys[id(tensor)] for tensor in model.outputs]
    names = list(getattr(model, "output_names", None) or [f"output_{i}" for i in range(count)])
    if len(set(names)) < len(names):  # one layer with several outputs
        names = [f"{name}_{i}" for i, name in enumerate(names)]
    return names


def output_losses(model: Any) -> list[Any]:
    """The compiled loss of each output, in the order of `model.outputs`; None where it has none."""
    loss, names = model.loss, output_names(model)
    if isinstance(loss, dict):
        return [loss.get(name) for name in names]
    if isinstance(loss, list | tuple):
        return list(loss) if len(loss) == len(names) else [loss[0]] * len(names)
    return [loss] * len(names)


def packed(model: Any, tensors: Sequence[Any]) -> Any:
    """Tensors in the order of `model.inputs`, packed as the model takes them: alone, or in its list or map."""
    struct = keras_parts.inputs_of(model)
    if struct is None:
        return tensors[0] if len(tensors) == 1 else tuple(tensors)
    if isinstance(struct, list):
        return tuple(tensors)  # in tf.data, a list would become one tensor
    return keras.tree.pack_sequence_as(struct, list(tensors))


def packed_targets(model: Any, tensors: Sequence[Any]) -> Any:
    """Targets in the order of `model.outputs`, packed as the compiled loss takes them: alone, or in the model's list or map."""
    if len(tensors) == 1:
        return tensors[0]
    struct = keras_parts.outputs_of(model)
    if struct is None or isinstance(struct, list):
        return tuple(tensors)
    return keras.tree.pack_sequence_as(keras.tree.lists_to_tuples(struct), list(tensors))


def held(array: Any) -> Any:
    """A tensor in the host's memory. If possible it shares the array's memory: so the array must not change any more."""
    flags = array.flags  # DLPack does not know read-only arrays
    fits = flags.c_contiguous and flags.writeable and array.ctypes.data % ALIGNMENT == 0
    if fits and array.size and array.dtype.kind in "fiu":
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
    with tf.device("CPU"):
        return tf.constant(array)


def flat(outputs: Any) -> list[Any]:
    """The outputs of a model, in the order of `model.outputs`; bfloat16 becomes float32, as messages have no bfloat16."""
    return [
        tf.cast(output, tf.float32) if output.dtype == tf.bfloat16 else output for output in keras.tree.flatten(outputs)
    ]


def _input_name(tensor: Any) -> str:
    """The name of its input layer: unlike the name of the tensor, it is in the file."""
    history = keras_parts.history(tensor)
    return str(history.operation.name if history is not None else tensor.name)


def _spec(name: str, tensor: Any) -> TensorSpec:
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    datatype = {"string": "BYTES", "bfloat16": "FP32"}.get(dtype) or datatype_of(np.dtype(dtype))
    return TensorSpec(name=name, datatype=datatype, shape=tuple(-1 if d is None else int(d) for d in tensor.shape))


def set_weights(model: Any, path: Path, change: Callable[[int, Any], Any] = lambda place, value: value) -> None:
    """Set weights from a safetensors file in the order of `model.weights`, and apply constraints. Raises InvalidModel if they do
    not fit; the model is then unchanged.

    They are read one by one, so that memory holds no second copy of all. `change` makes the value to set from place and value.
    """
    with weights.Reader(path) as stored:
        names = sorted(stored.specs, key=lambda name: name[1:])
        if len(names) != len(model.weights):
            raise InvalidModel(
                f"the weights do not fit the model: they are {len(names)}, and it has {len(model.weights)}"
            )
        for weight, name in zip(model.weights, names, strict=True):
            if tuple(weight.shape) != stored.specs[name].shape:
                raise InvalidModel(
                    f"the weights do not fit the model: '{weight.path}' has shape {shown(tuple(weight.shape))}, "
                    f"and they have {shown(stored.specs[name].shape)} there"
                )
        for place, (weight, name) in enumerate(zip(model.weights, names, strict=True)):
            weight.assign(change(place, stored.whole(name)))
    state.constrain(model)


def save_weights(model: Any, path: Path) -> None:
    """Save `model.weights` in order, without seeds of random layers. Names: w00000 is a trained weight, s00001 untrained state."""
    names = ["w" if role == "trained" else "s" for role in state.roles(model)]
    weights.save(
        path, ((f"{kind}{i:05}", value) for i, (kind, value) in enumerate(zip(names, weights_of(model), strict=True)))
    )


def weights_of(model: Any) -> list[Any]:
    """The weights in order, read-only; weights of 16 bits become float32, which holds them exactly.

    On a CPU they are not copied: if a variable is written while its memory is in use here, TensorFlow gives it new memory.
    """
    return [value_of(weight) for weight in model.weights]


def value_of(weight: Any) -> Any:
    """The value of one weight, as in `weights_of`."""
    value = np.asarray(tf.convert_to_tensor(weight.value))
    return value.astype(np.float32) if value.dtype.itemsize == 2 and value.dtype.kind not in "iu" else value
