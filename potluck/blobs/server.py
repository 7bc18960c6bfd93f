"""The blob server: `GET` and `HEAD /blobs/<sha256>`; `PUT` if clients may push; `/inputs` if inputs are taken."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import nullcontext, suppress

from aiohttp import hdrs, web

from potluck.blobs.reading import Reads
from potluck.blobs.rights import Rights
from potluck.blobs.sending import FileAnswer
from potluck.blobs.store import BlobStore, NewFile, is_sha256, made_up_name
from potluck.errors import CorruptBlob, DiskFull, InvalidRequest, NotFound, PotluckError, TooLarge
from potluck.logs import fields
from potluck.net.http import TOO_SLOW, Patience, caller_of, media_type
from potluck.net.peers import asker

log = logging.getLogger(__name__)

IDLE_SECONDS = 30.0
"""An upload without a new byte for this long is given up, and so is a slow one (`potluck.net.http.Patience`)."""

_OCTETS = "application/octet-stream"
_IMMUTABLE = {hdrs.CONTENT_TYPE: _OCTETS, hdrs.CACHE_CONTROL: "max-age=31536000, immutable"}
_UPLOADS_LIMIT = 32
"""Uploads of inputs at a time. An incomplete upload does not count towards any other limit."""
_UPLOADS_EACH = 16
"""Uploads of inputs from one sender at a time."""
_NO_INPUTS = "these inputs are not here: they were used, or not for a long time"
_MAY_NOT_PUT = "you may not send blobs here: this needs a client with the role user or operator"
_ADD_BYTES = 1 << 20
"""How much is hashed and written at a time: a thread for each small piece would take longer than the work."""
_QUICK_SECONDS = 0.1
"""A piece that is not hashed is written at once, which is a copy in memory. After a write took this long, threads write."""


def routes(
    store: BlobStore,
    *others: BlobStore,
    writable: bool,
    max_bytes: int,
    rights: Rights,
    idle_seconds: float = IDLE_SECONDS,
) -> list[web.RouteDef]:
    """Routes for an aiohttp application. `GET` answers Range requests (RFC 9110, 14) and sends the hash as ETag. A blob that is
    not in `store` is looked for in `others`. One that the caller has no right to is not there for them: nobody learns which there are.

    `PUT` takes at most `max_bytes`, and keeps only bytes with the hash in their name. The sender is logged. With
    `Expect: 100-continue`, an unwanted blob is refused before it is sent.
    """

    readers = [(one, Reads(one)) for one in (*others, store)]

    async def get(request: web.Request) -> web.StreamResponse:
        sha256 = request.match_info["sha256"]
        if not rights.allowed(asker(request), sha256):
            return _not_here(sha256)
        try:
            path = await next((reads for one, reads in readers if one.has(sha256)), readers[-1][1]).path(sha256)
        except (NotFound, CorruptBlob):
            return _not_here(sha256)
        if any(tag.value in (sha256, "*") for tag in request.if_none_match or ()):
            return web.Response(status=304, headers={hdrs.ETAG: f'"{sha256}"'})
        try:
            return await FileAnswer(headers=_IMMUTABLE | {hdrs.ETAG: f'"{sha256}"'}).send(request, path)
        except FileNotFoundError:  # deleted just now
            return _not_here(sha256)

    async def settled(request: web.Request) -> web.Response | None:
        """The answer, if it does not depend on the bytes."""
        sha256 = request.match_info["sha256"]
        if not is_sha256(sha256):
            return _problem(400, "a blob is named by its SHA-256: 64 lower-case hexadecimal digits")
        if (problem := _wrong_caller(request)) is not None:
            return problem
        caller, size = asker(request), request.content_length or 0
        if not rights.may_put(caller, size):
            return _problem(403, _MAY_NOT_PUT)
        if _is_encoded(request):
            return _encoded()
        if rights.allowed(caller, sha256):  # otherwise it is taken again: nobody learns that it is here
            with suppress(NotFound, CorruptBlob):
                await readers[-1][1].path(sha256)  # it counts as used now: its sender will soon name it
                return web.Response(status=200)
        if size > max_bytes:
            return _too_large(max_bytes)
        try:
            store.check_room(size)
            store.check_quota(_sender(request), size)
        except DiskFull as error:
            return _problem(507, error.message)
        return None

    async def on_expect(request: web.Request) -> web.StreamResponse | None:
        answer = await settled(request)
        if answer is not None:
            answer.force_close()  # the body that was announced will not come
        else:
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0  # as in aiohttp's own handler: the answer has not begun
        return answer

    async def put(request: web.Request) -> web.StreamResponse:
        answer = await settled(request)
        if answer is not None:
            return answer
        return await _received(request, store, max_bytes, idle_seconds, wanted=request.match_info["sha256"])

    found = [web.get("/blobs/{sha256}", get)]
    if writable:
        expect: Callable[[web.Request], Awaitable[web.StreamResponse | None]] = on_expect
        found.append(web.put("/blobs/{sha256}", put, expect_handler=expect))
    return found


def inputs_routes(
    store: BlobStore,
    *,
    max_bytes: int,
    refusal: Callable[[], PotluckError | None],
    rights: Rights,
    idle_seconds: float = IDLE_SECONDS,
) -> list[web.RouteDef]:
    """`POST /inputs` takes bytes and does not hash them; the answer has a made-up name for them. While there is a `refusal`,
    nothing is taken. `GET /inputs/<name>` makes them a blob that others can fetch, and answers its hash.
    """

    uploads: Counter[str] = Counter()
    """Uploads under way, by sender."""

    async def post(request: web.Request) -> web.StreamResponse:
        if media_type(request) != _OCTETS:  # a page in a browser cannot send this type unasked: fetch standard, 2.2.2
            return _problem(415, f"inputs are sent as {_OCTETS}")
        if (problem := _wrong_caller(request)) is not None:
            return problem
        if not rights.may_put(asker(request), request.content_length or 0):
            return _problem(403, _MAY_NOT_PUT)
        if _is_encoded(request):
            return _encoded()
        if (reason := refusal()) is not None:
            return _problem(503, reason.message)
        if (request.content_length or 0) > max_bytes:
            return _too_large(max_bytes)
        peer = _sender(request)
        if uploads[peer] >= _UPLOADS_EACH:
            return _problem(503, f"{_UPLOADS_EACH} uploads of yours are under way")
        if uploads.total() >= _UPLOADS_LIMIT:
            return _problem(503, f"{_UPLOADS_LIMIT} uploads are under way")
        uploads[peer] += 1
        try:
            return await _received(request, store, max_bytes, idle_seconds)
        finally:
            uploads[peer] -= 1
            if not uploads[peer]:
                del uploads[peer]

    async def get(request: web.Request) -> web.StreamResponse:
        if not rights.allowed(asker(request), request.match_info["name"]):
            return _problem(404, _NO_INPUTS)
        try:
            ref = await asyncio.to_thread(store.put_file, store.path(request.match_info["name"]))
        except (NotFound, FileNotFoundError):
            return _problem(404, _NO_INPUTS)
        except DiskFull as error:
            return _problem(507, error.message)
        return web.json_response({"sha256": ref.sha256, "size": ref.size})

    return [web.post("/inputs", post), web.get("/inputs/{name}", get)]


async def _received(
    request: web.Request, store: BlobStore, max_bytes: int, idle_seconds: float, *, wanted: str | None = None
) -> web.Response:
    """Store the body and answer 201, or answer an error. The body must have the hash `wanted`; None: it gets a made-up name."""
    digest = None if wanted is None else hashlib.sha256()
    try:
        peer = _sender(request)
        with store.new_file() as file, store.receiving(peer) if wanted else nullcontext(_nothing) as coming:
            size = await _receive(request, file, digest, max_bytes, idle_seconds, coming)
            if digest is not None and digest.hexdigest() != wanted:
                return _problem(409, f"the {size} bytes sent have the SHA-256 {digest.hexdigest()}")
            name = made_up_name() if wanted is None else wanted
            store.adopt(file.path, name)
            if wanted is not None:
                store.uploaded(name, peer)
                log.info(
                    "blob taken %s", fields(blob=name[:12], size=size, caller=caller_of(request), peer=request.remote)
                )
    except TooLarge:
        return _too_large(max_bytes)
    except DiskFull as error:
        return _problem(507, error.message)
    except TimeoutError:
        return _problem(408, TOO_SLOW.format(idle_seconds))
    if wanted is not None:
        return web.Response(status=201)
    return web.json_response({"sha256": name, "size": size}, status=201)


async def _receive(
    request: web.Request,
    file: NewFile,
    digest: hashlib._Hash | None,
    max_bytes: int,
    idle_seconds: float,
    coming: Callable[[int], None],
) -> int:
    """Write the body to the file, and hash it if there is a `digest`. Returns its size. Raises TooLarge, DiskFull, TimeoutError."""
    gathered: list[bytes] = []
    size = waiting = 0
    quick = digest is None

    def add() -> None:
        for data in gathered:
            if digest is not None:
                digest.update(data)
            file.write(data)
        if not data:
            file.flush()

    data = b"-"
    loop = asyncio.get_running_loop()
    patience = Patience(idle_seconds)
    # One timeout for all pieces: making one costs as much as reading a piece.
    async with asyncio.timeout(None) as limit:
        while data:
            began_at = loop.time()
            limit.reschedule(began_at + patience.left())
            data = await request.content.readany()
            limit.reschedule(None)
            patience.came(len(data), loop.time() - began_at)
            size += len(data)
            waiting += len(data)
            if size > max_bytes:
                raise TooLarge(f"more than {max_bytes} bytes")
            coming(len(data))
            gathered.append(data)
            if quick:
                began = time.perf_counter()
                add()
                quick = time.perf_counter() - began < _QUICK_SECONDS
            elif data and waiting < _ADD_BYTES:
                continue
            else:
                await asyncio.to_thread(add)
            gathered.clear()
            waiting = 0
    return size


def _nothing(size: int) -> None:
    """Inputs have their own store, and are not kept for long: they need no check."""


def _wrong_caller(request: web.Request) -> web.Response | None:
    """The answer to a sender with a malformed identity."""
    try:
        caller_of(request)
    except InvalidRequest as error:
        return _problem(400, error.message)
    return None


def _sender(request: web.Request) -> str:
    """For whom an upload counts: an identity that is proven, or else an address."""
    return asker(request) or request.remote or ""


def _not_here(sha256: str) -> web.Response:
    return _problem(404, f"there is no blob {sha256[:12]} here")


def _is_encoded(request: web.Request) -> bool:
    return request.headers.get(hdrs.CONTENT_ENCODING, "identity").strip().lower() not in ("", "identity")


def _encoded() -> web.Response:
    return _problem(415, "bytes are sent as they are here: without Content-Encoding")


def _too_large(max_bytes: int) -> web.Response:
    return _problem(413, f"a blob may have {max_bytes} bytes here")


def _problem(status: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=status)
