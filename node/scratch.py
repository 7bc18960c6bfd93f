"""Clears folders in which an engine wrote. What it left may be meant to hinder us: deep, closed to us, or changing meanwhile."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def clear(folder: Path) -> None:
    """Remove a folder and all in it, as far as it can be removed. A link is removed, and never followed.

    Folders inside are moved to its top before they are looked into: so neither paths nor the stack grow with the depth. A process that the
    engine left may put a link where a folder was a moment ago: so all is done below folders that are open, not below paths.
    """
    with _opened(str(folder)) as top:
        if top is None:
            with suppress(OSError):
                folder.unlink()
            return
        waiting, emptied = _empty(top, top), list[str]()
        while waiting:
            name = waiting.pop()
            with _opened(name, top) as inner:
                if inner is not None:
                    waiting += _empty(inner, top)
                    emptied.append(name)
                    continue
            with suppress(OSError):
                os.unlink(name, dir_fd=top)
        for name in reversed(emptied):
            with suppress(OSError):
                os.rmdir(name, dir_fd=top)
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def _opened(path: str, above: int | None = None) -> Iterator[int | None]:
    """A folder, which we may read and change from now on; None: there is none, or a link."""
    handle: int | None = None
    with suppress(OSError):
        _let_us_in(path, above)
    with suppress(OSError):
        handle = os.open(path, _FOLDER, dir_fd=above)
    try:
        yield handle
    finally:
        if handle is not None:
            os.close(handle)


def _let_us_in(path: str, above: int | None) -> None:
    """Raises OSError."""
    if not hasattr(os, "O_PATH"):  # not Linux: what the engine closed to us stays
        return
    place = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
    try:
        Path(f"/proc/self/fd/{place}").chmod(0o700)  # fchmod refuses O_PATH (open(2)), and a folder may be closed to us
    finally:
        os.close(place)


def _empty(folder: int, top: int) -> list[str]:
    """Remove what is in an open folder. Folders in it are moved to `top`: their names there."""
    moved = []
    for entry in _entries(folder):
        with suppress(OSError):
            if entry.is_dir(follow_symlinks=False):
                name = f".{uuid.uuid4().hex}"
                os.rename(entry.name, name, src_dir_fd=folder, dst_dir_fd=top)
                moved.append(name)
            else:
                os.unlink(entry.name, dir_fd=folder)
    return moved


def _entries(folder: int) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError:
        return []
