"""The room for blobs: on the disk, less a reserve, and for uploads from others that nothing uses."""

from __future__ import annotations

import shutil
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

RESERVE_BYTES = 512 * 2**20
RESERVE_SHARE = 0.02
"""Share of a small disk that is left free: for the journal, the logs, and other programs."""
UNUSED_SECONDS = 900.0
"""An upload that nothing has used for this long is removed first."""
UPLOADS_SHARE = 0.5
"""Share of the room that unused uploads from one address may take."""


class Usage(Protocol):
    """As returned by `shutil.disk_usage`."""

    @property
    def total(self) -> int: ...

    @property
    def free(self) -> int: ...


class Disk:
    """The disk that a folder is on."""

    def __init__(self, folder: Path, usage: Callable[[Path], Usage] = shutil.disk_usage) -> None:
        self._folder = folder
        self._usage = usage

    def spare(self) -> int:
        """Bytes that may still be written; below 0 if part of the reserve is used."""
        found = self._usage(self._folder)
        return found.free - reserve(found.total)

    def full(self) -> str:
        """The error text if there is no room."""
        found = self._usage(self._folder)
        return (
            f"the disk is full: {found.free / 1e6:.0f} MB are free at {self._folder}, {reserve(found.total) / 1e6:.0f} MB stay so, and "
            "what lies there is in use: free some room, or choose another --state-dir"
        )


def reserve(total: int) -> int:
    """Bytes that are left free on a disk of this size."""
    return int(min(RESERVE_BYTES, RESERVE_SHARE * total))


class Uploads:
    """Blobs that others sent and that nothing has used yet: their sender, their size, and when they were last asked for."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._found: OrderedDict[str, tuple[str, int, float]] = OrderedDict()
        """By hash: sender, size, and time. The least recent comes first."""
        self._held: Counter[str] = Counter()

    def held(self, peer: str) -> int:
        """Bytes from this peer, with those on their way."""
        return self._held[peer]

    def coming(self, peer: str, size: int) -> None:
        """Count `size` bytes as on their way from a peer; a negative size takes them off again."""
        self._held[peer] += size
        if not self._held[peer]:
            del self._held[peer]

    def add(self, sha256: str, peer: str, size: int) -> None:
        self.forget(sha256)
        self._found[sha256] = (peer, size, self._clock())
        self.coming(peer, size)

    def asked(self, sha256: str) -> None:
        """A client looked for this blob: it may be used soon."""
        if (known := self._found.get(sha256)) is not None:
            self._found[sha256] = (*known[:2], self._clock())
            self._found.move_to_end(sha256)

    def forget(self, sha256: str) -> None:
        """The blob is used now, or gone."""
        if (known := self._found.pop(sha256, None)) is not None:
            self.coming(known[0], -known[1])

    def unused(self, peer: str = "") -> list[str]:
        """Uploads that no client has asked for in a while, from one peer or from all."""
        oldest = self._clock() - UNUSED_SECONDS
        return [sha256 for sha256, (whose, _, at) in self._found.items() if at <= oldest and peer in ("", whose)]
