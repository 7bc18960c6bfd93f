"""Converts Keras models and SavedModels to LiteRT models with 8-bit integers: a quarter of the size, and faster if the machine has
instructions for them.

It is full integer quantisation (Jacob et al., 2018). Some items are run to find the usual range of the values at each place.
Operations without an integer version stay floats, and so do inputs and outputs.

TensorFlow's converter runs in a separate process (`converter.py`). It holds the interpreter's lock for seconds, in which the engine
would be silent. And a process can be ended.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from node.engine import keras_models, savedmodel
from node.engine.converter import REFUSED
from node.engine.wording import one_line
from potluck.errors import EngineFailed, InvalidModel
from potluck.lifecycle import die_with_parent
from potluck.wire.values import ModelFormat

POLL_SECONDS = 0.2


def convert(
    path: Path,
    model_format: ModelFormat,
    scratch: Path,
    names: list[str],
    batches: Iterable[list[Any]],
    target: Path,
    going_on: Callable[[], None],
) -> None:
    """Write a `.tflite` file. `batches` holds batches of items, each with the inputs in the order of `names`.

    `going_on` is called again and again meanwhile. Raises InvalidModel, CodeNotAllowed, EngineFailed, and what `batches` and
    `going_on` raise.
    """
    columns = [np.concatenate(parts) for parts in zip(*([t.numpy() for t in batch] for batch in batches), strict=True)]
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        saved = Path(folder) / "model"
        if model_format == "savedmodel":
            savedmodel.unpack(path, saved)
        else:
            _save(keras_models.load_model(path, scratch, compiled=False), saved)
        items = Path(folder) / "items.npz"
        np.savez(items, *columns)
        arguments = [str(saved), savedmodel.serving(saved), str(items), str(target), *names]
        with (Path(folder) / "words").open("w+") as words:
            process = subprocess.Popen(
                [sys.executable, "-P", "-B", "-m", "node.engine.converter", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=words,
                stderr=subprocess.DEVNULL,
                preexec_fn=die_with_parent(),
            )
            try:
                while process.poll() is None:
                    going_on()
                    try:
                        process.wait(POLL_SECONDS)
                    except subprocess.TimeoutExpired:
                        continue
            finally:
                process.kill()
                process.wait()
            if process.returncode == REFUSED:
                words.seek(0)
                raise InvalidModel(f"the model cannot be converted to LiteRT: {words.read()}")
            if process.returncode:
                raise EngineFailed(
                    f"the conversion ended with status {process.returncode}, perhaps because memory ran out"
                )


def _save(model: Any, folder: Path) -> None:
    """Write a SavedModel with the names of the model's signature."""
    signature = keras_models.signature(model)
    outputs = [spec.name for spec in signature.outputs]

    def call(**inputs: Any) -> dict[str, Any]:
        batch = [inputs[spec.name] for spec in signature.inputs]
        return dict(
            zip(outputs, keras_models.flat(model(keras_models.packed(model, batch), training=False)), strict=True)
        )

    module = tf.Module()
    module.kept = [variable.value for variable in model.variables]  # only variables that the module refers to are saved
    specs = {
        spec.name: tf.TensorSpec(tensor.shape, tensor.dtype, name=spec.name)
        for spec, tensor in zip(signature.inputs, model.inputs, strict=True)
    }
    try:
        function = tf.function(call, autograph=False).get_concrete_function(**specs)
        tf.saved_model.save(module, str(folder), signatures={savedmodel.SERVING: function})
    except Exception as error:
        raise InvalidModel(f"the model cannot be saved as a graph: {one_line(error, 400)}") from error
