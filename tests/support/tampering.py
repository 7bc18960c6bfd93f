"""Files that are changed behind the back of the store that holds them."""

from __future__ import annotations

import os
from pathlib import Path


def tamper(path: Path) -> None:
    """Change a byte of a file, and leave its size and its times as they were, as far as its owner can."""
    before = path.stat()
    changed = path.read_bytes()[0] ^ 0xFF
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # a file system's clock has a tick of some milliseconds
        with path.open("r+b") as file:
            file.write(bytes([changed]))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
