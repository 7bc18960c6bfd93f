"""Finds which of the four formats a model's file has, from its content and not its name; writes models back to files."""

from __future__ import annotations

import mmap
import shutil
import zipfile
from pathlib import Path

from potluck import savedmodels
from potluck.client import arguments
from potluck.errors import InvalidModel, InvalidRequest
from potluck.wire.questions import ModelInfo
from potluck.wire.values import ModelFormat

SUFFIXES: dict[ModelFormat, str] = {"keras": ".keras", "h5": ".h5", "tflite": ".tflite"}
"""The suffix of each format. A SavedModel is a folder."""
OTHER_SUFFIXES: dict[ModelFormat, tuple[str, ...]] = {"h5": (".hdf5", ".hdf")}
"""Other suffixes that programs know."""
WORDS: dict[ModelFormat, str] = {
    "keras": ".keras file",
    "h5": "Keras HDF5 file",
    "tflite": "LiteRT file",
    "savedmodel": "SavedModel folder",
}
_HDF5 = b"\x89HDF\r\n\x1a\n"
_TFLITE = b"TFL3"


def format_of(path: Path) -> ModelFormat:
    """The format of a model's file. Raises InvalidModel for another file or an incomplete model, saying what it is. Blocks."""
    try:
        if path.is_dir():
            savedmodels.check(path)
            return "savedmodel"
        with path.open("rb") as file:
            head = file.read(8)
    except FileNotFoundError as error:
        raise InvalidModel(f"there is no model file {path}") from error
    except OSError as error:
        raise InvalidModel(f"the model file {path} cannot be read: {error.strerror}") from error
    if not head:
        raise InvalidModel(f"{path} is empty: save the model again")
    if head == _HDF5:
        return _whole(path)
    if head[4:8] == _TFLITE:
        return "tflite"
    if zipfile.is_zipfile(path):
        return "keras"  # config.json tells later whether Keras wrote it
    if path.name == savedmodels.GRAPH:
        raise InvalidModel(f"{path} is only a part of a SavedModel: give its folder, {path.parent}")
    kind = {"keras": "a zip", "h5": "HDF5", "tflite": "a FlatBuffer"}
    named = next((known for known, suffix in SUFFIXES.items() if path.suffix == suffix), None)
    wanted = f"not a {path.suffix} file: it is not {kind[named]}, it begins with {head!r}" if named else "no model"
    raise InvalidModel(
        f"{path} is {wanted}: give a .keras, .h5 or .tflite file, or a SavedModel's folder, "
        "as model.save('name.keras') or model.export(folder) writes it"
    )


def _whole(path: Path) -> ModelFormat:
    """`h5`, where the file holds a whole model, not only weights. Raises InvalidModel."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(b"model_config") < 0:
            raise InvalidModel(
                f"{path} is an HDF5 file without a model (it may hold only weights): save the model with model.save(path)"
            )
    return "h5"


def export_path(info: ModelInfo, path: Path) -> Path:
    """Where to write a model: `path` itself, or if that is a folder, a file in it with the model's name. Raises InvalidRequest."""
    if info.format == "savedmodel":
        if path.suffix in (*SUFFIXES.values(), ".pb"):
            raise InvalidRequest(
                f"model {info.name}:{info.version} is a SavedModel, which is a folder: name it {path.with_suffix('').name}"
            )
        return path
    suffix = SUFFIXES[info.format]
    if path.is_dir():
        return path / f"{info.name}-{info.version}{suffix}"
    if path.suffix not in (suffix, *OTHER_SUFFIXES.get(info.format, ())):
        raise InvalidRequest(
            f"model {info.name}:{info.version} is a {WORDS[info.format]}: name the file {path.with_suffix(suffix).name}, "
            "because programs tell the format by the suffix"
        )
    arguments.in_a_folder(f"model {info.name}:{info.version}", path)
    return path


def write(blob: Path, info: ModelInfo, path: Path) -> None:
    """Write a model's blob to the result of `export_path`, in its original format. Raises InvalidRequest, InvalidModel. Blocks."""
    if info.format == "savedmodel":
        savedmodels.unpack(blob, path)
        return
    try:
        shutil.copyfile(blob, path)
    except OSError as error:
        raise InvalidRequest(f"the model cannot be saved as {path}: {error.strerror}") from error
