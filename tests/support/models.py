"""Tiny Keras models and data shards, made when needed: inputs for an engine without a cluster."""

from __future__ import annotations

import hashlib
import io
import itertools
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save

from potluck.wire.values import BlobRef, DataFormat, DataShard, DataSlice

Array = np.ndarray[Any, Any]


def stepwise(model: Any) -> Any:
    """The model, which from now on computes operation by operation, without a graph: a test's few steps cost a fraction so."""
    model.run_eagerly = True
    return model


class Files:
    """Blobs in a folder, by hash: the `files` of `Engine.run_task`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: dict[str, Path] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, data: bytes) -> BlobRef:
        sha256 = hashlib.sha256(data).hexdigest()
        path = self.folder / sha256
        path.write_bytes(data)
        self.paths[sha256] = path
        return BlobRef(sha256=sha256, size=len(data))

    def model(self, model: Any) -> BlobRef:
        """The `.keras` file of a model."""
        path = self.folder / "model.keras"
        model.save(path)
        return self.put(path.read_bytes())

    def h5(self, model: Any) -> BlobRef:
        path = self.folder / "model.h5"
        model.save(path)
        return self.put(path.read_bytes())

    def saved_model(self, folder: Path) -> BlobRef:
        """A tar of the folder, even if it is no SavedModel."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            tar.add(folder, arcname=".")
        return self.put(buffer.getvalue())

    def arrays(self, shards: int = 1, **arrays: Array) -> tuple[DataShard, ...]:
        """Safetensors shards of about equal size."""
        count = len(next(iter(arrays.values())))
        bounds = np.linspace(0, count, shards + 1).astype(int)
        return tuple(
            DataShard(
                blob=self.put(save({name: np.ascontiguousarray(array[start:stop]) for name, array in arrays.items()})),
                count=int(stop - start),
            )
            for start, stop in itertools.pairwise(bounds)
        )

    def images(self, items: Sequence[tuple[bytes, int | None]], suffix: str = "png") -> DataShard:
        """A WebDataset tar of files and class indexes (None: no `.cls`)."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for number, (file, label) in enumerate(items):
                members = [(suffix, file)] + ([] if label is None else [("cls", str(label).encode())])
                for ending, data in members:
                    info = tarfile.TarInfo(f"{number:09}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        return DataShard(blob=self.put(buffer.getvalue()), count=len(items))


def png(pixels: Array) -> bytes:
    """uint8 pixels (h x w, or h x w x 3) as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def whole(shards: Sequence[DataShard]) -> tuple[DataSlice, ...]:
    """All items of the shards, in order."""
    return tuple(DataSlice(blob=shard.blob, start=0, stop=shard.count) for shard in shards)


def blobs(count: int = 300, features: int = 8, classes: int = 3, seed: int = 0) -> tuple[Array, Array]:
    """Points around one centre per class: float32 rows, and int64 labels. A small network separates them within a few passes."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(1).normal(0, 2, (classes, features))
    labels = random.integers(0, classes, count)
    return (centres[labels] + random.normal(0, 0.7, (count, features))).astype(np.float32), labels.astype(np.int64)


ARRAYS = DataFormat(kind="arrays", inputs=("x",), target="y")


def dense(
    *,
    features: int = 8,
    units: int = 3,
    activation: str = "softmax",
    loss: Any = "sparse_categorical_crossentropy",
    metrics: Sequence[Any] = ("accuracy",),
    optimizer: Any = "adam",
    penalty: float = 0.0,
    compiled: bool = True,
) -> Any:
    """features - 16 - units, with batch normalisation and dropout between."""
    import keras

    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.Input((features,)),
            keras.layers.Dense(16, activation="relu", kernel_regularizer=keras.regularizers.L2(penalty)),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.1),
            keras.layers.Dense(units, activation=activation),
        ]
    )
    if compiled:
        model.compile(optimizer=optimizer, loss=loss, metrics=list(metrics))
    return model


def convolutional(size: int = 32, channels: int = 3, classes: int = 10) -> Any:
    """The demo's network at a smaller size."""
    import keras

    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((size, size, channels))])
    for filters in (32, 64, 128):
        model.add(keras.layers.Conv2D(filters, 3, activation="relu"))
        model.add(keras.layers.MaxPooling2D(2))
    model.add(keras.layers.Flatten())
    model.add(keras.layers.Dense(512, activation="relu"))
    model.add(keras.layers.Dense(classes, activation="softmax"))
    model.compile(optimizer="adam", loss="categorical_crossentropy", metrics=["accuracy"])
    return model


def exported(folder: Path, model: Any) -> Path:
    """A Keras model as a SavedModel."""
    model.export(folder, verbose=False)
    return folder


def saved(folder: Path, function: Callable[..., Any], *specs: Any) -> Path:
    """A function of tensors as a SavedModel."""
    import tensorflow as tf

    module = tf.Module()
    module.function = tf.function(function, input_signature=specs)
    tf.saved_model.save(module, folder, signatures={"serving_default": module.function.get_concrete_function()})
    return folder


def converted(folder: Path, x: Array | None = None, **settings: Any) -> bytes:
    """A SavedModel as a LiteRT model; with 8-bit numbers if `x` shows the usual inputs."""
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_saved_model(str(folder))
    if x is not None:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([row[None]] for row in x)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = converter.inference_output_type = tf.int8
    for name, value in settings.items():
        setattr(converter, name, value)
    return bytes(converter.convert())
