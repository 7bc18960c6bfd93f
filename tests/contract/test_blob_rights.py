"""Who may get and put blobs in a closed cluster, over real TLS: what is refused looks like what is not there."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from potluck.blobs import server
from potluck.blobs.rights import OPEN, AtANode, Rights
from potluck.blobs.store import BlobStore
from potluck.credentials import Credentials
from potluck.errors import DiskFull
from potluck.net.http import serve_http
from potluck.net.http_client import session
from potluck.security import certificates
from potluck.wire.addresses import address
from support.closed import Authority

HERE = "127.0.0.1"
MAX_BYTES = 2**20


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Credentials of members, by identity."""
    ours, where = Authority(), tmp_path_factory.mktemp("members")
    profiles = [
        certificates.node_profile("n1"),
        certificates.coordinator_profile("attic"),
        certificates.client_profile("ann", "user"),
        certificates.client_profile("bob", "user"),
    ]
    return {
        profile.identity: ours.member(where / profile.identity, profile.identity.partition(":")[0], profile)
        for profile in profiles
    }


def credentials(folders: dict[str, Path], identity: str) -> Credentials:
    role = identity.partition(":")[0]
    return Credentials.load(folders[identity], role)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Served:
    """A server with these rights. `of` gives a session of a member."""

    store: BlobStore
    url: str
    of: Callable[[str], Awaitable[aiohttp.ClientSession]]

    async def get(self, identity: str, sha256: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
        http = await self.of(identity)
        async with http.get(f"{self.url}/blobs/{sha256}", headers=headers) as answer:
            kept = {key: value for key, value in answer.headers.items() if key != "Date"}
            return answer.status, await answer.read(), kept

    async def put(self, identity: str, data: bytes, **options: bool) -> tuple[int, str]:
        http = await self.of(identity)
        async with http.put(f"{self.url}/blobs/{sha(data)}", data=data, **options) as answer:  # type: ignore[arg-type]
            return answer.status, await answer.text()


Serve = Callable[..., Awaitable[Served]]


@pytest.fixture
async def serve(tmp_path: Path, folders: dict[str, Path]) -> AsyncIterator[Serve]:
    async with AsyncExitStack() as stack:
        sessions: dict[str, aiohttp.ClientSession] = {}

        async def of(identity: str) -> aiohttp.ClientSession:
            if identity not in sessions:
                made = session(credentials(folders, identity), connect_seconds=5, idle_seconds=5)
                sessions[identity] = await stack.enter_async_context(made)
            return sessions[identity]

        async def started(rights: Rights, *, limit: int = 2**30, quota: int = 0) -> Served:
            store = BlobStore(tmp_path / "held", limit, quota_bytes=quota)
            sock = socket.create_server((HERE, 0))
            url = address(HERE, sock.getsockname()[1], "https")
            routes = server.routes(store, writable=True, max_bytes=MAX_BYTES, rights=rights)
            routes += server.inputs_routes(store, max_bytes=MAX_BYTES, refusal=lambda: None, rights=rights)
            await stack.enter_async_context(serve_http(sock, routes, credentials(folders, "coordinator:attic")))
            return Served(store, url, of)

        yield started


@dataclass(frozen=True)
class Named:
    """Rules as the coordinator's: nodes get all, clients what is named; everyone may put."""

    known: tuple[str, ...] = ()

    def allowed(self, identity: str, sha256: str) -> bool:
        return not identity.startswith("client:") or sha256 in self.known

    def may_put(self, identity: str, size: int) -> bool:
        return True


class Small(Named):
    """Only Ann may put, and no more than 8 bytes at a time."""

    def may_put(self, identity: str, size: int) -> bool:
        return identity == "client:ann" and size < 9


async def test_what_is_refused_looks_like_what_is_not_there(serve: Serve) -> None:
    served = await serve(Named((sha(b"soup"),)))
    for data in (b"soup", b"secret"):
        served.store.put_bytes(data)
    secret, missing = sha(b"secret"), sha(b"missing")
    assert (await served.get("client:ann", sha(b"soup")))[:2] == (200, b"soup")
    assert (await served.get("node:n1", secret))[:2] == (200, b"secret")
    for headers in ({}, {"Range": "bytes=0-1"}, {"If-None-Match": "*"}):
        refused = await served.get("client:ann", secret, **headers)
        nothing = await served.get("client:ann", missing, **headers)
        assert refused[0] == nothing[0] == 404
        assert refused[1].replace(secret[:12].encode(), b"") == nothing[1].replace(missing[:12].encode(), b"")
        assert refused[2] == nothing[2]
    http = await served.of("client:ann")
    for sha256 in (secret, missing):
        async with http.head(f"{served.url}/blobs/{sha256}") as answer:
            assert answer.status == 404


async def test_to_send_a_blob_does_not_tell_that_it_was_here(serve: Serve) -> None:
    served = await serve(Named())
    served.store.put_bytes(b"secret")
    answers = [await served.put("client:ann", data, expect100=True) for data in (b"secret", b"missing")]
    assert answers == [(201, "")] * 2
    assert served.store.read(sha(b"secret")) == b"secret"
    assert await served.put("node:n1", b"secret") == (200, "")


async def test_a_name_in_a_header_is_no_identity_over_tls(serve: Serve) -> None:
    served = await serve(Named())
    served.store.put_bytes(b"secret")
    headers = {"Potluck-Caller": "node:n1"}
    assert (await served.get("client:ann", sha(b"secret"), **headers))[0] == 404


async def test_who_may_put(serve: Serve) -> None:
    served = await serve(Small())
    assert (await served.put("client:ann", b"soup"))[0] == 201
    for identity, data in (("client:bob", b"bread"), ("client:ann", b"too much of it")):
        for expect in (False, True):
            assert (await served.put(identity, data, expect100=expect))[0] == 403
        http = await served.of(identity)
        as_bytes = {"Content-Type": "application/octet-stream"}
        async with http.post(f"{served.url}/inputs", data=data, headers=as_bytes) as answer:
            assert answer.status == 403
    assert [path.name for path in served.store.folder.iterdir()] == [sha(b"soup")]


async def test_the_rules_of_a_node(serve: Serve) -> None:
    rights = AtANode(lambda sha256: sha256 == sha(b"answer"))
    served = await serve(rights)
    served.store.put_bytes(b"soup")
    served.store.put_bytes(b"answer")
    assert (await served.get("client:ann", sha(b"answer")))[0] == 200, "an output of an inference"
    gets = {who: (await served.get(who, sha(b"soup")))[0] for who in ("node:n1", "coordinator:attic", "client:ann")}
    assert gets == {"node:n1": 200, "coordinator:attic": 200, "client:ann": 404}
    http = await served.of("client:ann")
    as_bytes = {"Content-Type": "application/octet-stream"}
    async with http.post(f"{served.url}/inputs", data=b"bread", headers=as_bytes) as answer:
        name = (await answer.json())["sha256"]
    for who, status in (("client:bob", 404), ("node:n1", 200)):
        async with (await served.of(who)).get(f"{served.url}/inputs/{name}") as answer:
            assert answer.status == status
    assert not rights.allowed("", sha(b"soup"))
    assert not rights.allowed("", sha(b"answer"))


async def test_a_quota_is_of_an_identity_and_counts_until_a_blob_has_a_name(serve: Serve) -> None:
    served = await serve(OPEN, quota=1000)
    store = served.store
    assert (await served.put("client:ann", b"a" * 600))[0] == 201
    store.pin(sha(b"a" * 600))  # a job uses it: it still counts
    for expect in (False, True):
        status, text = await served.put("client:ann", b"b" * 600, expect100=expect)
        assert status == 507
        assert "600 bytes were sent from client:ann" in text
    assert (await served.put("client:bob", b"b" * 600))[0] == 201, "from the same address"
    assert store.sent(sha(b"a" * 600), "client:ann")
    assert not store.sent(sha(b"b" * 600), "client:ann")
    # Who sends what another sent has it in their own quota, too.
    status, _ = await served.put("client:bob", b"c" * 600)
    assert status == 507
    store.named(sha(b"a" * 600))
    assert (await served.put("client:ann", b"c" * 600))[0] == 201
    with pytest.raises(DiskFull):
        store.check_quota("client:ann", 401)
    store.check_quota("client:ann", 400)
