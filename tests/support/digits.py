"""Small real data and models: scikit-learn's digits, and Keras networks that learn them in seconds."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits


@cache
def digits() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """1,797 rows of 64 pixels in 0..1 (float32), and their labels (int64)."""
    data = load_digits()
    return (data.data / 16).astype(np.float32), data.target.astype(np.int64)


def split() -> dict[str, np.ndarray[Any, Any]]:
    """x_train, y_train, x_test, y_test: every fifth row is in the test set."""
    x, y = digits()
    held_out = np.arange(len(x)) % 5 == 4
    return {"x_train": x[~held_out], "y_train": y[~held_out], "x_test": x[held_out], "y_test": y[held_out]}


def mlp(compiled: bool = True, width: int = 128) -> Any:
    """64-128-10 with softmax; integer labels."""
    import keras

    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [keras.Input((64,)), keras.layers.Dense(width, activation="relu"), keras.layers.Dense(10, activation="softmax")]
    )
    if compiled:
        model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def write_png_folder(folder: Path, count: int = 200, size: int = 8) -> Path:
    """The first `count` digits as PNG files in class folders `zero` ... `nine`."""
    from PIL import Image

    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    x, y = digits()
    for number, (row, label) in enumerate(zip(x[:count], y[:count], strict=True)):
        target = folder / names[label] / f"{number:04}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((row.reshape(8, 8) * 255).astype(np.uint8))
        image.resize((size, size)).save(target)
    return folder
