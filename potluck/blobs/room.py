"""What room there is for blobs: on the disk, of which a reserve is kept, and for what others send and nothing uses."""

from __future__ import annotations

import shutil
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

RESERVE_BYTES = 512 * 2**20
RESERVE_SHARE = 0.02
"""Of a disk, where that is less: for the journal, the logs, and what else must go on."""
UNUSED_SECONDS = 900.0
"""An upload that nothing has used for so long goes first."""
UPLOADS_SHARE = 0.5
"""Of the room, for uploads from one address that nothing uses."""


class Usage(Protocol):
    """As `shutil.disk_usage` has it."""

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
        """Bytes that may still be written; less than 0 where the reserve is touched."""
        found = self._usage(self._folder)
        return found.free - reserve(found.total)

    def full(self) -> str:
        """What to say where there is no room."""
        found = self._usage(self._folder)
        return (
            f"the disk is full: {found.free / 1e6:.0f} MB are free at {self._folder}, {reserve(found.total) / 1e6:.0f} MB stay so, and "
            "what lies there is in use: free some room, or choose another --state-dir"
        )


def reserve(total: int) -> int:
    """Bytes of a disk of this size that are left free."""
    return int(min(RESERVE_BYTES, RESERVE_SHARE * total))


class Uploads:
    """Blobs that others sent and that nothing has used since: from whom, how large, and when they were last asked for."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._found: OrderedDict[str, tuple[str, int, float]] = OrderedDict()
        """The least recent first."""
        self._held: Counter[str] = Counter()

    def held(self, peer: str) -> int:
        """Bytes, with those that are on their way."""
        return self._held[peer]

    def coming(self, peer: str, size: int) -> None:
        """So many bytes are on their way from a peer; less than 0: no longer."""
        self._held[peer] += size
        if not self._held[peer]:
            del self._held[peer]

    def add(self, sha256: str, peer: str, size: int) -> None:
        self.forget(sha256)
        self._found[sha256] = (peer, size, self._clock())
        self.coming(peer, size)

    def asked(self, sha256: str) -> None:
        """Somebody looked for it: it may be about to be used."""
        if (known := self._found.get(sha256)) is not None:
            self._found[sha256] = (*known[:2], self._clock())
            self._found.move_to_end(sha256)

    def forget(self, sha256: str) -> None:
        """It is used now, or gone."""
        if (known := self._found.pop(sha256, None)) is not None:
            self.coming(known[0], -known[1])

    def unused(self, peer: str = "") -> list[str]:
        """Those that nobody has asked for in a while, of one peer or of all."""
        oldest = self._clock() - UNUSED_SECONDS
        return [sha256 for sha256, (whose, _, at) in self._found.items() if at <= oldest and peer in ("", whose)]
