"""WAV files in every coding; folders of tones and of short texts, and small models for them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
RATE = 8000
PCM, FLOAT = 1, 3
_SUBFORMAT = bytes.fromhex("000000001000800000aa00389b71")


def wav(
    values: Array,
    *,
    rate: int = RATE,
    bits: int = 16,
    code: int = PCM,
    extensible: bool = False,
    before: bytes = b"",
    after: bytes = b"",
    announced: int | None = None,
) -> bytes:
    """A WAV file. `values` are from -1 to 1, of shape (frames,) or (frames, channels). `before` and `after`: chunks around the samples."""
    values = values if values.ndim == 2 else values[:, None]
    channels = values.shape[1]
    if code == FLOAT:
        data = values.astype(f"<f{bits // 8}").tobytes()
    elif bits == 8:
        data = (np.round(values * 127) + 128).astype(np.uint8).tobytes()
    else:
        whole = np.round(values * (2 ** (bits - 1) - 1)).astype("<i8")
        data = whole.reshape(-1, 1).view(np.uint8)[:, : bits // 8].tobytes()
    frame = channels * bits // 8
    form = struct.pack("<HHIIHH", 0xFFFE if extensible else code, channels, rate, rate * frame, frame, bits)
    if extensible:
        form += struct.pack("<HHIH", 22, bits, 0, code) + _SUBFORMAT
    size = len(data) if announced is None else announced
    body = b"WAVE" + chunk(b"fmt ", form) + before + b"data" + struct.pack("<I", size) + data + after
    return b"RIFF" + struct.pack("<I", len(body)) + body


def chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)


def tone(hertz: float, frames: int = 800, rate: int = RATE, phase: float = 0.0) -> Array:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(frames) / rate + phase)


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def write_tones(folder: Path, count: int = 60, **options: Any) -> Path:
    """Low and high tones in turn, of different lengths."""
    random = np.random.default_rng(0)
    return write_files(
        folder,
        {
            f"{('high', 'low')[number % 2]}/{number:04}.wav": wav(
                tone((1200, 300)[number % 2], int(random.integers(500, 900)), phase=random.uniform(0, 6)), **options
            )
            for number in range(count)
        },
    )


def write_texts(folder: Path, count: int = 60) -> Path:
    """Kind and harsh sentences in turn."""
    random = np.random.default_rng(0)
    words = (("awful", "boring", "sad", "worst"), ("bright", "good", "great", "lovely"))
    filler = ("the", "film", "was", "and", "so")
    files = {}
    for number in range(count):
        mixed = [*random.choice(words[number % 2], 3), *random.choice(filler, 3)]
        files[f"{('bad', 'good')[number % 2]}/{number:04}.txt"] = " ".join(random.permutation(mixed)).encode()
    return write_files(folder, files)


def text_model(folder: Path, shape: tuple[int, ...] = (), optimizer: Any = "adam") -> Any:
    """A model adapted to the texts of `folder`: its file has the vocabulary."""
    import keras

    keras.utils.set_random_seed(3)
    words = keras.layers.TextVectorization(max_tokens=50, output_sequence_length=8)
    words.adapt([path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.txt"))])
    given = keras.Input(shape, dtype="string")
    found = keras.layers.Embedding(50, 8)(words(given))
    found = keras.layers.GlobalAveragePooling1D()(found)
    model = keras.Model(given, keras.layers.Dense(1, activation="sigmoid")(found))
    model.compile(optimizer, "binary_crossentropy", metrics=["accuracy"])
    return model


def audio_model(shape: tuple[int, ...] = (640,), optimizer: Any = "adam") -> Any:
    """A model for two classes of recordings of `shape`."""
    import keras

    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.Input(shape),
            keras.layers.Reshape((shape[0], 1 if len(shape) == 1 else shape[1])),
            keras.layers.Conv1D(8, 32, strides=8, activation="relu"),
            keras.layers.GlobalMaxPooling1D(),
            keras.layers.Dense(2, activation="softmax"),
        ]
    )
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model
