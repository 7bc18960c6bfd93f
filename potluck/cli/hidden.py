"""Takes a secret off this process's command line, which all users of this machine can read for as long as it runs."""

from __future__ import annotations

import ctypes
from pathlib import Path

_STAT = Path("/proc/self/stat")
_BEGIN = 48
"""The number of the field `arg_start` in it; `arg_end` follows (proc(5))."""


def hide(secret: str) -> bool:
    """Write stars over the secret where the kernel keeps our arguments; returns whether it was there. Does nothing where there is no /proc.

    Python has copies of its own, so `sys.argv` stays.
    """
    try:
        # The name of the program may hold spaces and brackets, and its field is the second.
        fields = _STAT.read_text().rpartition(")")[2].split()
        begin, end = (int(text) for text in fields[_BEGIN - 3 : _BEGIN - 1])
    except (OSError, ValueError):
        return False
    if secret in ("", "-") or not 0 < begin < end:  # -: it is read from standard input
        return False
    data = secret.encode()
    place = ctypes.string_at(begin, end - begin).find(data + b"\0")
    if place < 0:
        return False
    ctypes.memset(begin + place, ord("*"), len(data))
    return True
