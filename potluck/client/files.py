"""Files as inputs for a deployed model: images, texts, recordings and arrays; one, several, or all in a folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from potluck.client.sources import existing
from potluck.data import audio, folders, images, items, texts
from potluck.data.packing import some
from potluck.errors import InvalidData, InvalidRequest
from potluck.wire.questions import ModelInfo
from potluck.wire.tensors import shape_text
from potluck.wire.values import ImageOptions
from potluck.wording import printable

log = logging.getLogger(__name__)

FILES_AT_ONCE = 32
"""Files in one request: decoded images are large, and a folder may have very many."""
DATA_SETS = (".npz", ".csv", ".parquet", ".tfrecord", ".tfrecords")
"""Files of many items: those are for `predict`."""
NO_IMAGES = (".keras", ".h5", ".tflite", ".pkl", ".zip")
"""Files that people try, but that are never images."""
KINDS = (images.KIND, texts.KIND, audio.KIND)


def paths(inputs: Any, info: ModelInfo) -> list[Path]:
    """The files that `inputs` names; those of a folder in the order of their names. Empty where `inputs` are texts for a model that takes
    text: for such a model, only a Path names a file. Raises InvalidData.
    """
    named = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
    if items.takes_text(info) and any(isinstance(each, str) for each in named):
        return []
    found: list[Path] = []
    for each in named:
        path = existing(each)
        found += _in_folder(path, info) if path.is_dir() else [path]
    return found


def chunks(found: Sequence[Path]) -> Iterator[Sequence[Path]]:
    """The files in groups, each for one request."""
    for start in range(0, len(found), FILES_AT_ONCE):
        yield found[start : start + FILES_AT_ONCE]


def read(found: Sequence[Path], info: ModelInfo, image: ImageOptions | None = None) -> np.ndarray[Any, Any]:
    """Files as one batch for the model, in their order. Raises InvalidData, InvalidRequest."""
    batches = [_batch(path, info, image) for path in found]
    for path, batch in zip(found, batches, strict=True):
        if batch.shape[1:] != batches[0].shape[1:]:
            raise InvalidData(
                f"{path} has items of shape {batch.shape[1:]}, and {found[0]} of {batches[0].shape[1:]}: ask for each file by itself"
            )
    return batches[0] if len(batches) == 1 else np.concatenate(batches)


def read_array(path: Path) -> np.ndarray[Any, Any]:
    """The array in a `.npy` file. Raises InvalidData."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InvalidData(f"{path} cannot be read as a numpy array: {error}") from error
    if not isinstance(array, np.ndarray):
        raise InvalidData(f"{path} holds several arrays: give a .npy file with one")
    return array


def with_batch(array: np.ndarray[Any, Any], info: ModelInfo) -> np.ndarray[Any, Any]:
    """The array with a batch axis: a single item gets one."""
    shape = items.input_shape(info)
    return array[None] if shape is not None and array.ndim == len(shape) - 1 else array


def _batch(path: Path, info: ModelInfo, image: ImageOptions | None) -> np.ndarray[Any, Any]:
    suffix = path.suffix.lower()
    if image is not None and suffix in (".npy", ".txt", ".wav"):
        raise InvalidRequest(f"image (--image) is only for images, and {path.name} is not an image: leave image out")
    if suffix == ".npy":
        return with_batch(read_array(path), info)
    if suffix == ".txt":
        return items.text(_bytes(path, "text"), info, str(path))
    if suffix == ".wav":
        return items.recording(_bytes(path, "a recording"), info, str(path))
    if suffix in DATA_SETS:
        raise _for_prediction(path, "holds a data set, not one item", info)
    if suffix in NO_IMAGES:
        raise InvalidData(
            f"{path} is not an image: give an image, .npy, or JSON (for several inputs: a map of them by name)"
        )
    if suffix in images.KIND.unread:
        raise InvalidData(f"{path}: {suffix} {images.CONVERT}")
    options = items.image_options(info, ": name it (--image HxW, image=(height, width))", image)
    return items.image(_bytes(path, "an image"), options, str(path), items.input_dtype(info))[np.newaxis]


def _in_folder(folder: Path, info: ModelInfo) -> list[Path]:
    """The files in the folder of the kind that the model takes. Raises InvalidData where it has none, saying what it has."""
    kind = _kind(info)
    found = folders.files_in(folder, [kind])
    unread = folders.unread_in(folder, kind)
    if unread:
        shown = printable(some([path.name for path in unread]))
        log.warning("%d of %d files cannot be read and are left out: %s", len(unread), len(found) + len(unread), shown)
    if found:
        return found
    others = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    if not others:
        raise InvalidData(f"{folder} has no files")
    if tables := [path for path in others if path.suffix.lower() in DATA_SETS]:
        raise _for_prediction(tables[0], "holds a data set, not one item", info)
    if any(path.suffix.lower() == ".npy" for path in others):
        raise InvalidData(f"{folder} holds arrays: name the files themselves, as in {folder}/*.npy")
    shape = items.input_shape(info)
    takes = f"{kind.many} ({', '.join(sorted(kind.suffixes))})"
    if shape is not None and kind is audio.KIND and not info.rate:
        takes = f"arrays of the shape {shape_text(shape)} (.npy, JSON)"
    given = next((one.many for one in KINDS if folders.files_in(folder, [one])), "files")
    raise InvalidData(
        f"{folder} holds {given} ({some([path.name for path in others])}), but model {info.name}:{info.version} takes {takes}"
    )


def _kind(info: ModelInfo) -> folders.Kind:
    """The kind of files that the model takes."""
    shape = items.input_shape(info)
    if items.takes_text(info):
        return texts.KIND
    return images.KIND if shape is None or len(shape) == 4 else audio.KIND


def _for_prediction(path: Path, what: str, info: ModelInfo) -> InvalidData:
    return InvalidData(
        f"{path} {what}: `potluck predict {info.name}:{info.version} {path}` (client.predict) predicts every row of it; "
        "here give .npy or JSON (for several inputs: a map of them by name)"
    )


def _bytes(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidData(f"{path} cannot be read as {what}: {error.strerror}") from error
