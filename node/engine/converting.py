"""Keras models and SavedModels as LiteRT models with whole numbers of 8 bits: a quarter of the size, and faster where the machine has
instructions for them.

Full integer quantisation (Jacob et al., 2018): what is usual in each place is found by running some items; operations that have no
version for whole numbers stay floats, and so do inputs and outputs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf

from node.engine import runtime, savedmodel
from node.engine.wording import one_line
from potluck.errors import InvalidModel
from potluck.messages import ModelFormat


def convert(
    path: Path, model_format: ModelFormat, scratch: Path, names: list[str], batches: Iterable[list[Any]]
) -> bytes:
    """A `.tflite` file. `batches` are those of the items, each with the inputs in the order of `names`.

    Raises InvalidModel, CodeNotAllowed, and what `batches` raises.
    """
    items = [row for batch in batches for row in _rows(batch)]
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        saved = Path(folder) / "model"
        if model_format == "savedmodel":
            savedmodel.unpack(path, saved)
        else:
            _save(runtime.load_model(path, scratch, compiled=False), saved)
        converter = tf.lite.TFLiteConverter.from_saved_model(str(saved), signature_keys=[savedmodel.serving(saved)])
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: (dict(zip(names, item, strict=True)) for item in items)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8, tf.lite.OpsSet.TFLITE_BUILTINS]
        try:
            return bytes(converter.convert())
        except Exception as error:
            raise InvalidModel(f"the model cannot be converted to LiteRT: {_reason(error)}") from error


def _rows(batch: list[Any]) -> Iterator[list[Any]]:
    """The items of a batch, each as a batch of one."""
    arrays = [tensor.numpy() for tensor in batch]
    for row in range(len(arrays[0])):
        yield [array[row : row + 1] for array in arrays]


def _save(model: Any, folder: Path) -> None:
    """A SavedModel with the names of the model's signature."""
    signature = runtime.signature(model)
    outputs = [spec.name for spec in signature.outputs]

    def call(**inputs: Any) -> dict[str, Any]:
        batch = [inputs[spec.name] for spec in signature.inputs]
        return dict(zip(outputs, runtime.flat(model(runtime.packed(model, batch), training=False)), strict=True))

    module = tf.Module()
    module.kept = [variable.value for variable in model.variables]  # what is not found from the module is not saved
    specs = {
        spec.name: tf.TensorSpec(tensor.shape, tensor.dtype, name=spec.name)
        for spec, tensor in zip(signature.inputs, model.inputs, strict=True)
    }
    try:
        function = tf.function(call, autograph=False).get_concrete_function(**specs)
        tf.saved_model.save(module, str(folder), signatures={savedmodel.SERVING: function})
    except Exception as error:
        raise InvalidModel(f"the model cannot be saved as a graph: {one_line(error, 400)}") from error


def _reason(error: Exception) -> str:
    text = str(error)
    if "neither a custom op nor a flex op" in text or "custom op" in text:
        return f"it has operations that LiteRT does not have: {one_line(text, 300)}"
    return one_line(text, 400)
