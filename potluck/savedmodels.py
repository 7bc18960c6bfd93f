"""A SavedModel folder as one tar file, and back: the same folder gives the same bytes on every machine."""

from __future__ import annotations

import errno
import shutil
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from potluck import tars
from potluck.errors import InvalidModel, InvalidRequest
from potluck.wording import counted

GRAPH = "saved_model.pb"
"""The file that makes a folder a SavedModel."""
ENTRIES_LIMIT = 10_000
DEPTH_LIMIT = 32
"""How many folders may be inside each other."""
_UNUSABLE = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EINVAL, errno.ELOOP)
"""Errors of the file system for names that no folder can have beside each other."""


def check(folder: Path) -> None:
    """Raises InvalidModel for a folder that is not a SavedModel."""
    if not (folder / GRAPH).is_file():
        raise InvalidModel(
            f"{folder} is a folder without {GRAPH}, so it is not a SavedModel: give a model's file, or a folder that "
            "model.export(folder) has written"
        )


def pack(folder: Path, tar: Path) -> None:
    """Write the files of `folder` as `tar`, with `saved_model.pb` at the top: ordered by name, without owners or times.

    Raises InvalidModel for a folder that is not a SavedModel, or cannot be read. Blocks.
    """
    check(folder)
    try:
        files = sorted((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if path.is_file())
        if len(files) > ENTRIES_LIMIT:
            raise InvalidModel(
                f"{folder} has {counted(len(files), 'file')}: a SavedModel may have at most {ENTRIES_LIMIT}"
            )
        with tarfile.open(tar, "w:", format=tarfile.PAX_FORMAT) as archive:
            for name, path in files:
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = path.stat().st_size, 0o644
                with path.open("rb") as file:
                    archive.addfile(entry, file)
    except OSError as error:
        raise InvalidModel(f"the SavedModel {folder} cannot be read: {error}") from error


def unpack(tar: Path, folder: Path) -> None:
    """Unpack `tar` as the new folder `folder`, completely or not at all.

    Raises InvalidModel for a tar with anything but files and folders, or with an entry outside of it; InvalidRequest where
    `folder` exists and is not empty, or cannot be written. Blocks.
    """
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InvalidRequest(f"{folder} exists already: name a new or empty folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            whole = Path(scratch) / "whole"
            whole.mkdir()
            _extract(tar, whole)
            whole.replace(folder)
    except OSError as error:
        raise InvalidRequest(f"{folder} cannot be written: {error.strerror or error}") from error


def _extract(tar: Path, folder: Path) -> None:
    try:
        with tars.opened(tar) as entries:
            for number, (archive, entry) in enumerate(entries):
                if number >= ENTRIES_LIMIT:
                    raise _refused(entry, f"one more than the {ENTRIES_LIMIT} that are allowed")
                try:
                    _extract_one(archive, entry, folder)
                except OSError as error:
                    if error.errno not in _UNUSABLE:  # not this entry, but this disk
                        raise
                    raise _refused(entry, f"that cannot be written ({error.strerror})") from error
    except tarfile.TarError as error:
        raise InvalidModel(f"the SavedModel is not a tar of its folder ({error}): register it again") from error


def _extract_one(archive: tarfile.TarFile, entry: tarfile.TarInfo, folder: Path) -> None:
    name = PurePosixPath(entry.name)
    if name.is_absolute() or ".." in name.parts or "\0" in entry.name or len(name.parts) > DEPTH_LIMIT:
        raise _refused(entry, "that is not allowed")
    if entry.isdir():
        (folder / name).mkdir(parents=True, exist_ok=True)
        return
    content = archive.extractfile(entry) if entry.isreg() and not entry.issparse() else None
    if content is None:
        raise _refused(entry, "that is neither a file nor a folder")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    with content, (folder / name).open("wb") as file:
        shutil.copyfileobj(content, file)


def _refused(entry: tarfile.TarInfo, why: str) -> InvalidModel:
    return InvalidModel(f"the SavedModel's tar has an entry {why}: {entry.name[:100]!r}")
