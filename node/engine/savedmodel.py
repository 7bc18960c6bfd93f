"""SavedModels: a tar of the folder, unpacked with care, and its serving signature.

A SavedModel is a graph, and a graph may read and write files: see `vetting` for what is refused.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

from node.engine import keras_models
from node.engine.graphs import Graph
from node.engine.memory import shortage
from node.engine.vetting import vet
from node.engine.wording import one_line
from potluck import savedmodels
from potluck.errors import EngineFailed, InvalidModel, InvalidRequest
from potluck.wire.tensors import datatype_of
from potluck.wire.values import Signature, TensorSpec

SERVING = "serving_default"
OTHER_GRAPH = "saved_model.cpb"
"""If this file exists, a part of TensorFlow reads it in place of `saved_model.pb`. It is for graphs of more than 2 GB."""


def load(path: Path, scratch: Path) -> Graph:
    """The function behind its signature `serving_default` (or the only one). Raises InvalidModel, CodeNotAllowed."""
    with tempfile.TemporaryDirectory(dir=scratch) as unpacked:
        folder = Path(unpacked) / "model"
        unpack(path, folder)
        try:
            loaded = tf.saved_model.load(folder)
        except Exception as error:
            raise shortage(error) or InvalidModel(f"the SavedModel cannot be loaded: {one_line(error, 400)}") from error
        return _graph(loaded)


def unpack(path: Path, folder: Path) -> None:
    """The SavedModel in the tar at `path` as the new folder `folder`, with nothing in it that is refused. Raises InvalidModel,
    CodeNotAllowed.
    """
    try:
        savedmodels.unpack(path, folder)
    except InvalidRequest as error:  # this node's disk
        raise EngineFailed(error.message) from error
    if (folder / OTHER_GRAPH).exists():
        raise InvalidModel(
            f"the SavedModel has a graph in {OTHER_GRAPH}, which is not read here: save it with its weights as variables, not as constants"
        )
    saved = _read(folder)
    if vet(saved):
        (folder / savedmodels.GRAPH).write_bytes(saved.SerializeToString())


def serving(folder: Path) -> str:
    """The name of the signature that is served: `serving_default`, or the only one. Raises InvalidModel."""
    return _chosen(
        [name for meta in _read(folder).meta_graphs for name in meta.signature_def if not name.startswith("__")]
    )


def _read(folder: Path) -> Any:
    """Its graphs, before any of them runs. Raises InvalidModel."""
    saved = SavedModel()
    try:
        saved.ParseFromString((folder / savedmodels.GRAPH).read_bytes())
    except (DecodeError, FileNotFoundError) as error:
        raise InvalidModel(
            f"the SavedModel has no {savedmodels.GRAPH} that can be read: register its folder again"
        ) from error
    return saved


def _chosen(names: list[str]) -> str:
    if SERVING in names:
        return SERVING
    if len(names) == 1:
        return names[0]
    raise InvalidModel(
        f"the SavedModel has no signature {SERVING!r} (it has {', '.join(names) or 'none'}): save it with model.export(), "
        f"or tf.saved_model.save(..., signatures={{{SERVING!r}: function}})"
    )


def _graph(loaded: Any) -> Graph:
    signatures = getattr(loaded, "signatures", {})
    chosen = _chosen(list(signatures))
    function = signatures[chosen]
    inputs: dict[str, Any] = function.structured_input_signature[1]
    outputs: dict[str, Any] = function.structured_outputs
    if not inputs or not outputs:
        raise InvalidModel(f"the SavedModel's signature {chosen!r} has no {'outputs' if inputs else 'inputs'}")
    for name, spec in inputs.items():
        if not spec.shape.rank:
            raise InvalidModel(
                f"the SavedModel's input '{name}' has {'no known shape' if spec.shape.rank is None else 'no batch'}: "
                "give its first dimension to the items of a batch"
            )
    rows = {spec.shape[0] for spec in inputs.values()}
    if len(rows) > 1:
        raise InvalidModel(f"the SavedModel's inputs take batches of other sizes: {', '.join(map(str, rows))}")

    def call(*batch: Any) -> list[Any]:
        found = function(**dict(zip(inputs, batch, strict=True)))
        return keras_models.flat([found[name] for name in outputs])

    signature = Signature(
        inputs=tuple(_spec(name, tensor) for name, tensor in inputs.items()),
        outputs=tuple(_spec(name, tensor) for name, tensor in outputs.items()),
    )
    specs = [tf.TensorSpec(spec.shape, spec.dtype) for spec in inputs.values()]
    return Graph(call, specs, signature, exactly=rows.pop(), holds=loaded)


def _spec(name: str, tensor: Any) -> TensorSpec:
    """The spec with -1 for the batch, even if the model takes only one size: batches are padded and cut to it."""
    if tensor.dtype == tf.string:
        datatype = "BYTES"
    elif tensor.dtype == tf.bfloat16:
        datatype = "FP32"
    else:
        datatype = datatype_of(np.dtype(tensor.dtype.as_numpy_dtype))
    if tensor.shape.rank is None:
        raise InvalidModel(f"the SavedModel's output '{name}' has no known shape")
    shape = tuple(-1 if d is None else int(d) for d in tensor.shape)
    return TensorSpec(name=name, datatype=datatype, shape=(-1, *shape[1:]))
