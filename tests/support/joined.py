"""A closed cluster without its daemons: members, CA, a real mosquitto and a real HTTPS server; and how a machine joins it, by hand."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from coordinator.callers import Callers
from coordinator.gateway.gate import Gate
from coordinator.identities.closed import Closed
from coordinator.journal import Journal
from potluck.net.addresses import bind_gateway
from potluck.net.http import serve_http
from potluck.security import certificates, contexts, folder
from potluck.security.certificates import COORDINATOR
from potluck.settings import BrokerSettings, CoordinatorSettings, DiscoverySettings, GatewayListen
from potluck.wire import joining, tokens
from potluck.wire.joining import JOIN_PATH, RENEW_PATH, Joined, JoinRequest, RenewRequest
from potluck.wire.members import CreateToken, TokenCreated
from potluck.wire.roles import Caller

ADMIN = Caller("client:admin", "operator")


def settings(cluster: str, **changes: Any) -> CoordinatorSettings:
    """Of a closed cluster on free ports of loopback."""
    return CoordinatorSettings(
        cluster=cluster,
        closed=True,
        listen=GatewayListen(port=0),
        broker=BrokerSettings(closed_port=0, client_port=0),
        discovery=DiscoverySettings(enabled=False),
        **changes,
    )


@dataclass
class Cluster:
    """`url` is that of its HTTPS server."""

    closed: Closed
    url: str
    folder: Path
    journal: Journal
    said: list[Any] = field(default_factory=list)
    """The bodies of all answers that were not 200."""

    async def token(self, **asked: Any) -> str:
        made = await self.closed.questions.answer(CreateToken(**asked), ADMIN)
        assert isinstance(made, TokenCreated)
        return made.token

    def trusting(self) -> ssl.SSLContext:
        return contexts.trusting(self.closed.authority.ca, COORDINATOR)

    async def post(
        self, path: str, body: bytes, context: ssl.SSLContext, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes, dict[str, str]]:
        connector = aiohttp.TCPConnector(ssl=context)
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.post(self.url + path, data=body, headers=headers) as answer,
        ):
            data = await answer.read()
            if answer.status != 200:
                self.said.append(msgspec.json.decode(data))
            return answer.status, data, dict(answer.headers)

    async def ask_to_join(self, token: str, name: str, key: bytes, **changes: Any) -> tuple[int, bytes, dict[str, str]]:
        found = tokens.parse(token)
        request = JoinRequest(
            token_id=found.token_id.hex(),
            secret=found.secret.hex(),
            request=certificates.signing_request(key).decode(),
            name=name,
        )
        body = joining.encode(msgspec.structs.replace(request, **changes))
        return await self.post(JOIN_PATH, body, self.trusting())

    async def join(self, token: str, name: str) -> tuple[Joined, Path]:
        """Who joined, and its folder of credentials."""
        key = certificates.new_key()
        status, data, _ = await self.ask_to_join(token, name, key)
        assert status == 200, data
        joined = joining.decode(data, Joined)
        where = self.folder / "members" / joined.identity.replace(":", "-")
        folder.write_pair(where, joined.identity.partition(":")[0], key, joined.certificate.encode())
        folder.write(where / folder.CA_CERTIFICATE, joined.ca.encode(), folder.PUBLIC)
        return joined, where

    async def renew(self, where: Path, role: str, key: bytes) -> tuple[int, bytes]:
        context = contexts.client_context(where, role, COORDINATOR)
        body = joining.encode(RenewRequest(certificates.signing_request(key).decode()))
        status, data, _ = await self.post(RENEW_PATH, body, context)
        return status, data


@asynccontextmanager
async def cluster(where: Path, name: str = "test", **changes: Any) -> AsyncIterator[Cluster]:
    """Founded in the folder `where`, or started again there."""
    chosen = settings(name, **changes)
    journal = Journal(where / "journal.sqlite")
    try:
        closed = Closed(chosen, where, journal, "session", lambda node_id: "")
        broker = await closed.start_broker()
        try:
            sock = bind_gateway(chosen.listen)
            closed.serve(port := sock.getsockname()[1])
            gate = Gate(Callers(closed.role_of, closed.bearer))
            async with serve_http(
                sock, gate.routes(closed.routes()), closed.credentials, (gate.middleware, closed.visitors.middleware())
            ):
                yield Cluster(closed, f"https://127.0.0.1:{port}", where, journal)
        finally:
            await broker.stop()
    finally:
        journal.close()
