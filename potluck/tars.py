"""Tars from elsewhere: the same errors for all damage, and no entry that lies about where it is.

`tarfile` believes what headers say: a negative size leads it back to entries that it has read already, for ever (CVE-2025-8194); a
header may announce any length, which is then read at once; and chains of headers are followed by recursion.
"""

from __future__ import annotations

import errno
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

_DAMAGE = (ValueError, OverflowError, RecursionError, MemoryError, LookupError, EOFError)
"""Errors of tarfile for headers that cannot be."""


class _Entry(tarfile.TarInfo):
    """An entry whose header announces no more bytes than the file has."""

    file_bytes = 0

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        entry = super().frombuf(buf, encoding, errors)
        _check(entry, cls.file_bytes)
        return entry


@contextmanager
def opened(path: Path) -> Iterator[Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]]:
    """The entries of the tar at `path`, one after another, each with the open tar. Raises tarfile.TarError for any damage, OSError."""
    size = path.stat().st_size
    kind = type("Entry", (_Entry,), {"file_bytes": size})
    with _damage():
        archive = tarfile.open(path, "r:", tarinfo=kind)  # noqa: SIM115 - closed below
    with archive:
        yield _entries(archive, size)


def _entries(archive: tarfile.TarFile, size: int) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    before = -1
    with _damage():
        entry = archive.next()
    while entry is not None:
        _check(entry, size)
        if entry.offset_data <= before:
            raise tarfile.ReadError("an entry lies before the one that it follows")
        before = entry.offset_data
        yield archive, entry
        with _damage():
            entry = archive.next()


def _check(entry: tarfile.TarInfo, size: int) -> None:
    if not 0 <= entry.size <= size:
        raise tarfile.ReadError("an entry has more bytes than the file")


@contextmanager
def _damage() -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        raise tarfile.ReadError(f"an entry cannot be read: {error or type(error).__name__}") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # a place before the beginning of the file
            raise
        raise tarfile.ReadError("an entry lies outside of the file") from error
