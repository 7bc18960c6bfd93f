"""The gateway over a real socket, in front of a Serving with scripted nodes."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from msgspec.structs import replace

from coordinator.control import Control
from coordinator.copies.locations import Holders
from coordinator.events.stream import Events
from coordinator.gateway import routes as gateway
from coordinator.gateway.answers import in_words
from coordinator.gateway.shelf import Shelf
from potluck.blobs import server as blob_server
from potluck.blobs.download import Downloader
from potluck.blobs.rights import OPEN
from potluck.blobs.store import BlobStore
from potluck.credentials import Credentials
from potluck.net.http import serve_http
from potluck.wire.values import BlobRef, Signature
from support.serving_lab import Lab

Deploy = Callable[..., Awaitable[None]]
LIMIT_BYTES = 4 * 2**20
"""The limit of bodies in these tests."""


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as opened:
        yield opened


@pytest.fixture
async def lab(tmp_path: Path, stack: AsyncExitStack) -> Lab:
    made = Lab(tmp_path)
    made.settings = replace(made.settings, http_body_limit_bytes=LIMIT_BYTES)
    await made.open(stack)
    return made


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    """The coordinator's store."""
    return BlobStore(tmp_path / "blobs", 2**30)


@pytest.fixture
def events(lab: Lab) -> Events:
    return Events(lab.journal, lambda job_id: None)


@pytest.fixture
def control(lab: Lab, store: BlobStore, events: Events) -> Control:
    """Answers the gateway's questions that are no inferences; there are no jobs."""
    nothing: Any = None

    async def sync() -> None:
        """Nothing waits to be written to the disk."""

    return Control(
        dispatcher=nothing, registry=lab.registry, serving=lab.serving, membership=lab.membership, deletion=nothing, packed=nothing,
        holders=Holders(lab.membership, tuple), store=store, urls=tuple, sync=sync, events=events,
    )  # fmt: skip


@pytest.fixture
async def http(
    lab: Lab, store: BlobStore, control: Control, stack: AsyncExitStack
) -> tuple[str, aiohttp.ClientSession]:
    """The gateway's address and a client's session; the model `m` is deployed on node `a`."""
    await lab.join(stack, "a")
    lab.add_model()
    await lab.deploy("m", 1)
    sock = socket.create_server(("127.0.0.1", 0))
    base = f"http://127.0.0.1:{sock.getsockname()[1]}"
    downloader = await stack.enter_async_context(Downloader(store, Credentials()))
    shelf = Shelf(store, downloader, lambda: (base,), LIMIT_BYTES)
    routes = [
        *blob_server.routes(store, writable=True, max_bytes=LIMIT_BYTES, rights=OPEN),
        *gateway.routes(control, lab.serving, lab.inference, lab.membership, lab.settings, shelf, lab.bus),
    ]
    await stack.enter_async_context(serve_http(sock, routes, Credentials(), (in_words,)))
    session = await stack.enter_async_context(aiohttp.ClientSession())
    return base, session


@pytest.fixture
def deploy(lab: Lab) -> Deploy:
    """Deploys another model on node `a`, with its own signature."""

    async def deployed(name: str, signature: Signature, **options: Any) -> None:
        lab.nodes["a"].signature = signature
        lab.registry.add_model(
            name, BlobRef(sha256=hashlib.sha256(name.encode()).hexdigest(), size=1), now=1.0, **options
        )
        await lab.deploy(name, 1)

    return deployed
