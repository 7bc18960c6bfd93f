"""Who asks over HTTP is who the certificate of the connection names, and nobody else."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
from aiohttp import web

from potluck.credentials import Credentials
from potluck.net.http import serve_http
from potluck.net.peers import asker, identity_of, is_secured
from potluck.security import certificates, contexts
from potluck.wire.identities import CALLER_HEADER
from support.closed import Authority


@asynccontextmanager
async def server(credentials: Credentials) -> AsyncIterator[str]:
    """The address of a server that says who asks, and whether the connection is secured."""

    async def say(request: web.Request) -> web.Response:
        return web.json_response([asker(request), is_secured(request.transport)])

    sock = socket.create_server(("127.0.0.1", 0))
    async with serve_http(sock, [web.get("/", say)], credentials):
        yield f"{credentials.scheme}://127.0.0.1:{sock.getsockname()[1]}/"


async def said(url: str, context: ssl.SSLContext | None) -> list[object]:
    headers = {CALLER_HEADER: "client:mallory"}
    tls = True if context is None else context
    async with aiohttp.ClientSession() as session, session.get(url, ssl=tls, headers=headers) as answer:
        found: list[object] = await answer.json()
        return found


async def test_the_certificate_names_who_asks(tmp_path: Path) -> None:
    authority = Authority()
    authority.member(tmp_path / "c", "coordinator", certificates.coordinator_profile("attic"))
    authority.member(tmp_path / "a", "client", certificates.client_profile("ann", "user"))
    Authority("other").member(tmp_path / "m", "client", certificates.client_profile("ann", "user"))
    async with server(Credentials.load(tmp_path / "c", "coordinator")) as url:
        ann = contexts.client_context(tmp_path / "a", "client", certificates.COORDINATOR)
        assert await said(url, ann) == ["client:ann", True]
        assert await said(url, contexts.trusting(authority.ca, certificates.COORDINATOR)) == ["", True]
        forged = contexts.trusting(authority.ca, certificates.COORDINATOR)
        forged.load_cert_chain(tmp_path / "m" / "client.pem")
        with pytest.raises(aiohttp.ClientError):
            await said(url, forged)


async def test_a_connection_proves_nothing_after_its_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority()
    authority.member(tmp_path / "c", "coordinator", certificates.coordinator_profile("attic"))
    authority.member(tmp_path / "a", "client", certificates.client_profile("ann", "user"))
    ann = contexts.client_context(tmp_path / "a", "client", certificates.COORDINATOR)
    async with (
        server(Credentials.load(tmp_path / "c", "coordinator")) as url,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=ann, limit=1)) as session,
    ):

        async def asked() -> tuple[object, bool]:
            """Who asks, and whether the connection is kept."""
            async with session.get(url) as answer:
                return (await answer.json())[0], "close" not in answer.headers.get("Connection", "")

        def later(seconds: float) -> None:
            clock = SimpleNamespace(time=lambda: time.time() + seconds)
            for module in ("peers", "http"):
                monkeypatch.setattr(f"potluck.net.{module}.time", clock)

        assert await asked() == ("client:ann", True)
        later(7 * 86400 + 10)
        assert await asked() == ("", False)
        later(0)
        assert await asked() == ("client:ann", True)
        later(7 * 86400 - 60)
        assert await asked() == ("client:ann", False), "so the next connection shows the renewed one"


async def test_nobody_is_known_without_tls() -> None:
    async with server(Credentials()) as url:
        assert await said(url, None) == ["", False]


@pytest.mark.parametrize(
    "subject",
    [
        (),
        ((("commonName", "ann"),),),
        ((("commonName", "client:ann\n"),),),
        ((("organizationName", "client:ann"),),),
        ((("commonName", "client:ann"),), (("commonName", "client:bob"),)),
        ((("commonName", "client:ann"), ("commonName", "client:bob")),),
    ],
)
def test_a_name_that_is_no_identity_is_nobody(subject: tuple[object, ...]) -> None:
    assert identity_of({"subject": subject}) == ""
