"""The blob server: `GET`, `HEAD` and, where clients may push, `PUT /blobs/<sha256>`."""

from __future__ import annotations

import asyncio
import hashlib
import re

from aiohttp import web

from potluck.blobs.store import BlobStore
from potluck.errors import PotluckError

_SHA256 = re.compile(r"^[0-9a-f]{64}$")


def routes(store: BlobStore, *, writable: bool, max_bytes: int) -> list[web.RouteDef]:
    """Routes for an aiohttp application. `GET` answers Range requests (RFC 9110, 14) and carries the hash as ETag."""

    async def get(request: web.Request) -> web.StreamResponse:
        sha256 = request.match_info["sha256"]
        if not store.has(sha256):
            return _problem(404, f"there is no blob {sha256[:12]} here")
        headers = {"Content-Type": "application/octet-stream", "ETag": f'"{sha256}"', "Cache-Control": "immutable"}
        return web.FileResponse(store.path(sha256), headers=headers)

    async def put(request: web.Request) -> web.StreamResponse:
        sha256 = request.match_info["sha256"]
        if not _SHA256.match(sha256):
            return _problem(400, "a blob is named by its SHA-256: 64 lower-case hexadecimal digits")
        if store.has(sha256):
            return web.Response(status=200)
        if (request.content_length or 0) > max_bytes:
            return _problem(413, f"a blob may have {max_bytes} bytes here")
        digest, size = hashlib.sha256(), 0
        try:
            with store.new_file() as file:
                async for chunk in request.content.iter_chunked(1 << 20):
                    size += len(chunk)
                    if size > max_bytes:
                        return _problem(413, f"a blob may have {max_bytes} bytes here")
                    digest.update(chunk)
                    await asyncio.to_thread(file.write, chunk)
                file.flush()
                if digest.hexdigest() != sha256:
                    return _problem(409, f"the {size} bytes sent have the SHA-256 {digest.hexdigest()}")
                store.adopt(file.path, sha256)
        except PotluckError as error:
            return _problem(507, error.message)
        return web.Response(status=201)

    found = [web.get("/blobs/{sha256}", get)]
    return [*found, web.put("/blobs/{sha256}", put)] if writable else found


def _problem(status: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=status)
