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
from potluck.wire.messages import Signature, TensorSpec
from potluck.wire.specs import shown
from potluck.wire.tensors import datatype_of

HDF5 = b"\x89HDF\r\n\x1a\n"
"""What such a file begins with."""


def load_model(path: Path, scratch: Path, *, compiled: bool) -> Any:
    """A model from a `.keras` or `.h5` file, without code of users but what the node allows; the optimizer of a `.h5` begins anew.

    Raises InvalidModel, CodeNotAllowed, OutOfMemory.
    """
    if not zipfile.is_zipfile(path) and not _is_hdf5(path):
        raise InvalidModel(
            "the model is not a .keras file (Keras 3) or .h5 file: save it with model.save('name.keras')"
        )
    if not _is_hdf5(path):
        archives.check(path, memory.limit_bytes)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        # Keras goes by the suffix, and a blob has none.
        link = Path(folder) / ("model.h5" if _is_hdf5(path) else "model.keras")
        link.symlink_to(path.absolute())
        try:
            with warnings.catch_warnings(), _weights_from_disk():
                warnings.simplefilter("ignore")  # an optimizer that was not saved with its state is no news
                model = keras.saving.load_model(link, compile=compiled, safe_mode=code.safe_mode())
            code.describe(model)
        except Exception as error:
            # What went wrong stands at the end of it, after the model's whole configuration.
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
        # Keras reads its state into variables of another model, and then it refuses this one's.
        model.optimizer = type(model.optimizer).from_config(model.optimizer.get_config())
    return model


LARGE_BYTES = 2**24
"""Of one variable; smaller ones may be in memory a few times while they are loaded."""
RANDOM = (
    *(keras.initializers.VarianceScaling, keras.initializers.RandomNormal, keras.initializers.RandomUniform),
    *(keras.initializers.TruncatedNormal, keras.initializers.Orthogonal),
)


@contextmanager
def _weights_from_disk() -> Iterator[None]:
    """Let Keras take a model's weights from a file, one by one, and make no others before.

    Where there is memory for it, Keras reads all of them into memory first, twice for a moment; and before that it draws random ones,
    of which a layer takes three times its size. Neither is an option of its interface. Every variable of Keras's own layers is in the
    file, or loading fails; layers of users may keep some out of it, so that theirs are drawn. Large ones are read into memory that
    TensorFlow then takes as it is.
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
            if hasattr(owner, name):  # another Keras may do it in another way, and then as it likes
                stack.enter_context(mock.patch.object(owner, name, new))
        yield


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
    """Raises InvalidModel for a model without a loss, or with an optimizer whose result is not the weights that it trains."""
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
    """In the order of `model.inputs`: the keys of a model that takes a map, as Keras goes by them, else the names of the layers."""
    struct = keras_parts.inputs_of(model)
    if isinstance(struct, dict) and len(struct) == len(model.inputs):
        keys = {id(tensor): str(key) for key, tensor in struct.items()}
        return [keys[id(tensor)] for tensor in model.inputs]
    return [_input_name(tensor) for tensor in model.inputs]


def output_names(model: Any) -> list[str]:
    """In the order of `model.outputs`: the keys of a model that answers a map, else the names of the layers."""
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
    """Tensors in the order of `model.inputs` as the model is called with: alone, or in its own list or map."""
    struct = keras_parts.inputs_of(model)
    if struct is None:
        return tensors[0] if len(tensors) == 1 else tuple(tensors)
    if isinstance(struct, list):
        return tuple(tensors)  # in tf.data, a list would become one tensor
    return keras.tree.pack_sequence_as(struct, list(tensors))


def packed_targets(model: Any, tensors: Sequence[Any]) -> Any:
    """Targets in the order of `model.outputs` as the compiled loss takes them: alone, or in the model's own list or map."""
    if len(tensors) == 1:
        return tensors[0]
    struct = keras_parts.outputs_of(model)
    if struct is None or isinstance(struct, list):
        return tuple(tensors)
    return keras.tree.pack_sequence_as(keras.tree.lists_to_tuples(struct), list(tensors))


def held(array: Any) -> Any:
    """A tensor in the host's memory, of NumPy's own memory where TensorFlow can take that: then the array must not change any more."""
    flags = array.flags  # DLPack has no word for what is only to be read
    fits = flags.c_contiguous and flags.writeable and array.ctypes.data % ALIGNMENT == 0
    if fits and array.size and array.dtype.kind in "fiu":
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
    with tf.device("CPU"):
        return tf.constant(array)


def flat(outputs: Any) -> list[Any]:
    """What a model answers, in the order of `model.outputs`; bfloat16, which the wire has not, as float32."""
    return [
        tf.cast(output, tf.float32) if output.dtype == tf.bfloat16 else output for output in keras.tree.flatten(outputs)
    ]


def _input_name(tensor: Any) -> str:
    """That of its input layer: unlike the tensor's, it stands in the file."""
    history = keras_parts.history(tensor)
    return str(history.operation.name if history is not None else tensor.name)


def _spec(name: str, tensor: Any) -> TensorSpec:
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    datatype = {"string": "BYTES", "bfloat16": "FP32"}.get(dtype) or datatype_of(np.dtype(dtype))
    return TensorSpec(name=name, datatype=datatype, shape=tuple(-1 if d is None else int(d) for d in tensor.shape))


def set_weights(model: Any, path: Path, change: Callable[[int, Any], Any] = lambda place, value: value) -> None:
    """Weights from a safetensors file in the order of `model.weights`, with constraints held. Raises InvalidModel when they do not fit.

    Then the model is as it was. One after the other is read, so that no second copy of all is in memory; `change` makes
    what is set of each one's place and value.
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
    """`model.weights` (seeds of random layers are not among them) in order: w00000 is trained, s00001 is state that is not."""
    names = ["w" if role == "trained" else "s" for role in state.roles(model)]
    weights.save(
        path, ((f"{kind}{i:05}", value) for i, (kind, value) in enumerate(zip(names, weights_of(model), strict=True)))
    )


def weights_of(model: Any) -> list[Any]:
    """Its weights in order, only to be read; those of 16 bits as float32, which holds them exactly.

    On a CPU they are not copied: TensorFlow gives a variable that is written to another memory while somebody looks at this.
    """
    return [value_of(weight) for weight in model.weights]


def value_of(weight: Any) -> Any:
    """One of those."""
    value = np.asarray(tf.convert_to_tensor(weight.value))
    return value.astype(np.float32) if value.dtype.itemsize == 2 and value.dtype.kind not in "iu" else value
