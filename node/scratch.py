"""Clears folders in which an engine wrote. What it left may be meant to hinder us: deep, closed to us, or changing meanwhile."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path


def clear(folder: Path) -> None:
    """Remove a folder and all in it, as far as it can be removed. A link is removed, and never followed.

    Folders inside are moved to its top before they are looked into: so neither paths nor the stack grow with the depth.
    """
    if folder.is_symlink() or not folder.is_dir():
        with suppress(OSError):
            folder.unlink()
        return
    waiting, emptied = [folder], list[Path]()
    while waiting:
        one = waiting.pop()
        emptied.append(one)
        with suppress(OSError):
            one.chmod(0o700)
        for entry in _entries(one):
            with suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path).rename(folder / f".{uuid.uuid4().hex}"))
                else:
                    Path(entry.path).unlink()
    for one in reversed(emptied):
        with suppress(OSError):
            one.rmdir()


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError:
        return []
