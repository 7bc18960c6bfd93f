"""A blob that is only partly here: a file of its full size, and beside it the numbers of the chunks that are here."""

from __future__ import annotations

import os
import struct
from pathlib import Path

PARTIAL_PREFIX = "part-"
CHUNKS_SUFFIX = ".chunks"
_NUMBER = struct.Struct("<I")


class Partial:
    """Chunks are written before they are noted. So a killed process leaves a file that a later download can continue.

    A wrong note (after a power cut) does no harm: the whole blob is hashed before it counts. The methods block on the disk.
    """

    def __init__(self, path: Path, size: int, chunk_bytes: int) -> None:
        self.path = path
        self.size = size
        self.chunk_bytes = chunk_bytes
        self.missing: set[int] = set()
        self.resumed = False
        """Whether some chunks are from an earlier download: their senders are not known."""
        self._log = path.with_name(path.name + CHUNKS_SUFFIX)

    @property
    def count(self) -> int:
        return -(-self.size // self.chunk_bytes)

    def open(self) -> None:
        """Make the file, or continue the one that is there."""
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
        """Remove the notes, and the file if it is still here (it may be a blob by now)."""
        self.path.unlink(missing_ok=True)
        self._log.unlink(missing_ok=True)
