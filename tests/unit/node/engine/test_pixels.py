"""Which pixels models expect, as their own first layers show it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.tensorflow
RAW, UNIT, SILENT = 1.0, 1 / 255, 0.0


def sequential(*layers: Any, dtype: str = "float32") -> Any:
    import keras

    return keras.Sequential([keras.Input((64, 64, 3), dtype=dtype), *layers, keras.layers.Conv2D(2, 1)])


def functional(make: Callable[[Any], Any]) -> Any:
    import keras

    image = keras.Input((64, 64, 3))
    return keras.Model(image, keras.layers.Conv2D(2, 1)(make(image)))


def normalization(high: float) -> Any:
    import keras

    layer = keras.layers.Normalization()
    layer.adapt(np.random.default_rng(0).random((20, 64, 64, 3)) * high)
    return layer


def cases() -> dict[str, tuple[Callable[[], Any], float]]:
    import keras
    from keras import applications, layers

    def augmented() -> Any:
        return keras.Sequential([layers.RandomFlip(), layers.RandomRotation(0.1), layers.CenterCrop(64, 64)])

    def backbone(make: Any) -> Any:
        return make(weights=None, include_top=False, input_shape=(64, 64, 3))

    return {
        "nothing": (lambda: sequential(), SILENT),
        "batch norm": (lambda: sequential(layers.BatchNormalization()), SILENT),
        "times 1": (lambda: sequential(layers.Rescaling(1.0)), SILENT),
        "1/255": (lambda: sequential(layers.Rescaling(1 / 255)), RAW),
        "-1 to 1": (lambda: sequential(layers.Rescaling(1 / 127.5, offset=-1)), RAW),
        "0 to 1 becomes -1 to 1": (lambda: sequential(layers.Rescaling(2.0, offset=-1)), UNIT),
        "behind augmentation": (lambda: sequential(augmented(), layers.Rescaling(1 / 255)), RAW),
        "range of augmentation": (lambda: sequential(layers.RandomBrightness(0.1)), RAW),
        "other range": (lambda: sequential(layers.RandomContrast(0.1, value_range=(0, 1))), UNIT),
        "adapted to bytes": (lambda: sequential(normalization(255)), RAW),
        "adapted to 0 to 1": (lambda: sequential(normalization(1)), UNIT),
        "caffe's means": (lambda: functional(applications.resnet50.preprocess_input), RAW),
        "-1 to 1 by hand": (lambda: functional(applications.mobilenet_v2.preprocess_input), RAW),
        "torch's": (lambda: functional(applications.densenet.preprocess_input), RAW),
        "negative": (lambda: functional(lambda image: 255 - image), RAW),
        "negative of 0 to 1": (lambda: functional(lambda image: 1 - image), UNIT),
        "EfficientNet": (lambda: sequential(augmented(), backbone(applications.EfficientNetB0)), RAW),
        "MobileNetV2 as it is": (lambda: backbone(applications.MobileNetV2), SILENT),
    }


def test_what_first_layers_expect(tmp_path: Any) -> None:
    import keras

    from node.engine import pixels

    for name, (make, expected) in cases().items():
        assert pixels.expected(make()) == expected, name
    path = tmp_path / "m.keras"
    functional(keras.applications.resnet50.preprocess_input).save(path)
    assert pixels.expected(keras.saving.load_model(path)) == RAW, "as a node loads it"


def test_whole_numbers_are_as_they_are_and_silence_is_0_to_1() -> None:
    import keras

    from node.engine import pixels

    assert pixels.scale_for(sequential()) == pixels.scale_for(sequential(dtype="float16")) == UNIT
    assert pixels.scale_for(sequential(keras.layers.Rescaling(1.0), dtype="uint8")) == RAW
