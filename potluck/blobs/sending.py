"""Answers that send a file, or the part of it that a request asks for (RFC 9110, 14): `sendfile` on plain connections, large pieces
over TLS, where asyncio's `sendfile` would take a thread for every 16 KiB.
"""

from __future__ import annotations

import asyncio
from io import FileIO
from pathlib import Path

from aiohttp import hdrs, web

from potluck.blobs.threads import unbroken

PIECE_BYTES = 1 << 19
"""How much is read and encrypted at a time. The event loop stands still meanwhile: less than a millisecond."""


class FileAnswer(web.StreamResponse):
    """Give the result of `send` to aiohttp. `headers` go with it; the file may not change meanwhile."""

    async def send(self, request: web.Request, path: Path) -> web.StreamResponse:
        """Send the file. Raises FileNotFoundError before anything is sent."""
        opening = asyncio.ensure_future(asyncio.to_thread(path.open, "rb", buffering=0))
        try:
            file = await asyncio.shield(opening)
        except asyncio.CancelledError:  # the client has left
            opening.add_done_callback(_close)
            raise
        try:
            await self._send(request, file)
        finally:
            file.close()
        return self

    async def _send(self, request: web.Request, file: FileIO) -> None:
        size = file.seek(0, 2)
        span = _span(request, size)
        self.headers[hdrs.ACCEPT_RANGES] = "bytes"
        if span is None:
            self.set_status(416)
            self.headers[hdrs.CONTENT_RANGE] = f"bytes */{size}"
            self.content_length = 0
            await self.prepare(request)
            return
        start, stop = span
        if hdrs.RANGE in request.headers:
            self.set_status(206)
            self.headers[hdrs.CONTENT_RANGE] = f"bytes {start}-{stop - 1}/{size}"
        self.content_length = stop - start
        await self.prepare(request)
        if request.method == hdrs.METH_HEAD or start == stop:
            return
        if request.secure:
            await self._in_pieces(file, start, stop)
        elif request.transport is None:
            raise ConnectionResetError("the client has left")
        else:
            await asyncio.get_running_loop().sendfile(request.transport, file, start, stop - start)

    async def _in_pieces(self, file: FileIO, start: int, stop: int) -> None:
        file.seek(start)
        while start < stop:
            data = await unbroken(file.read, min(PIECE_BYTES, stop - start))
            if not data:
                raise ConnectionResetError("the file has become shorter")
            start += len(data)
            await self.write(data)


def _span(request: web.Request, size: int) -> tuple[int, int] | None:
    """(first byte, one after the last) of what is asked for; None: there is no such part."""
    try:
        asked = request.http_range
    except ValueError:
        return None
    if asked.start is None:
        return 0, size
    if asked.start < 0:  # the last bytes
        return (max(0, size + asked.start), size) if size else None
    if asked.start >= size:
        return None
    return asked.start, size if asked.stop is None else min(asked.stop, size)


def _close(opened: asyncio.Future[FileIO]) -> None:
    if not opened.cancelled() and opened.exception() is None:
        opened.result().close()
