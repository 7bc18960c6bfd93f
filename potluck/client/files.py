"""Files as what a deployed model is asked about: images, texts, recordings and arrays; one, several, or all in a folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from potluck.client.sources import existing
from potluck.data import audio, folders, images, items, texts
from potluck.errors import InvalidData, InvalidRequest
from potluck.messages import ImageOptions, ModelInfo

log = logging.getLogger(__name__)

FILES_AT_ONCE = 32
"""In one request: decoded images are large, and a folder may have very many."""
NO_IMAGES = (".npz", ".csv", ".parquet", ".tfrecord", ".keras", ".h5", ".pkl", ".zip")
"""Files that people try, and that are no images whatever is in them."""
_NAMED = 5
"""Files that a warning names."""


def paths(inputs: Any, info: ModelInfo) -> list[Path]:
    """The files that are named, those of a folder in the order of their names; none where these are texts for a model that takes text:
    of such a model, only a Path names a file. Raises InvalidData.
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
    """As many at a time as go into a request."""
    for start in range(0, len(found), FILES_AT_ONCE):
        yield found[start : start + FILES_AT_ONCE]


def read(found: Sequence[Path], info: ModelInfo, image: ImageOptions | None = None) -> np.ndarray[Any, Any]:
    """Files as one batch for the model, in their order. Raises InvalidData, InvalidRequest."""
    batches = [_batch(path, info, image) for path in found]
    for path, batch in zip(found, batches, strict=True):
        if batch.shape[1:] != batches[0].shape[1:]:
            raise InvalidData(
                f"{path} has items of shape {batch.shape[1:]}, and {found[0]} of {batches[0].shape[1:]}: ask about each by itself"
            )
    return batches[0] if len(batches) == 1 else np.concatenate(batches)


def read_array(path: Path) -> np.ndarray[Any, Any]:
    """A `.npy` file. Raises InvalidData."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InvalidData(f"{path} cannot be read as a numpy array: {error}") from error
    if not isinstance(array, np.ndarray):
        raise InvalidData(f"{path} holds several arrays: give a .npy file with one")
    return array


def with_batch(array: np.ndarray[Any, Any], info: ModelInfo) -> np.ndarray[Any, Any]:
    """A single item gets the batch axis that it lacks."""
    shape = items.input_shape(info)
    return array[None] if shape is not None and array.ndim == len(shape) - 1 else array


def _batch(path: Path, info: ModelInfo, image: ImageOptions | None) -> np.ndarray[Any, Any]:
    suffix = path.suffix.lower()
    if image is not None and suffix in (".npy", ".txt", ".wav"):
        raise InvalidRequest(
            f"--image (image) says how an image becomes a tensor, and {path.name} is no image: leave it out"
        )
    if suffix == ".npy":
        return with_batch(read_array(path), info)
    if suffix == ".txt":
        return items.text(_bytes(path, "text"), info, str(path))
    if suffix == ".wav":
        return items.recording(_bytes(path, "a recording"), info, str(path))
    if suffix in NO_IMAGES:
        raise InvalidData(
            f"{path} is no image: give an image, .npy, or JSON (for several inputs a map of them by name)"
        )
    if suffix in images.KIND.unread:
        raise InvalidData(f"{path}: {suffix} {images.CONVERT}")
    options = items.image_options(info, ": name it (--image HxW, image=(height, width))", image)
    return items.image(_bytes(path, "an image"), options, str(path), items.input_dtype(info))[np.newaxis]


def _in_folder(folder: Path, info: ModelInfo) -> list[Path]:
    """The files of the kind that the model takes. Raises InvalidData without any."""
    shape = items.input_shape(info)
    kind = images.KIND if shape is None or len(shape) == 4 else audio.KIND
    if items.takes_text(info):
        kind = texts.KIND
    found = folders.files_in(folder, [kind])
    unread = folders.unread_in(folder, kind)
    if unread:
        shown = ", ".join(path.name for path in unread[:_NAMED]) + (", ..." if len(unread) > _NAMED else "")
        log.warning("%d of %d files cannot be read and are left out: %s", len(unread), len(found) + len(unread), shown)
    if not found:
        raise InvalidData(f"{folder} has no {kind.many} ({', '.join(sorted(kind.suffixes))})")
    return found


def _bytes(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidData(f"{path} cannot be read as {what}: {error.strerror}") from error
