"""A network of its own (network_namespaces(7)) that leads nowhere, and no capabilities (capabilities(7))."""

from __future__ import annotations

import ctypes
import os
import struct

_NEWUSER, _NEWNET = 0x10000000, 0x40000000
_CAPABILITIES_VERSION = 0x20080522
_DAC_OVERRIDE, _DAC_READ_SEARCH = 1 << 1, 1 << 2

_libc = ctypes.CDLL(None, use_errno=True)


def leave_network() -> None:
    """Move this process to a network of its own, where even loopback is down. It must have one thread. Raises OSError.

    Users other than root need a user namespace for that; some systems let no program make one.
    """
    if _libc.unshare(_NEWNET if os.geteuid() == 0 else _NEWUSER | _NEWNET):
        raise OSError(ctypes.get_errno(), f"unshare: {os.strerror(ctypes.get_errno())}")


def drop_capabilities() -> None:
    """Keep no capability; root still reads files of others, since its environment may belong to one. Raises OSError."""
    header, now = struct.pack("Ii", _CAPABILITIES_VERSION, 0), ctypes.create_string_buffer(24)
    if _libc.capget(header, now):
        raise OSError(ctypes.get_errno(), f"capget: {os.strerror(ctypes.get_errno())}")
    _, permitted, *_ = struct.unpack("IIIIII", now)
    kept = permitted & (_DAC_OVERRIDE | _DAC_READ_SEARCH) if os.geteuid() == 0 else 0
    if _libc.capset(header, struct.pack("IIIIII", kept, kept, 0, 0, 0, 0)):
        raise OSError(ctypes.get_errno(), f"capset: {os.strerror(ctypes.get_errno())}")
