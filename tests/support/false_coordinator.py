"""A coordinator's HTTPS server over real TLS, which answers as a test tells it to and remembers every byte that it got."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
from msgspec.structs import replace

from potluck.security import certificates, contexts
from potluck.wire import joining
from potluck.wire.joining import CA_PATH, JOIN_PATH, RENEW_PATH, Joined, JoinRequest, RenewRequest
from support.closed import Authority

Answer = Callable[["FalseCoordinator", bytes], bytes]
"""The bytes to send for a body that came; then the connection is closed."""


def http(status: int, body: bytes, **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} So", f"Content-Length: {len(body)}", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


class FalseCoordinator:
    """`answers`: what each path is answered with; those that are not named are answered as a real coordinator does."""

    def __init__(self, authority: Authority, context: ssl.SSLContext, answers: dict[str, Answer]) -> None:
        self.authority = authority
        self.context = context
        self.answers = {CA_PATH: shows_its_ca, JOIN_PATH: admits, RENEW_PATH: renews} | answers
        self.heard = b""
        self.paths: list[str] = []
        self.peer = ""
        """Who the present connection's certificate names."""
        self.days = 7.0
        self.port = 0

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(10):
                head = await reader.readuntil(b"\r\n\r\n")
                self.heard += head
                path = head.split(b" ")[1].decode()
                length = next(
                    (int(line[15:]) for line in head.split(b"\r\n") if line[:15].lower() == b"content-length:"), 0
                )
                body = await reader.readexactly(length)
                self.heard += body
                self.paths.append(path)
                shown = writer.get_extra_info("peercert") or {}
                names = [value for part in shown.get("subject", ()) for key, value in part if key == "commonName"]
                self.peer = names[0] if names else ""
                said = self.answers[path](self, body)
                writer.write(said)
                while said.endswith(ENDLESS):
                    writer.write(bytes(65536))
                    await writer.drain()
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def joined(self, identity: str, request: str, /, **changes: object) -> Joined:
        """What a real coordinator says to a member of this identity."""
        kind, _, name = identity.partition(":")
        profile = certificates.node_profile(name) if kind == "node" else certificates.client_profile(name, "user")
        key = certificates.requested_key(request.encode())
        good = Joined(
            identity=identity,
            certificate=self.authority.issue(key, profile, days=self.days).decode(),
            ca=self.authority.ca.decode(),
            cluster="test",
            cluster_id="cluster-id",
            brokers=("127.0.0.1:8883",),
            http=(self.place,),
        )
        return replace(good, **changes)


ENDLESS = b"endless"


def shows_its_ca(coordinator: FalseCoordinator, body: bytes) -> bytes:
    return http(200, coordinator.authority.ca)


def admits(coordinator: FalseCoordinator, body: bytes) -> bytes:
    question = joining.decode(body, JoinRequest)
    return http(200, joining.encode(coordinator.joined(f"node:{question.name}", question.request)))


def renews(coordinator: FalseCoordinator, body: bytes) -> bytes:
    question = joining.decode(body, RenewRequest)
    return http(200, joining.encode(coordinator.joined(coordinator.peer, question.request)))


def admits_with(**changes: object) -> Answer:
    """Admits, but some of what it says is not so."""

    def answer(coordinator: FalseCoordinator, body: bytes) -> bytes:
        question = joining.decode(body, JoinRequest)
        return http(200, joining.encode(coordinator.joined(f"node:{question.name}", question.request, **changes)))

    return answer


def refuses(status: int, text: str, **headers: str) -> Answer:
    return lambda coordinator, body: http(status, msgspec.json.encode({"error": text}), **headers)


def says(data: bytes) -> Answer:
    return lambda coordinator, body: data


@asynccontextmanager
async def false_coordinator(folder: Path, authority: Authority, **answers: Answer) -> AsyncIterator[FalseCoordinator]:
    """Serves on loopback within the block. Keywords: `ca`, `join` and `renew`."""
    where = authority.member(folder / "coordinator", "coordinator", certificates.coordinator_profile("attic"))
    context = contexts.server_context(where, "coordinator", needs_certificate=False)
    paths = {"ca": CA_PATH, "join": JOIN_PATH, "renew": RENEW_PATH}
    made = FalseCoordinator(authority, context, {paths[key]: answer for key, answer in answers.items()})
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0, ssl=context)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
