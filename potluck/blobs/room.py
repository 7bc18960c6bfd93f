"""The room for blobs: on the disk, less a reserve, and for uploads from others that nothing uses."""

from __future__ import annotations

import shutil
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

RESERVE_BYTES = 512 * 2**20
RESERVE_SHARE = 0.02
"""Share of a small disk that is left free: for the journal, the logs, and other programs."""
UNUSED_SECONDS = 900.0
"""An upload that nothing has used for this long is removed first."""
UPLOADS_SHARE = 0.5
"""Share of the room that unused uploads from one sender may take, unless a quota is set."""
UPLOADS_EACH = 100_000
"""Most unused uploads from one sender: each takes memory and a file, however small it is."""


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


@dataclass(frozen=True)
class _Upload:
    size: int
    lasting: bool
    at: float


class Uploads:
    """Blobs that others sent and that nothing has used yet: their senders, their size, and when they were last asked for.

    An upload that is `lasting` counts for its sender until it gets a name, although jobs use it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._found: OrderedDict[str, dict[str, _Upload]] = OrderedDict()
        """By hash and sender. The least recent comes first."""
        self._held: Counter[str] = Counter()
        self._count: Counter[str] = Counter()

    def held(self, peer: str) -> int:
        """Bytes from this peer, with those on their way."""
        return self._held[peer]

    def count(self, peer: str) -> int:
        """How many uploads from this peer there are."""
        return self._count[peer]

    def sent(self, sha256: str, peer: str) -> bool:
        """Whether this peer sent the blob, and it has not got a name since."""
        return peer in self._found.get(sha256, {})

    def coming(self, peer: str, size: int) -> None:
        """Count `size` bytes as on their way from a peer; a negative size takes them off again."""
        self._held[peer] += size
        if not self._held[peer]:
            del self._held[peer]

    def add(self, sha256: str, peer: str, size: int, *, lasting: bool = False) -> None:
        self._drop(sha256, peer)
        self._found.setdefault(sha256, {})[peer] = _Upload(size, lasting, self._clock())
        self._found.move_to_end(sha256)
        self._count[peer] += 1
        self.coming(peer, size)

    def asked(self, sha256: str) -> None:
        """A client looked for this blob: it may be used soon."""
        if (known := self._found.get(sha256)) is not None:
            for peer, upload in known.items():
                known[peer] = replace(upload, at=self._clock())
            self._found.move_to_end(sha256)

    def used(self, sha256: str) -> None:
        """A job uses the blob now."""
        for peer, upload in list(self._found.get(sha256, {}).items()):
            if not upload.lasting:
                self._drop(sha256, peer)

    def forget(self, sha256: str) -> None:
        """The blob has a name now, or is gone."""
        for peer in list(self._found.get(sha256, ())):
            self._drop(sha256, peer)

    def unused(self, peer: str = "") -> list[str]:
        """Uploads that no client has asked for in a while, from one peer or from all."""
        oldest = self._clock() - UNUSED_SECONDS
        return [
            sha256
            for sha256, known in self._found.items()
            if peer in ("", *known) and all(upload.at <= oldest for upload in known.values())
        ]

    def _drop(self, sha256: str, peer: str) -> None:
        known = self._found.get(sha256, {})
        if (upload := known.pop(peer, None)) is None:
            return
        if not known:
            del self._found[sha256]
        self._count[peer] -= 1
        if not self._count[peer]:
            del self._count[peer]
        self.coming(peer, -upload.size)
