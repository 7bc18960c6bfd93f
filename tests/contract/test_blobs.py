"""Blobs over real sockets: the server's answers, and downloads from holders that die, stall, lie or know nothing."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from potluck.blobs import server
from potluck.blobs.download import Downloader
from potluck.blobs.parts import Timings
from potluck.blobs.rights import OPEN
from potluck.blobs.store import BlobStore
from potluck.blobs.transfer import CHUNK_BYTES
from potluck.credentials import Credentials
from potluck.errors import (
    CorruptBlob,
    DiskFull,
    InvalidRequest,
    NotAllowed,
    NotAuthenticated,
    PotluckError,
    TooLarge,
    Unavailable,
)
from potluck.net.http import serve_http
from potluck.security import certificates
from potluck.wire.addresses import address
from potluck.wire.values import BlobRef
from support.closed import Authority
from support.eventually import eventually
from support.tampering import tamper

QUICK = Timings(connect_seconds=1.0, idle_seconds=1.0, hedge_seconds=0.3, rest_seconds=0.01)
MAX_BYTES = 64 * 2**20

Misbehaviour = Callable[[web.Request, bytes], Awaitable[web.StreamResponse | None]]


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def ref_of(data: bytes, *holders: str) -> BlobRef:
    return BlobRef(sha256=sha(data), size=len(data), holders=holders)


@dataclass
class Holder:
    """A store and its server. `asked` lists the Range headers of all requests for a blob."""

    store: BlobStore
    url: str = ""
    asked: list[str] = field(default_factory=list)


Hold = Callable[..., Awaitable[Holder]]

BOTH = pytest.mark.parametrize("credentials", ["plain", "mTLS"], indirect=True)
"""The same test on plain connections and over mTLS, where blobs are fetched by other code."""


@pytest.fixture(scope="module")
def member(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The credentials of a node, used for both sides here."""
    return Authority().member(tmp_path_factory.mktemp("member"), "node", certificates.node_profile("n1"))


@pytest.fixture
def credentials(request: pytest.FixtureRequest, member: Path) -> Credentials:
    return Credentials() if getattr(request, "param", "plain") == "plain" else Credentials.load(member, "node")


@pytest.fixture
async def hold(tmp_path: Path, credentials: Credentials) -> AsyncIterator[Hold]:
    """Starts holders. With `spoil(request, data)` whole answers can be replaced; None: the proper one."""
    async with AsyncExitStack() as stack:
        count = 0

        async def start(*blobs: bytes, spoil: Misbehaviour | None = None, limit: int = 1 << 30) -> Holder:
            nonlocal count
            count += 1
            holder = Holder(BlobStore(tmp_path / f"holder{count}", limit))
            for data in blobs:
                holder.store.put_bytes(data)
            routes = server.routes(holder.store, writable=True, max_bytes=MAX_BYTES, rights=OPEN, idle_seconds=1.0)
            proper = routes[0].handler

            async def get(request: web.Request) -> web.StreamResponse:
                holder.asked.append(request.headers.get("Range", ""))
                answer = await spoil(request, blobs[0]) if spoil else None
                return answer or await proper(request)  # type: ignore[operator,misc,no-any-return]

            sock = socket.create_server(("127.0.0.1", 0))
            await stack.enter_async_context(
                serve_http(sock, [web.get("/blobs/{sha256}", get), *routes[1:]], credentials)
            )
            holder.url = address("127.0.0.1", sock.getsockname()[1], credentials.scheme)
            return holder

        yield start


@pytest.fixture
async def downloader(tmp_path: Path, credentials: Credentials) -> AsyncIterator[Downloader]:
    async with Downloader(BlobStore(tmp_path / "here", 1 << 30), credentials, QUICK) as found:
        yield found


def span(request: web.Request, data: bytes) -> tuple[int, int]:
    found = request.http_range
    return found.start or 0, min(found.stop or len(data), len(data))


async def lie(request: web.Request, data: bytes) -> web.StreamResponse:
    """Answer with the right number of bytes, but wrong ones."""
    start, stop = span(request, data)
    headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
    return web.Response(status=206, body=bytes(stop - start), headers=headers)


async def freeze(request: web.Request, data: bytes) -> web.StreamResponse:
    """Send half of the data, then nothing more."""
    start, stop = span(request, data)
    response = web.StreamResponse(status=206, headers={"Content-Length": str(stop - start)})
    await response.prepare(request)
    await response.write(data[start : (start + stop) // 2])
    await eventually(lambda: request.transport is None or request.transport.is_closing(), 60)
    return response


async def break_off(request: web.Request, data: bytes) -> web.StreamResponse:
    start, stop = span(request, data)
    response = web.StreamResponse(status=206, headers={"Content-Length": str(stop - start)})
    await response.prepare(request)
    await response.write(data[start : (start + stop) // 2])
    assert request.transport is not None
    request.transport.abort()
    return response


def leftovers(store: BlobStore) -> list[str]:
    return [path.name for path in store.folder.iterdir() if not store.has(path.name)]


def store_of(downloader: Downloader) -> BlobStore:
    return downloader._store


# --- the server -------------------------------------------------------------------------------------------------------


async def test_get_head_range_and_etag(hold: Hold) -> None:
    data = noise(100_000)
    holder = await hold(data)
    url = f"{holder.url}/blobs/{sha(data)}"
    async with aiohttp.ClientSession() as http:
        async with http.get(url) as response:
            assert response.status == 200
            assert response.headers["ETag"] == f'"{sha(data)}"'
            assert response.headers["Content-Type"] == "application/octet-stream"
            assert await response.read() == data
        async with http.head(url) as response:
            assert (response.status, response.content_length) == (200, 100_000)
            assert response.headers["Accept-Ranges"] == "bytes"
        for asked, (start, stop) in {
            "bytes=0-9": (0, 10),
            "bytes=99990-": (99_990, 100_000),
            "bytes=-5": (99_995, 100_000),
            "bytes=50-999999": (50, 100_000),
        }.items():
            async with http.get(url, headers={"Range": asked}) as response:
                assert response.status == 206
                assert response.headers["Content-Range"] == f"bytes {start}-{stop - 1}/100000"
                assert response.headers["ETag"] == f'"{sha(data)}"'
                assert await response.read() == data[start:stop]
        async with http.get(url, headers={"Range": "bytes=100000-"}) as response:
            assert response.status == 416
            assert response.headers["Content-Range"] == "bytes */100000"
        async with http.get(url, headers={"If-None-Match": f'"{sha(data)}"'}) as response:
            assert response.status == 304
            assert response.headers["ETag"] == f'"{sha(data)}"'


@pytest.mark.parametrize("name", ["0" * 64, "nonsense", "..%2f..%2fetc%2fpasswd", "new-x"])
async def test_what_is_not_here_is_404(hold: Hold, name: str) -> None:
    holder = await hold()
    async with aiohttp.ClientSession() as http, http.get(f"{holder.url}/blobs/{name}") as response:
        assert response.status == 404
        assert "no blob" in (await response.json())["error"]


async def test_a_blob_that_was_removed_behind_our_back_is_404(hold: Hold) -> None:
    holder = await hold(b"soup")
    holder.store.path(sha(b"soup")).unlink()
    async with aiohttp.ClientSession() as http, http.get(f"{holder.url}/blobs/{sha(b'soup')}") as response:
        assert response.status == 404


async def test_put_checks_the_hash_and_is_idempotent(hold: Hold) -> None:
    holder = await hold()
    data = noise(900_000)
    url = f"{holder.url}/blobs/{sha(data)}"
    async with aiohttp.ClientSession() as http:
        async with http.put(url, data=data[:-1]) as response:
            assert response.status == 409
            assert "899999 bytes" in (await response.json())["error"]
        assert not holder.store.has(sha(data))
        async with http.put(url, data=data) as response:
            assert response.status == 201
        async with http.put(url, data=data) as response:
            assert response.status == 200
        async with http.put(f"{holder.url}/blobs/{'A' * 64}", data=data) as response:
            assert response.status == 400
    assert holder.store.read(sha(data)) == data
    assert leftovers(holder.store) == []


async def test_put_says_who_sends(hold: Hold, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """We name ourselves in each request, curl does not. A malformed identity is refused before the bytes are sent."""
    caplog.set_level("INFO", "potluck.blobs.server")
    holder = await hold()

    def log() -> list[str]:
        found = [record.getMessage() for record in caplog.records if record.name == "potluck.blobs.server"]
        caplog.clear()
        return found

    async with Downloader(BlobStore(tmp_path / "client", 1 << 30), Credentials.of("client", "ann"), QUICK) as ours:
        await ours.push(b"ours", (holder.url,))
    (line,) = log()
    assert f"blob={sha(b'ours')[:12]} size=4 caller=client:ann peer=127.0.0.1" in line
    async with aiohttp.ClientSession() as http:
        async with http.put(f"{holder.url}/blobs/{sha(b'curl')}", data=b"curl") as response:
            assert response.status == 201
        (line,) = log()
        assert "caller=anonymous" in line
        for headers in ([("Potluck-Caller", "ann")], [("Potluck-Caller", "client:a"), ("Potluck-Caller", "client:b")]):
            for expect100 in (False, True):
                async with http.put(
                    f"{holder.url}/blobs/{sha(b'bad')}", data=b"bad", headers=headers, expect100=expect100
                ) as response:
                    assert response.status == 400
                    assert "is no identity" in (await response.json())["error"]
    assert log() == []
    assert not holder.store.has(sha(b"bad"))


async def test_put_is_not_for_everyone(tmp_path: Path) -> None:
    sock = socket.create_server(("127.0.0.1", 0))
    routes = server.routes(BlobStore(tmp_path, 100), writable=False, max_bytes=0, rights=OPEN)
    async with serve_http(sock, routes, Credentials()), aiohttp.ClientSession() as http:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}/blobs/{sha(b'')}"
        async with http.put(url, data=b"") as response:
            assert response.status == 405


@pytest.mark.parametrize("chunked", [False, True])
async def test_put_over_the_limit_is_413_and_leaves_nothing(hold: Hold, chunked: bool) -> None:
    holder = await hold()

    async def body() -> AsyncIterator[bytes]:
        for _ in range(65):
            yield bytes(1 << 20)

    headers = {} if chunked else {"Content-Length": str(65 << 20)}
    async with aiohttp.ClientSession() as http:
        async with http.put(f"{holder.url}/blobs/{'0' * 64}", data=body(), headers=headers, expect100=not chunked) as r:
            assert r.status == 413
            assert str(MAX_BYTES) in (await r.json())["error"]
    assert leftovers(holder.store) == []


@pytest.mark.parametrize("chunked", [False, True])
async def test_put_without_room_is_507(hold: Hold, chunked: bool) -> None:
    holder = await hold(limit=1000)
    data = noise(2000)

    async def body() -> AsyncIterator[bytes]:
        yield data

    url = f"{holder.url}/blobs/{sha(data)}"
    async with aiohttp.ClientSession() as http, http.put(url, data=body() if chunked else data) as response:
        assert response.status == 507
        assert "does not fit" in (await response.json())["error"]
    assert leftovers(holder.store) == []


async def test_many_that_send_at_once_do_not_fill_the_disk(tmp_path: Path) -> None:
    folder, lowest = tmp_path / "held", 10**9
    total, reserved = 8_000_000, 160_000

    def usage(_: Path) -> SimpleNamespace:
        nonlocal lowest
        taken = sum(path.stat().st_size for path in folder.iterdir()) if folder.exists() else 0
        lowest = min(lowest, total - taken)
        return SimpleNamespace(total=total, free=total - taken)

    store = BlobStore(folder, 1 << 40, quota_bytes=1 << 40, usage=usage)
    kept = store.put_bytes(noise(1_000_000))
    store.pin(kept.sha256)
    sock = socket.create_server(("127.0.0.1", 0))
    url = address("127.0.0.1", sock.getsockname()[1], "http")
    routes = server.routes(store, writable=True, max_bytes=MAX_BYTES, rights=OPEN)

    async def pieces(data: bytes) -> AsyncIterator[bytes]:  # so that nobody knows the size before
        for start in range(0, len(data), 100_000):
            yield data[start : start + 100_000]
            await asyncio.sleep(0)

    async def send(number: int) -> int:
        data = noise(1_500_000, number + 1)
        async with aiohttp.ClientSession() as http, http.put(f"{url}/blobs/{sha(data)}", data=pieces(data)) as answer:
            store.pin(sha(data))  # all are in use at once: none makes room for another
            return answer.status

    async with serve_http(sock, routes, Credentials()):
        answers = await asyncio.gather(*map(send, range(12)), return_exceptions=True)
    assert 507 in answers or any(isinstance(answer, aiohttp.ClientError) for answer in answers)
    assert lowest >= reserved
    assert store.read(kept.sha256)
    assert leftovers(store) == []
    assert store.size_bytes == 1_000_000 + 1_500_000 * answers.count(201)


async def test_put_that_is_compressed_is_refused_before_it_is_read(hold: Hold, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = await hold()
    inflated: list[int] = []
    monkeypatch.setattr(zlib, "decompressobj", lambda *arguments, **options: inflated.append(1))
    body = gzip.compress(bytes(32 * 2**20))
    async with aiohttp.ClientSession() as http:
        url = f"{holder.url}/blobs/{sha(bytes(32 * 2**20))}"
        async with http.put(url, data=body, headers={"Content-Encoding": "gzip"}) as response:
            assert response.status == 415
            assert "without Content-Encoding" in (await response.json())["error"]
    assert inflated == []
    assert leftovers(holder.store) == []


async def test_an_upload_that_breaks_off_or_stalls_leaves_nothing(hold: Hold) -> None:
    holder = await hold()
    data = noise(1_000_000)
    host, port = holder.url.removeprefix("http://").split(":")
    head = f"PUT /blobs/{sha(data)} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(head + data[:500_000])
    await writer.drain()
    await eventually(lambda: len(leftovers(holder.store)) == 1)
    writer.transport.abort()
    await eventually(lambda: leftovers(holder.store) == [])

    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(head + data[:500_000])
    answer = await asyncio.wait_for(reader.readline(), 10)
    assert b"408" in answer
    writer.close()
    await eventually(lambda: leftovers(holder.store) == [])


# --- fetch ------------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 17])
async def test_a_blob_is_fetched_whole(hold: Hold, downloader: Downloader, size: int) -> None:
    data = noise(size)
    holder = await hold(data)
    path = await downloader.fetch(ref_of(data, holder.url))
    assert path.read_bytes() == data
    assert path == store_of(downloader).path(sha(data))
    assert await downloader.fetch(ref_of(data)) == path  # it is here: no holder needed
    assert leftovers(store_of(downloader)) == []


async def test_all_holders_give_a_part(hold: Hold, downloader: Downloader) -> None:
    data = noise(10 * CHUNK_BYTES)
    holders = [await hold(data) for _ in range(3)]
    await downloader.fetch(ref_of(data, *[holder.url for holder in holders]))
    assert all(holder.asked for holder in holders)
    assert sum(len(holder.asked) for holder in holders) == 10


async def test_fetches_of_one_blob_are_one(hold: Hold, downloader: Downloader) -> None:
    data = noise(2 * CHUNK_BYTES)
    holder = await hold(data)
    paths = await asyncio.gather(*(downloader.fetch(ref_of(data, holder.url)) for _ in range(10)))
    assert len(set(paths)) == 1
    assert len(holder.asked) == 2


async def test_a_later_fetch_brings_its_holders_along(hold: Hold, downloader: Downloader) -> None:
    data = noise(1000)
    frozen, good = await hold(data, spoil=freeze), await hold(data)
    first = asyncio.create_task(downloader.fetch(ref_of(data, frozen.url)))
    await eventually(lambda: frozen.asked)
    second = asyncio.create_task(downloader.fetch(ref_of(data, good.url)))
    assert (await first).read_bytes() == data
    await second


async def test_a_fetch_goes_on_when_one_of_those_who_wait_is_cancelled(hold: Hold, downloader: Downloader) -> None:
    data = noise(1000)
    gate = asyncio.Event()

    async def wait(request: web.Request, data: bytes) -> None:
        await gate.wait()

    holder = await hold(data, spoil=wait)
    first, second = (asyncio.create_task(downloader.fetch(ref_of(data, holder.url))) for _ in range(2))
    await eventually(lambda: holder.asked)
    first.cancel()
    await asyncio.wait([first])
    gate.set()
    assert (await second).read_bytes() == data
    assert len(holder.asked) == 1


@BOTH
async def test_a_fetch_that_nobody_waits_for_ends_and_can_be_resumed(hold: Hold, downloader: Downloader) -> None:
    data = noise(1000)
    gate = asyncio.Event()

    async def wait(request: web.Request, data: bytes) -> None:
        await gate.wait()

    holder = await hold(data, spoil=wait)
    first = asyncio.create_task(downloader.fetch(ref_of(data, holder.url)))
    await eventually(lambda: holder.asked)
    first.cancel()
    again = asyncio.create_task(downloader.fetch(ref_of(data, holder.url)))
    await asyncio.wait([first])
    assert first.cancelled()
    gate.set()
    assert (await again).read_bytes() == data


async def test_nobody_to_ask(downloader: Downloader) -> None:
    with pytest.raises(Unavailable, match=f"blob {sha(b'x')[:12]}.*has no holder"):
        await downloader.fetch(ref_of(b"x"))


@BOTH
async def test_connection_errors_are_explained(hold: Hold, credentials: Credentials, downloader: Downloader) -> None:
    data = noise(1000)
    without, broken, frozen = await hold(), await hold(data, spoil=break_off), await hold(data, spoil=freeze)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        closed = address("127.0.0.1", sock.getsockname()[1], credentials.scheme)
    with pytest.raises(Unavailable) as caught:
        await downloader.fetch(ref_of(data, without.url, broken.url, frozen.url, closed, "nonsense"))
    message = caught.value.message
    assert f"{without.url}: answered 404 Not Found" in message
    assert f"{broken.url}: broke off the connection" in message
    assert f"{frozen.url}: no byte came for 1 s" in message
    assert f"{closed}: nothing listens there" in message
    assert "nonsense: is not an http://host:port address" in message
    assert len(without.asked) == 1
    assert len(broken.asked) == QUICK.failures_limit


@pytest.mark.parametrize(
    "url",
    [
        "", "nonsense", "ftp://127.0.0.1", "file:///etc/passwd", "http://[::1", "http://127.0.0.1:99999", "http://a..b",
        f"http://{'a' * 70}", "http://\udc80", "http://1.2.3.4.5:1", "http://us\u00e9r:\u20ac@127.0.0.1:1",
    ],
)  # fmt: skip
async def test_malformed_addresses_are_named(hold: Hold, downloader: Downloader, url: str) -> None:
    data = noise(1000)
    with pytest.raises(Unavailable, match="is not an http://host:port address"):
        await downloader.fetch(ref_of(data, url))
    with pytest.raises(Unavailable, match="is not an http://host:port address"):
        await downloader.push(data, (url,))
    assert (await downloader.fetch(ref_of(data, url, (await hold(data)).url))).read_bytes() == data


@BOTH
@pytest.mark.parametrize("total", ["9" * 5000, "", "*", "-1", "\u0663", "x"])
async def test_a_holder_that_talks_nonsense_harms_nobody(hold: Hold, downloader: Downloader, total: str) -> None:
    data = noise(1000)

    async def nonsense(request: web.Request, data: bytes) -> web.StreamResponse:
        headers = {"Content-Range": f"bytes 0-9/{total}"}
        return web.Response(status=206, body=b"nonsense", headers=headers)

    odd, good = await hold(data, spoil=nonsense), await hold(data)
    assert (await downloader.fetch(ref_of(data, odd.url, good.url))).read_bytes() == data
    with pytest.raises(Unavailable, match="could not be had from anyone"):
        await downloader.fetch(ref_of(noise(1000, 1), odd.url))


@BOTH
async def test_a_holder_that_trickles_alone_is_given_up(hold: Hold, credentials: Credentials, tmp_path: Path) -> None:
    data = noise(100_000)

    async def trickle(request: web.Request, data: bytes) -> web.StreamResponse:
        response = web.StreamResponse(status=206, headers={"Content-Length": str(len(data))})
        await response.prepare(request)
        for place in range(len(data)):
            await response.write(data[place : place + 1])
            await asyncio.sleep(0.02)
        return response

    holder = await hold(data, spoil=trickle)
    timings = Timings(connect_seconds=0.2, idle_seconds=0.2, slowest_bytes_per_second=1e6, rest_seconds=0.01)
    async with Downloader(BlobStore(tmp_path / "slow", 1 << 30), credentials, timings) as downloader:
        began = time.monotonic()
        with pytest.raises(Unavailable, match="slower than 1e\\+06 bytes a second"):
            await downloader.fetch(ref_of(data, holder.url))
        assert time.monotonic() - began < 10


@BOTH
@pytest.mark.parametrize("fault", [freeze, break_off])
async def test_a_bad_holder_does_not_hold_up_a_good_one(
    hold: Hold, downloader: Downloader, fault: Misbehaviour
) -> None:
    data = noise(4 * CHUNK_BYTES)
    bad, good = await hold(data, spoil=fault), await hold(data)
    began = time.monotonic()
    path = await downloader.fetch(ref_of(data, bad.url, good.url))
    assert path.read_bytes() == data
    assert time.monotonic() - began < 5


@BOTH
async def test_a_slow_holder_is_overtaken_at_the_end(hold: Hold, credentials: Credentials, tmp_path: Path) -> None:
    data = noise(2 * CHUNK_BYTES)
    slow, good = await hold(data, spoil=freeze), await hold(data)
    timings = Timings(idle_seconds=30, hedge_seconds=0.2)  # the slow holder is not given up, only overtaken
    async with Downloader(BlobStore(tmp_path / "here", 1 << 30), credentials, timings) as downloader:
        began = time.monotonic()
        await downloader.fetch(ref_of(data, slow.url, good.url))
        assert time.monotonic() - began < 10
    assert slow.asked


@BOTH
async def test_a_short_failure_is_forgiven(hold: Hold, downloader: Downloader) -> None:
    data = noise(1000)
    failures = iter([web.Response(status=503), web.Response(status=500)])

    async def busy(request: web.Request, data: bytes) -> web.StreamResponse | None:
        return next(failures, None)

    holder = await hold(data, spoil=busy)
    assert (await downloader.fetch(ref_of(data, holder.url))).read_bytes() == data


@BOTH
async def test_a_server_without_range_will_do(hold: Hold, downloader: Downloader) -> None:
    data = noise(2 * CHUNK_BYTES + 5)

    async def whole(request: web.Request, data: bytes) -> web.StreamResponse:
        return web.Response(body=data)

    holder = await hold(data, spoil=whole)
    assert (await downloader.fetch(ref_of(data, holder.url))).read_bytes() == data


@BOTH
async def test_a_wrong_size_is_said(hold: Hold, downloader: Downloader) -> None:
    holder = await hold(b"soup")
    ref = BlobRef(sha256=sha(b"soup"), size=3, holders=(holder.url,))
    with pytest.raises(Unavailable, match="has it with 4 bytes instead of 3"):
        await downloader.fetch(ref)


async def test_an_empty_blob_has_only_one_hash(hold: Hold, downloader: Downloader) -> None:
    assert (await downloader.fetch(ref_of(b""))).read_bytes() == b""
    holder = await hold(b"soup")
    async with asyncio.timeout(5):
        with pytest.raises(CorruptBlob, match=f"no blob of 0 bytes has the hash {sha(b'soup')}"):
            await downloader.fetch(BlobRef(sha256=sha(b"soup"), size=0, holders=(holder.url,)))
    assert leftovers(store_of(downloader)) == []


async def test_what_does_not_fit_is_not_fetched(hold: Hold, tmp_path: Path) -> None:
    data = noise(2000)
    holder = await hold(data)
    async with Downloader(BlobStore(tmp_path / "small", 1000), Credentials(), QUICK) as downloader:
        with pytest.raises(DiskFull):
            await downloader.fetch(ref_of(data, holder.url))
    assert holder.asked == []


# --- files that change on the disk --------------------------------------------------------------------------------------


async def test_a_changed_file_is_fetched_again(hold: Hold, downloader: Downloader) -> None:
    data = noise(5000)
    holder = await hold(data)
    path = await downloader.fetch(ref_of(data, holder.url))
    tamper(path)
    found = await asyncio.gather(*(downloader.fetch(ref_of(data, holder.url)) for _ in range(5)))
    assert [one.read_bytes() for one in found] == [data] * 5
    assert len(holder.asked) == 2


async def test_a_changed_file_is_not_served(hold: Hold, downloader: Downloader) -> None:
    data, other = noise(5000), noise(5000, 1)
    bad, good = await hold(data, other), await hold(data)
    tamper(bad.store.folder / sha(data))
    async with aiohttp.ClientSession() as http:
        async with http.head(f"{bad.url}/blobs/{sha(data)}") as answer:
            assert answer.status == 404
        async with http.get(f"{bad.url}/blobs/{sha(other)}") as answer:
            assert await answer.read() == other
    assert not bad.store.has(sha(data))
    assert (await downloader.fetch(ref_of(data, bad.url, good.url))).read_bytes() == data
    assert not downloader._is_distrusted(bad.url)


async def test_a_changed_file_is_taken_again(hold: Hold, downloader: Downloader) -> None:
    data = noise(5000)
    holder = await hold(data)
    for expect in (True, False):
        tamper(holder.store.folder / sha(data))
        async with (
            aiohttp.ClientSession() as http,
            http.put(f"{holder.url}/blobs/{sha(data)}", data=data, expect100=expect) as answer,
        ):
            assert answer.status == 201
        assert holder.store.read(sha(data)) == data


# --- liars ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [1, 5])
@pytest.mark.parametrize("liars", [1, 3])
async def test_liars_are_found_and_an_honest_holder_suffices(
    hold: Hold, downloader: Downloader, chunks: int, liars: int
) -> None:
    data = noise(chunks * CHUNK_BYTES)
    bad = [await hold(data, spoil=lie) for _ in range(liars)]
    good = await hold(data)
    path = await downloader.fetch(ref_of(data, *[holder.url for holder in bad], good.url))
    assert path.read_bytes() == data
    assert leftovers(store_of(downloader)) == []


async def test_a_known_liar_is_asked_last(hold: Hold, downloader: Downloader) -> None:
    one, two = noise(1000, 1), noise(1000, 2)
    liar = await hold(one, spoil=lie)
    good = await hold(one, two)
    while not liar.asked:  # the first holder is chosen at random
        store_of(downloader).delete(sha(one))
        await downloader.fetch(ref_of(one, liar.url, good.url))
    liar.asked.clear()
    for _ in range(5):
        store_of(downloader).delete(sha(two))
        await downloader.fetch(ref_of(two, liar.url, good.url))
    assert liar.asked == []


async def test_only_liars(hold: Hold, downloader: Downloader) -> None:
    data = noise(3 * CHUNK_BYTES)
    bad = [await hold(data, spoil=lie) for _ in range(2)]
    without = await hold()
    with pytest.raises(CorruptBlob) as caught:
        await downloader.fetch(ref_of(data, *[holder.url for holder in bad], without.url))
    for holder in bad:
        assert f"{holder.url}: sent other bytes" in caught.value.message
    assert f"{without.url}: answered 404" in caught.value.message
    assert not store_of(downloader).has(sha(data))


# --- kills and resumption ---------------------------------------------------------------------------------------------

SLOW_HOLDER = """
import asyncio, sys
from aiohttp import web
data = open(sys.argv[1], "rb").read()

async def get(request):
    r = request.http_range
    part = data[r.start : r.stop]
    response = web.StreamResponse(status=206, headers={"Content-Length": str(len(part))})
    await response.prepare(request)
    for start in range(0, len(part), 65536):
        await response.write(part[start : start + 65536])
        await asyncio.sleep(0.005)
    return response

async def main():
    app = web.Application()
    app.add_routes([web.get("/blobs/{sha256}", get)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(site._server.sockets[0].getsockname()[1], flush=True)
    await asyncio.sleep(120)

asyncio.run(main())
"""


async def slow_process(file: Path) -> tuple[asyncio.subprocess.Process, str]:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", SLOW_HOLDER, str(file), stdout=subprocess.PIPE)
    assert process.stdout is not None
    port = int(await asyncio.wait_for(process.stdout.readline(), 30))
    return process, f"http://127.0.0.1:{port}"


def chunks_here(store: BlobStore, ref: BlobRef) -> int:
    notes = store.folder / f"part-{ref.sha256}.chunks"
    return notes.stat().st_size // 4 if notes.exists() else 0


async def test_a_holder_killed_in_the_middle_is_replaced(hold: Hold, downloader: Downloader, tmp_path: Path) -> None:
    data = noise(12 * CHUNK_BYTES)
    file = tmp_path / "data"
    file.write_bytes(data)
    good = await hold(data)
    process, url = await slow_process(file)
    ref = ref_of(data, url)
    fetching = asyncio.create_task(downloader.fetch(ref))
    await eventually(lambda: chunks_here(store_of(downloader), ref) >= 2)
    joined = asyncio.create_task(downloader.fetch(ref_of(data, good.url)))
    await asyncio.sleep(0)
    process.kill()
    await process.wait()
    assert (await fetching).read_bytes() == data
    await joined
    assert len(good.asked) < 12


async def test_a_download_is_resumed_after_its_only_holder_died(
    hold: Hold, downloader: Downloader, tmp_path: Path
) -> None:
    data = noise(12 * CHUNK_BYTES)
    file = tmp_path / "data"
    file.write_bytes(data)
    process, url = await slow_process(file)
    ref = ref_of(data, url)
    fetching = asyncio.create_task(downloader.fetch(ref))
    await eventually(lambda: chunks_here(store_of(downloader), ref) >= 3)
    process.kill()
    await process.wait()
    with pytest.raises(Unavailable, match="nothing listens there"):
        await fetching
    here = chunks_here(store_of(downloader), ref)
    good = await hold(data)
    assert (await downloader.fetch(ref_of(data, good.url))).read_bytes() == data
    assert len(good.asked) == 12 - here
    assert leftovers(store_of(downloader)) == []


async def test_a_download_is_resumed_after_the_downloader_was_killed(hold: Hold, tmp_path: Path) -> None:
    data = noise(12 * CHUNK_BYTES)
    file = tmp_path / "data"
    file.write_bytes(data)
    holder, url = await slow_process(file)
    code = f"""
import asyncio, pathlib
from potluck.blobs.download import Downloader
from potluck.blobs.store import BlobStore
from potluck.credentials import Credentials
from potluck.wire.values import BlobRef
async def main():
    async with Downloader(BlobStore(pathlib.Path({str(tmp_path / "here")!r}), 1 << 30), Credentials()) as downloader:
        await downloader.fetch(BlobRef(sha256={sha(data)!r}, size={len(data)}, holders=({url!r},)))
asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    notes = tmp_path / "here" / f"part-{sha(data)}.chunks"
    await eventually(lambda: notes.exists() and notes.stat().st_size >= 12, 30)
    process.send_signal(signal.SIGKILL)
    await process.wait()
    holder.kill()
    await holder.wait()
    here = notes.stat().st_size // 4
    good = await hold(data)
    async with Downloader(BlobStore(tmp_path / "here", 1 << 30), Credentials(), QUICK) as downloader:
        assert (await downloader.fetch(ref_of(data, good.url))).read_bytes() == data
    assert 0 < len(good.asked) == 12 - here


async def test_a_damaged_leftover_blames_nobody(hold: Hold, downloader: Downloader) -> None:
    data = noise(3 * CHUNK_BYTES)
    ref = ref_of(data)
    with store_of(downloader).partial(ref, CHUNK_BYTES) as partial:
        partial.write(1, bytes(CHUNK_BYTES))
    good = await hold(data)
    assert (await downloader.fetch(ref_of(data, good.url))).read_bytes() == data
    assert len(good.asked) == 2 + 3


# --- push -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 10, 5_000_000])
async def test_push_of_bytes_and_files(hold: Hold, downloader: Downloader, tmp_path: Path, size: int) -> None:
    holder = await hold()
    for number, make in enumerate((lambda data: data, lambda data: _written(tmp_path / "model", data))):
        data = noise(size, number + 1)
        assert await downloader.push(make(data), (holder.url,)) == ref_of(data, holder.url)
        assert holder.store.read(sha(data)) == data
    assert os.listdir(store_of(downloader).folder) == []  # noqa: PTH208


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


async def test_push_of_a_blob_of_ours(hold: Hold, downloader: Downloader) -> None:
    holder = await hold()
    ref = store_of(downloader).put_bytes(b"soup")
    await downloader.push(store_of(downloader).path(ref.sha256), (holder.url,))
    assert holder.store.read(ref.sha256) == b"soup"


@pytest.mark.parametrize(("status", "error"), [(401, NotAuthenticated), (403, NotAllowed)])
async def test_push_that_may_not_be_names_the_role_and_no_hash(
    downloader: Downloader, status: int, error: type[PotluckError]
) -> None:
    async def refuse(request: web.Request) -> web.Response:
        told = {"error": f"PUT {request.path} needs the role 'user', and client:eve is a viewer"}
        return web.json_response(told, status=status if request.method == "PUT" else 404)

    app = web.Application()
    app.router.add_route("*", "/{any:.*}", refuse)
    async with TestServer(app) as server:
        with pytest.raises(error, match="needs the role 'user', and client:eve is a viewer") as caught:
            await downloader.push(b"soup", (f"http://127.0.0.1:{server.port}",))
    assert status == 401 or sha(b"soup") not in caught.value.message


async def test_push_sends_nothing_that_is_there(hold: Hold, downloader: Downloader) -> None:
    data = noise(900_000)
    holder = await hold(data)
    before = (holder.store.folder / sha(data)).stat().st_ino
    assert (await downloader.push(data, (holder.url,))).holders == (holder.url,)
    assert (holder.store.folder / sha(data)).stat().st_ino == before
    assert holder.asked  # only HEAD


async def test_push_tries_each_address(hold: Hold, downloader: Downloader) -> None:
    holder = await hold()
    with socket.create_server(("127.0.0.1", 0)) as sock:
        closed = f"http://127.0.0.1:{sock.getsockname()[1]}"
    assert (await downloader.push(b"soup", (closed, holder.url))).holders == (holder.url,)
    with pytest.raises(Unavailable, match=f"could not be sent: {closed}: nothing listens there"):
        await downloader.push(b"soup", (closed,))
    with pytest.raises(Unavailable, match="no address"):
        await downloader.push(b"soup", ())


async def test_push_that_is_refused_says_why(hold: Hold, downloader: Downloader, tmp_path: Path) -> None:
    holder, small = await hold(), await hold(limit=1000)
    with pytest.raises(TooLarge, match=str(MAX_BYTES)):
        await downloader.push(bytes(MAX_BYTES + 1), (holder.url,))
    for size in (2000, 2_000_000):
        with pytest.raises(DiskFull, match="does not fit"):
            await downloader.push(noise(size), (small.url,))
    with pytest.raises(InvalidRequest, match="cannot be read: No such file"):
        await downloader.push(tmp_path / "missing", (holder.url,))


async def test_push_forgives_a_short_failure(downloader: Downloader) -> None:
    got: list[bytes] = []
    statuses = iter([500, 503, 201])

    async def put(request: web.Request) -> web.Response:
        got.append(await request.read())
        return web.Response(status=next(statuses), text=json.dumps({"error": "not now"}))

    sock = socket.create_server(("127.0.0.1", 0))
    async with serve_http(sock, [web.put("/blobs/{sha256}", put)], Credentials()):
        await downloader.push(b"soup", (f"http://127.0.0.1:{sock.getsockname()[1]}",))
    assert got == [b"soup"] * 3


async def test_what_was_pushed_can_be_fetched(hold: Hold, downloader: Downloader, tmp_path: Path) -> None:
    data = noise(40 << 20)
    holder = await hold()
    await downloader.push(_written(tmp_path / "model", data), (holder.url,))
    async with Downloader(BlobStore(tmp_path / "other", 1 << 30), Credentials(), QUICK) as other:
        path = await other.fetch(ref_of(data, holder.url))
    assert sha(path.read_bytes()) == sha(data)


def test_the_package_needs_no_numpy() -> None:
    code = "import sys, potluck.blobs.download, potluck.blobs.server; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"
