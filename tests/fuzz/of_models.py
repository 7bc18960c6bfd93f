"""Models, in the engine's process: these need TensorFlow, and are slow. What a model may fill or crash is the engine, which its node
starts anew; so what is looked for here is an operation that the check lets through, and time that grows faster than the file.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from fuzz import mutators
from fuzz.judging import Target, hold
from fuzz.of_files import file_of, keras_files, scratch
from potluck.errors import CodeNotAllowed, InvalidModel, OutOfMemory


def graph(data: bytes) -> None:
    """The graphs of a SavedModel. What is taken has only operations that are allowed."""
    from google.protobuf.message import DecodeError
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    from node.engine import operations, vetting

    saved = SavedModel()
    try:
        saved.ParseFromString(data)
    except DecodeError as error:  # as the reader of the folder does
        raise InvalidModel("no graph") from error
    vetting.vet(saved)
    special = operations.FILLS_TABLE | {operations.READS_CHECKPOINT}
    for meta in saved.meta_graphs:
        own = {function.signature.name for function in meta.graph_def.library.function}
        bodies = [meta.graph_def.node, *(function.node_def for function in meta.graph_def.library.function)]
        for node in (node for body in bodies for node in body):
            hold(node.op in operations.ALLOWED | special | own, "no other operation is let through")
    hold(not vetting.vet(saved), "what was cut out is gone")


def graphs() -> Iterator[bytes]:
    import tensorflow as tf

    class Words(tf.Module):  # type: ignore[misc]
        def __init__(self, folder: Path) -> None:
            (folder / "words.txt").write_text("a\nb\n")
            line, number = tf.lookup.TextFileIndex.WHOLE_LINE, tf.lookup.TextFileIndex.LINE_NUMBER
            lines = tf.lookup.TextFileInitializer(str(folder / "words.txt"), tf.string, line, tf.int64, number)
            self.table, self.weight = tf.lookup.StaticHashTable(lines, -1), tf.Variable(2.0)

        @tf.function  # type: ignore[untyped-decorator]
        def serve(self, x: Any) -> Any:
            return {"y": self.weight * tf.cast(self.table.lookup(x), tf.float32)}

    with tempfile.TemporaryDirectory(dir=scratch()) as folder:
        module = Words(Path(folder))
        function = module.serve.get_concrete_function(tf.TensorSpec((None,), tf.string, name="x"))
        tf.saved_model.save(module, folder + "/model", signatures={"serving_default": function})
        yield (Path(folder) / "model" / "saved_model.pb").read_bytes()


def graph_mutated(data: bytes, most: int, seed: int) -> bytes:
    """A node of a graph gets another operation, input or name, or is there twice."""
    from google.protobuf.message import DecodeError
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    rng, saved = random.Random(seed), SavedModel()
    try:
        saved.ParseFromString(data)
        meta = rng.choice(saved.meta_graphs)
        bodies = [meta.graph_def.node, *(function.node_def for function in meta.graph_def.library.function)]
        body = rng.choice(bodies)
        node, other = rng.choice(body), rng.choice(rng.choice(bodies))
    except (DecodeError, IndexError):
        return mutators.mutated(data, most)
    match rng.randrange(9):
        case 0:
            node.op = rng.choice(
                ("ReadFile", "WriteFile", "RestoreV2", "SaveV2", "PyFunc", "NoOp", "Identity", other.op)
            )
        case 1:
            node.op = rng.choice(("InitializeTableFromTextFileV2", "StatefulPartitionedCall", "PlaceholderWithDefault"))
        case 2:
            node.input.append(other.name)
        case 3 if node.input:
            node.input[rng.randrange(len(node.input))] = rng.choice(
                (other.name, "^" + other.name, other.name + ":0", "")
            )
        case 4:
            node.name = rng.choice((other.name, "", "x/y"))
        case 5:
            node.attr[rng.choice(("f", "value"))].func.name = other.name
        case 6:
            body.add().CopyFrom(other)
        case 7:
            meta.saver_def.filename_tensor_name = other.name + ":0"
        case _:
            return mutators.mutated(data, most)
    found: bytes = saved.SerializeToString()
    return found if len(found) <= most else data


def keras_model(data: bytes) -> None:
    """A `.keras` file, loaded."""
    from node.engine import keras_models, memory

    with mock.patch.object(memory, "limit_bytes", 2**30):
        keras_models.load_model(file_of(data, "m"), scratch(), compiled=True)


def keras_model_files() -> Iterator[bytes]:
    import keras

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="a"), keras.layers.Dense(2, name="b")])
    model.compile("adam", "sparse_categorical_crossentropy")
    model.save(scratch() / "m.keras")
    yield (scratch() / "m.keras").read_bytes()
    yield from keras_files()


MODELS = (InvalidModel, CodeNotAllowed, OutOfMemory)
TARGETS = (
    Target("graph", graph, MODELS, graphs, graph_mutated, slow=True, needs=("tensorflow",)),
    Target(
        "keras_model",
        keras_model,
        MODELS,
        keras_model_files,
        mutators.of_zip({"config.json": mutators.of_json, ".h5": mutators.plain}),
        seconds=10.0,
        peak_bytes=2**30,
        slow=True,
        needs=("keras", "tensorflow"),
    ),
)
