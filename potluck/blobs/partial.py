"""A blob of which some chunks are here: a file of its full size, and beside it the numbers of those chunks."""

from __future__ import annotations

import os
import struct
from pathlib import Path

PARTIAL_PREFIX = "part-"
CHUNKS_SUFFIX = ".chunks"
_NUMBER = struct.Struct("<I")


class Partial:
    """Chunks are written before they are noted, so a process that is killed leaves a file that can be gone on with.

    A wrong note (after a power cut) does no harm: the whole is hashed before it counts. Its methods block on the disk.
    """

    def __init__(self, path: Path, size: int, chunk_bytes: int) -> None:
        self.path = path
        self.size = size
        self.chunk_bytes = chunk_bytes
        self.missing: set[int] = set()
        self.resumed = False
        """Some chunks are of an earlier time: nobody knows who sent them."""
        self._log = path.with_name(path.name + CHUNKS_SUFFIX)

    @property
    def count(self) -> int:
        return -(-self.size // self.chunk_bytes)

    def open(self) -> None:
        """Make the file, or take up what is there."""
        known: set[int] = set()
        if self.path.exists() and self.path.stat().st_size == self.size and self._log.exists():
            noted = self._log.read_bytes()
            whole = len(noted) - len(noted) % _NUMBER.size
            known = {number for (number,) in _NUMBER.iter_unpack(noted[:whole]) if number < self.count}
            os.truncate(self._log, whole)
        if not known:
            self.clear()
            return
        self.missing = set(range(self.count)) - known
        self.resumed = True

    def clear(self) -> None:
        """Begin again from nothing."""
        self._log.write_bytes(b"")
        with self.path.open("wb") as file:
            file.truncate(self.size)
        self.missing = set(range(self.count))
        self.resumed = False

    def span(self, number: int) -> tuple[int, int]:
        """(first byte, one after the last) of a chunk."""
        start = number * self.chunk_bytes
        return start, min(start + self.chunk_bytes, self.size)

    def write(self, number: int, data: bytes | bytearray) -> None:
        with self.path.open("r+b") as file:
            file.seek(self.span(number)[0])
            file.write(data)
        with self._log.open("ab") as log:
            log.write(_NUMBER.pack(number))
        self.missing.discard(number)

    def discard(self) -> None:
        """Remove the file, which may be a blob by now, and the notes."""
        self.path.unlink(missing_ok=True)
        self._log.unlink(missing_ok=True)
