"""`POST /inputs` of a node: what it takes, what it refuses, and that nothing stays."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os
import socket
import threading
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import pytest
from msgspec.structs import replace

from node import inputs as inputs_module
from node.inputs import TIMINGS, Inputs
from potluck.blobs import download, server
from potluck.blobs.download import Downloader
from potluck.blobs.rights import OPEN
from potluck.blobs.store import BlobStore, NewFile, is_made_up, made_up_name
from potluck.credentials import Credentials
from potluck.errors import InputsLost, PotluckError, Unavailable
from potluck.net.http import serve_http
from potluck.wire.values import BlobRef
from support.eventually import eventually

LIMIT_BYTES = 3_000_000


class Taker:
    """A node's HTTP server, as far as it concerns inputs."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.refusal: PotluckError | None = None
        self.url = ""

    def left(self) -> list[str]:
        return sorted(path.name for path in self.inputs.store.folder.iterdir())


@pytest.fixture
async def taker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Taker]:
    monkeypatch.setattr(inputs_module, "INPUT_BLOB_LIMIT_BYTES", LIMIT_BYTES)
    async with AsyncExitStack() as stack:
        found = Taker(await stack.enter_async_context(Inputs(tmp_path / "inputs", Credentials(), kept_seconds=0.4)))
        sock = socket.create_server(("127.0.0.1", 0))
        found.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        routes = server.routes(
            BlobStore(tmp_path / "blobs", 1 << 30), found.inputs.store, writable=False, max_bytes=0, rights=OPEN
        )
        await stack.enter_async_context(
            serve_http(sock, [*routes, *found.inputs.routes(lambda: found.refusal, OPEN)], Credentials())
        )
        yield found


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Downloader]:
    async with Downloader(BlobStore(tmp_path / "client", 1 << 30), Credentials()) as found:
        yield found


@pytest.mark.parametrize("size", [0, 10, LIMIT_BYTES])
async def test_the_node_names_inputs_and_drops_them_after_their_batch(
    taker: Taker, client: Downloader, size: int
) -> None:
    data = os.urandom(size)
    ref, again = [await client.send_inputs(data, taker.url, 1.0) for _ in range(2)]
    assert ref == BlobRef(sha256=ref.sha256, size=size, holders=(taker.url,))
    assert is_made_up(ref.sha256)
    assert again.sha256 != ref.sha256
    path = await taker.inputs.fetch(ref)
    assert path.read_bytes() == data
    assert not taker.inputs.store.delete(ref.sha256)  # a batch needs it
    taker.inputs.done([path], answered=True)
    assert taker.left() == [again.sha256]


async def test_a_disk_that_is_slow_gets_them_from_a_thread(
    taker: Taker, client: Downloader, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[int] = set()
    write = NewFile.write

    def slow(file: NewFile, data: bytes) -> None:
        threads.add(threading.get_ident())
        time.sleep(0.11)
        write(file, data)

    monkeypatch.setattr(NewFile, "write", slow)
    data = os.urandom(LIMIT_BYTES)
    ref = await client.send_inputs(data, taker.url, 1.0)
    assert (await taker.inputs.fetch(ref)).read_bytes() == data
    assert threads - {threading.get_ident()}


async def test_another_node_fetches_them_by_their_hash(taker: Taker, client: Downloader, tmp_path: Path) -> None:
    data = os.urandom(LIMIT_BYTES)
    ref = await client.send_inputs(data, taker.url, 1.0)
    async with Inputs(tmp_path / "others", Credentials()) as others:
        path = await others.fetch(ref)
        assert path.read_bytes() == data
        assert path.name == hashlib.sha256(data).hexdigest()
        assert taker.left() == sorted([ref.sha256, path.name])
        with pytest.raises(Unavailable, match=f"has {LIMIT_BYTES} bytes instead of 5"):
            await others.fetch(replace(ref, size=5))
        others.done([path], answered=True)
        taker.inputs.done([await taker.inputs.fetch(ref)], answered=True)
        with pytest.raises(Unavailable, match="these inputs are not here"):
            await others.fetch(ref)
        assert list(others.store.folder.iterdir()) == []


async def test_a_holder_that_does_not_answer_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sooner than the coordinator takes the replica for silent, which is after 10 s."""
    monkeypatch.setattr(download, "_INPUTS_SECONDS", 0.3)
    monkeypatch.setattr(inputs_module, "TIMINGS", dataclasses.replace(inputs_module.TIMINGS, idle_seconds=0.2))
    with socket.create_server(("127.0.0.1", 0)) as hung:  # the kernel takes connections; nobody reads
        url = f"http://127.0.0.1:{hung.getsockname()[1]}"
        made_up, hashed = [BlobRef(sha256=name, size=9, holders=(url,)) for name in (made_up_name(), "1" * 64)]
        async with Inputs(tmp_path / "others", Credentials()) as others:
            async with asyncio.timeout(5):
                found = await others.fetch_all([made_up, hashed])
    assert {type(one) for one in found.values()} == {InputsLost}
    assert "it was silent for 0.3 s" in str(found[made_up.sha256])
    assert "no byte came for 0.2 s" in str(found[hashed.sha256])
    assert (TIMINGS.idle_seconds + TIMINGS.connect_seconds) * TIMINGS.failures_limit < 10


async def test_a_batch_that_was_not_answered_leaves_them_to_others(taker: Taker, client: Downloader) -> None:
    ref = await client.send_inputs(b"soup", taker.url, 1.0)
    taker.inputs.done([await taker.inputs.fetch(ref)], answered=False)
    assert taker.left() == [ref.sha256]


async def test_blobs_of_others_are_fetched_once_for_all_that_need_them(taker: Taker, tmp_path: Path) -> None:
    ref = replace(taker.inputs.store.put_bytes(b"soup"), holders=(taker.url,))
    async with Inputs(tmp_path / "others", Credentials()) as others:
        one, other = await asyncio.gather(others.fetch(ref), others.fetch(ref))
        others.done([one], answered=True)
        assert other.read_bytes() == b"soup"
        others.done([other], answered=True)
        assert list(others.store.folder.iterdir()) == []


async def test_inputs_without_a_batch_are_swept_after_a_while(taker: Taker, client: Downloader) -> None:
    used, unused = [await client.send_inputs(data, taker.url, 1.0) for data in (b"soup", b"bread")]
    (taker.inputs.store.folder / "new-broken-off").write_bytes(b"half")
    path = await taker.inputs.fetch(used)
    sweeping = asyncio.create_task(taker.inputs.run(), name="inputs")
    await eventually(lambda: taker.left() == [used.sha256])
    taker.inputs.done([path], answered=False)
    await eventually(lambda: taker.left() == [])
    sweeping.cancel()
    await asyncio.wait([sweeping])
    assert unused.sha256 != used.sha256


async def test_nothing_is_left_of_a_process_that_was_killed(tmp_path: Path) -> None:
    Inputs(tmp_path / "inputs", Credentials()).store.put_bytes(b"soup")
    assert Inputs(tmp_path / "inputs", Credentials()).store.size_bytes == 0
    assert list((tmp_path / "inputs").iterdir()) == []


async def test_what_is_refused_is_not_kept(taker: Taker, client: Downloader) -> None:
    with pytest.raises(Unavailable, match=f"a blob may have {LIMIT_BYTES} bytes here"):
        await client.send_inputs(bytes(LIMIT_BYTES + 1), taker.url, 1.0)
    async with aiohttp.ClientSession() as session:

        async def chunked() -> AsyncIterator[bytes]:
            for _ in range(4):
                yield bytes(1_000_000)

        octets = {"Content-Type": "application/octet-stream"}
        async with session.post(f"{taker.url}/inputs", data=chunked(), headers=octets) as response:
            assert response.status == 413  # its size was not said before
        async with session.post(
            f"{taker.url}/inputs", data=b"soup", headers=octets | {"Potluck-Caller": "ann"}
        ) as response:
            assert response.status == 400  # which is no identity
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):  # a page in a browser
            async with session.post(f"{taker.url}/inputs", data=b"soup", headers={"Content-Type": kind}) as response:
                assert response.status == 415
        async with session.put(f"{taker.url}/blobs/{'0' * 64}", data=b"soup") as response:
            assert response.status == 405
    taker.refusal = Unavailable("this node has no replica")
    with pytest.raises(Unavailable, match="took no inputs: this node has no replica"):
        await client.send_inputs(b"soup", taker.url, 1.0)
    assert taker.left() == []


async def test_one_address_leaves_room_for_the_inputs_of_others(taker: Taker, client: Downloader) -> None:
    port = int(taker.url.rpartition(":")[2])
    head = b"POST /inputs HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\nContent-Length: 9\r\n\r\n"
    crowd = []
    for _ in range(server._UPLOADS_EACH):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head + b"slow")
        crowd.append((reader, writer))
    await eventually(lambda: len(taker.left()) == server._UPLOADS_EACH)
    with pytest.raises(Unavailable, match=f"{server._UPLOADS_EACH} uploads of yours are under way"):
        await client.send_inputs(b"soup", taker.url, 1.0)
    _, other = await asyncio.open_connection("127.0.0.1", port, local_addr=("127.0.0.2", 0))
    other.write(head + b"all of it")
    await eventually(lambda: len(taker.left()) == server._UPLOADS_EACH + 1)
    for reader, writer in crowd:
        writer.write(b" ends")
        assert b"201 Created" in await reader.readline()
        writer.close()
    other.close()
    assert (await client.send_inputs(b"soup", taker.url, 1.0)).size == 4


async def test_an_upload_that_breaks_off_leaves_nothing(taker: Taker) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(taker.url.rpartition(":")[2]))
    head = (
        "POST /inputs HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\nContent-Length: 2000000\r\n\r\n"
    )
    writer.write(head.encode() + bytes(1_500_000))
    await writer.drain()
    await eventually(lambda: taker.left() != [])
    writer.close()
    await writer.wait_closed()
    await eventually(lambda: taker.left() == [])
    assert await reader.read() == b""


async def test_an_older_node_and_an_unreachable_one_are_told_apart(client: Downloader, tmp_path: Path) -> None:
    """An older node, and an address where nothing listens."""
    sock = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    routes = server.routes(BlobStore(tmp_path / "blobs", 1 << 30), writable=False, max_bytes=0, rights=OPEN)
    async with serve_http(sock, routes, Credentials()):
        with pytest.raises(Unavailable, match="404 Not Found"):
            await client.send_inputs(bytes(5_000_000), url, 1.0)
    with pytest.raises(Unavailable, match="nothing listens there"):
        await client.send_inputs(b"soup", url, 1.0)
