"""TensorFlow as the engine sets it up, and models as it loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from safetensors.numpy import load_file, save_file

from potluck.errors import InvalidModel
from potluck.messages import Signature, TensorSpec
from potluck.tensors import datatype_of


def prepare(threads: int) -> tuple[dict[str, str], tuple[str, ...]]:
    """Limit threads, let GPU memory grow; versions of the runtimes, and the GPUs' names."""
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(max(2, threads))
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    names = tuple(tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name) for gpu in gpus)
    return {"tensorflow": tf.__version__, "keras": keras.__version__}, names


def load_model(path: Path, scratch: Path, *, compiled: bool) -> Any:
    """A model from a `.keras` file, in safe mode: no code of the user's runs. Raises InvalidModel."""
    link = scratch / f"{path.name}.keras"  # Keras goes by the suffix, and a blob has none
    if not link.exists():
        link.symlink_to(path)
    try:
        model = keras.saving.load_model(link, compile=compiled, safe_mode=True)
    except Exception as error:
        raise InvalidModel(_reason(error)) from error
    finally:
        link.unlink(missing_ok=True)
    if not getattr(model, "inputs", None):
        raise InvalidModel("the model has no defined inputs: build it (keras.Input, or call it once) before saving")
    return model


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "zip" in text.lower() or "not found" in text.lower():
        return "the model is not a .keras file (Keras 3): save it with model.save('name.keras')"
    if "lambda" in text.lower() or "unsafe" in text.lower():
        return f"the model holds a Lambda layer, which is code, and nodes run no code of users: use keras.ops layers. {text[:300]}"
    if "Could not locate" in text or "registered" in text:
        return (
            "the model has a custom class, which is code, and nodes run no code of users: build it of Keras's own layers "
            f"(Sequential or Functional). {text[:300]}"
        )
    return f"the model cannot be loaded: {type(error).__name__}: {text[:500]}"


def need_compiled(model: Any) -> None:
    """Raises InvalidModel for a model without a loss."""
    if not getattr(model, "compiled", False) or model.loss is None:
        raise InvalidModel(
            "the model is not compiled: call model.compile(optimizer=..., loss=..., metrics=[...]) before saving"
        )


def signature(model: Any) -> Signature:
    """Inputs and outputs by name; -1 for free dimensions."""
    outputs = model.outputs
    names = list(getattr(model, "output_names", [])) or [f"output_{i}" for i in range(len(outputs))]
    return Signature(
        inputs=tuple(_spec(tensor.name, tensor) for tensor in model.inputs),
        outputs=tuple(_spec(name, tensor) for name, tensor in zip(names, outputs, strict=True)),
    )


def _spec(name: str, tensor: Any) -> TensorSpec:
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    datatype = "BYTES" if dtype == "string" else datatype_of(np.dtype(dtype))
    return TensorSpec(name=name, datatype=datatype, shape=tuple(-1 if d is None else int(d) for d in tensor.shape))


def set_weights(model: Any, path: Path) -> None:
    """Weights from a safetensors file in the order of `model.weights`. Raises InvalidModel when they do not fit."""
    stored = load_file(path)
    values = [stored[name] for name in sorted(stored)]
    try:
        model.set_weights(values)
    except ValueError as error:
        raise InvalidModel(f"the weights do not fit the model: {' '.join(str(error).split())[:300]}") from error


def save_weights(model: Any, path: Path) -> None:
    """`model.weights` (seeds of random layers are not among them) as w00000, w00001, ..."""
    save_file({f"w{i:05}": np.ascontiguousarray(value) for i, value in enumerate(model.get_weights())}, path)
