"""What daemons tell their supervisor (sd_notify(3)), read by `potluck up` as systemd would: their status, whenever it changes."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Self

log = logging.getLogger(__name__)

_CREDENTIALS = struct.Struct("3i")
"""pid, uid and gid of the sender; the kernel vouches for them (unix(7), SCM_CREDENTIALS)."""
_LIMIT_BYTES = 4096


class Notices:
    """An address for NOTIFY_SOCKET. `told` is called with each new text of STATUS=. A context manager.

    The address is abstract, so nothing is left behind however we end. Any user can send to it, so only this user's processes are heard.
    """

    def __init__(self, told: Callable[[str], None]) -> None:
        self._told = told
        self._last = ""
        self._socket: socket.socket | None = None
        self.environment: dict[str, str] = {}
        """What the daemon's environment needs."""

    def __enter__(self) -> Self:
        if sys.platform != "linux":
            return self
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind("")  # the kernel chooses an abstract address
        self.environment = {"NOTIFY_SOCKET": "@" + self._socket.getsockname()[1:].decode()}
        asyncio.get_running_loop().add_reader(self._socket, self._read)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()

    def _read(self) -> None:
        assert self._socket is not None
        try:
            data, ancillary, _, _ = self._socket.recvmsg(_LIMIT_BYTES, socket.CMSG_SPACE(_CREDENTIALS.size))
        except BlockingIOError:
            return
        uids = [_CREDENTIALS.unpack(found)[1] for _, kind, found in ancillary if kind == socket.SCM_CREDENTIALS]
        if uids != [os.getuid()]:
            log.debug("notice of another user ignored")
            return
        for line in data.decode(errors="replace").splitlines():
            name, _, text = line.partition("=")
            if name == "STATUS" and text and text != self._last:
                self._last = text
                self._told(text)
