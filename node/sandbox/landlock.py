"""Landlock (landlock(7)): the kernel lets this process reach only the files that it names, whoever the user is."""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterable
from pathlib import Path

ABI_LEAST = 2
"""Linux 5.19. Before it, no file can be moved to another folder, as TensorFlow does when it saves a model."""
ABI_TRUNCATE, ABI_TCP, ABI_IOCTL, ABI_SCOPES = 3, 4, 5, 6

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG, MAKE_SOCK, MAKE_FIFO, MAKE_SYM = (
    1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 9, 1 << 10, 1 << 12,
)  # fmt: skip
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15

READ = EXECUTE | READ_FILE | READ_DIR
WRITE = (
    WRITE_FILE | READ_FILE | READ_DIR | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SOCK | MAKE_FIFO
    | MAKE_SYM | REFER | TRUNCATE
)  # fmt: skip
DEVICE = READ_FILE | WRITE_FILE | READ_DIR | IOCTL_DEV
_OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
"""Rights that a rule for a single file may have."""

# The same numbers on all machines.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION, _PATH_BENEATH = 1, 1
_BIND_AND_CONNECT_TCP, _ABSTRACT_SOCKETS_AND_SIGNALS = 3, 3

_libc = ctypes.CDLL(None, use_errno=True)


def abi() -> int:
    """The version of Landlock that the kernel has; 0: none."""
    return max(0, int(_libc.syscall(_CREATE_RULESET, None, ctypes.c_long(0), ctypes.c_long(_VERSION))))


def handled(version: int) -> int:
    """The rights to files that a kernel of this version can refuse. All of them are refused where no rule gives them."""
    rights = (1 << 14) - 1
    if version >= ABI_TRUNCATE:
        rights |= TRUNCATE
    if version >= ABI_IOCTL:
        rights |= IOCTL_DEV
    return rights


def restrict(version: int, rules: Iterable[tuple[Path, int]], *, network: bool) -> None:
    """Let this thread, and all that it starts, reach only what the rules (path, rights) give. A path that is not there is skipped.

    Also refuses TCP (unless `network`), and signals to processes outside, where the kernel can. Needs `no_new_privs`. Raises OSError.
    """
    rights = handled(version)
    attributes = struct.pack(
        "QQQ",
        rights,
        _BIND_AND_CONNECT_TCP if version >= ABI_TCP and not network else 0,
        _ABSTRACT_SOCKETS_AND_SIGNALS if version >= ABI_SCOPES else 0,
    )
    size = 24 if version >= ABI_SCOPES else 16 if version >= ABI_TCP else 8
    ruleset = _call(_CREATE_RULESET, attributes, size, 0)
    try:
        for path, given in rules:
            _add(ruleset, path, given & rights)
        _call(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _add(ruleset: int, path: Path, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, PermissionError):  # there is nothing, or nothing that we could read
        return
    try:
        if not stat.S_ISDIR(os.fstat(place).st_mode):
            rights &= _OF_FILES
        _call(_ADD_RULE, ruleset, _PATH_BENEATH, struct.pack("=Qi", rights, place), 0)
    finally:
        os.close(place)


def _call(number: int, *arguments: int | bytes) -> int:
    result = int(_libc.syscall(number, *[ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"Landlock: {os.strerror(ctypes.get_errno())}")
    return result
