"""The HTTP server of a closed cluster, over TLS with real certificates: each route for each role, by certificate and by bearer token."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import msgpack
import pytest
from aiohttp import web

from coordinator.callers import ANY_MEMBER, Callers
from coordinator.control import Control
from coordinator.events.stream import FOLLOWERS_EACH, Events
from coordinator.gateway import openapi
from coordinator.gateway import routes as gateway
from coordinator.gateway.answers import in_words
from coordinator.gateway.gate import ANYBODY, NEEDS, Gate
from coordinator.gateway.shelf import Shelf
from coordinator.identities.joining import Joining
from potluck.blobs import server as blob_server
from potluck.blobs.download import Downloader
from potluck.blobs.rights import OPEN
from potluck.blobs.store import BlobStore
from potluck.credentials import Credentials
from potluck.net.http import serve_http
from potluck.security import certificates, contexts
from potluck.wire import codec
from potluck.wire.identities import CALLER_HEADER
from potluck.wire.joining import CA_PATH, JOIN_PATH, RENEW_PATH
from potluck.wire.questions import RemoveAlias, Undeploy
from potluck.wire.roles import RANKS
from support.closed import Authority
from support.eventually import eventually
from support.serving_lab import Lab

LIMIT_BYTES = 2**20
ROLES = ("viewer", "user", "operator")
MEMBERS = {**{f"client:{role}": role for role in ROLES}, "node:n1": "node", "coordinator:attic": "coordinator"}
JOINING = {f"GET {CA_PATH}", f"POST {JOIN_PATH}", f"POST {RENEW_PATH}"}
"""What they answer is tested with joining."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Credentials of everybody here: to make keys takes time, and they can be shared."""
    where, authority = tmp_path_factory.mktemp("closed"), Authority()
    authority.member(where / "coordinator", "coordinator", certificates.coordinator_profile("attic"))
    authority.member(where / "node:n1", "client", certificates.node_profile("n1"))
    for name in (*ROLES, "stranger"):
        role = name if name in ROLES else "operator"
        authority.member(where / f"client:{name}", "client", certificates.client_profile(name, role))
    (where / "ca.crt").write_bytes(authority.ca)
    return where


@dataclass
class Closed:
    base: str
    folder: Path
    members: dict[str, str]

    def tls(self, identity: str) -> ssl.SSLContext:
        """As this identity; "": without a certificate."""
        if not identity:
            return contexts.trusting((self.folder / "ca.crt").read_bytes(), certificates.COORDINATOR)
        return contexts.client_context(self.folder / identity, "client", certificates.COORDINATOR)

    @asynccontextmanager
    async def session(self, identity: str = "", bearer: str = "") -> AsyncIterator[aiohttp.ClientSession]:
        headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        connector = aiohttp.TCPConnector(ssl=self.tls(identity))
        async with aiohttp.ClientSession(self.base, connector=connector, headers=headers) as opened:
            yield opened


@pytest.fixture
def served(lab: Lab, store: BlobStore, control: Control, stack: AsyncExitStack, folder: Path) -> list[web.RouteDef]:
    """All routes of a coordinator, except those for joining."""
    downloader = Downloader(store, Credentials())
    shelf = Shelf(store, downloader, lambda: ("https://127.0.0.1:1",), LIMIT_BYTES)
    return [
        *blob_server.routes(store, writable=True, max_bytes=LIMIT_BYTES, rights=OPEN),
        *gateway.routes(control, lab.serving, lab.inference, lab.membership, lab.settings, shelf, lab.bus, closed=True),
    ]


@pytest.fixture
async def closed(lab: Lab, served: list[web.RouteDef], stack: AsyncExitStack, folder: Path) -> Closed:
    await lab.join(stack, "a")
    lab.add_model()
    await lab.deploy("m", 1)
    lab.registry.set_alias("m:1", "prod")
    members = dict(MEMBERS)

    def bearer(token: str) -> str | None:
        return f"client:{token}" if token in (*ROLES, "stranger") else None

    async def unlisted(request: web.Request) -> web.Response:
        return web.Response(text="forgotten")

    gate = Gate(Callers(members.get, bearer))
    sock = socket.create_server(("127.0.0.1", 0))
    credentials = Credentials.load(folder / "coordinator", "coordinator")
    routes = gate.routes([*served, web.get("/unlisted", unlisted)])
    await stack.enter_async_context(serve_http(sock, routes, credentials, (in_words, gate.middleware)))
    return Closed(f"https://127.0.0.1:{sock.getsockname()[1]}", folder, members)


def names_of(routes: list[web.RouteDef]) -> set[str]:
    app = web.Application()
    app.add_routes(routes)
    found = {f"{one.method} {one.resource.canonical}" for one in app.router.routes() if one.resource is not None}
    return {one for one in found if not one.startswith("HEAD ")}


def asked(needs: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """(method, path, the role that is needed)"""
    for route, needed in needs.items():
        method, path = route.split(" ")
        for name, value in (("model", "m"), ("version", "1"), ("label", "prod"), ("sha256", "0" * 64)):
            path = path.replace(f"{{{name}}}", value)
        yield method, path, needed
        if method == "GET" and path != "/v1/events":  # which takes no HEAD
            yield "HEAD", path, needed


def test_every_route_is_in_the_table_and_no_other(served: list[web.RouteDef]) -> None:
    assert names_of(served) == set(NEEDS) - JOINING
    nothing: Any = None
    joining = Joining(nothing, nothing, nothing, nothing, "home", "home-1", 1.0)
    assert names_of(joining.routes()) == JOINING
    assert set(NEEDS.values()) <= {ANYBODY, ANY_MEMBER, *RANKS}


def allowed(role: str | None, needed: str) -> bool:
    if needed == ANYBODY:
        return True
    return role is not None and (needed == ANY_MEMBER or RANKS.get(role, 0) >= RANKS[needed])


@pytest.mark.parametrize(
    ("identity", "bearer", "role"),
    [
        ("", "", None),
        ("client:stranger", "", None),
        ("", "stranger", None),
        ("", "guessed", None),
        ("client:stranger", "operator", None),
        ("node:n1", "", "node"),
        *((f"client:{role}", "", role) for role in ROLES),
        *(("", role, role) for role in ROLES),
    ],
)
async def test_each_route_is_for_its_roles(closed: Closed, identity: str, bearer: str, role: str | None) -> None:
    wrong = []
    async with closed.session(identity, bearer) as session:
        for method, path, needed in (
            *asked({route: needed for route, needed in NEEDS.items() if route not in JOINING}),
            ("GET", "/unlisted", "operator"),
            ("GET", "/nowhere", ANY_MEMBER),
            ("POST", "/metrics", ANY_MEMBER),
        ):
            expected = None if allowed(role, needed) else 401 if role is None else 403
            async with session.request(method, path) as answer:
                if (answer.status if answer.status in (401, 403) else None) != expected:
                    wrong.append((method, path, answer.status))
                if answer.status == 401:
                    assert answer.headers["WWW-Authenticate"] == "Bearer"
                if expected is not None and method != "HEAD":
                    assert list(await answer.json()) == ["error"]
    assert wrong == []


async def ask(session: aiohttp.ClientSession, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    async with session.post("/v1/control", data=body, headers={"Content-Type": "application/json", **named}) as answer:
        return answer.status, await answer.json()


async def test_a_question_needs_its_role(closed: Closed, lab: Lab) -> None:
    question = codec.encode(Undeploy(id="q", model="m"), "json")
    for identity in ("client:viewer", "client:user"):
        async with closed.session(identity) as session:
            status, answer = await ask(session, question)
            assert (status, answer) == (
                403,
                {
                    "error": f"Undeploy needs the role 'operator', and {identity} is a {identity.partition(':')[2]}: "
                    f"an operator gives it the role with `potluck token create --role operator --name {identity.partition(':')[2]}` "
                    "and the `potluck join` that this shows"
                },
            )
            assert (await ask(session, b'{"type": "ListModels"}'))[0] == 200
    assert lab.serving.ready("m")
    async with closed.session("client:operator") as session:
        assert (await ask(session, question))[0] == 200


async def test_who_is_refused_stands_in_the_log(closed: Closed, caplog: pytest.LogCaptureFixture) -> None:
    async with closed.session("client:viewer") as session, closed.session() as nobody:
        for _ in range(2):
            await ask(session, b'{"type": "Undeploy", "model": "m"}')
            await ask(nobody, b'{"type": "ListNodes"}')
        await ask(session, b'{"type": "ListModels"}')
    said = [record.getMessage() for record in caplog.records if record.name == "coordinator.callers"]
    assert said == [
        "refused who=client:viewer what='POST /v1/control' code=not_allowed",
        "refused who='somebody at 127.0.0.1' what='POST /v1/control' code=not_authenticated",
    ]


async def test_msgpack_is_answered_too(closed: Closed) -> None:
    async with (
        closed.session(bearer="viewer") as session,
        session.post(
            "/v1/control",
            data=msgpack.packb({"type": "ListNodes", "id": "7"}),
            headers={"Content-Type": "application/msgpack"},
        ) as answer,
    ):
        assert answer.status == 200
        assert msgpack.unpackb(await answer.read())["id"] == "7"


async def test_nobody_asks_in_the_name_of_another(closed: Closed, lab: Lab) -> None:
    """The header by which clients of open clusters name themselves is not read, and kept answers are a member's own."""
    closed.members["client:user"] = "operator"
    question = codec.encode(RemoveAlias(id="q-1", model="m:prod"), "json")
    async with closed.session("client:operator") as one, closed.session("client:user") as other:
        for caller in ("client:x", "no identity at all"):
            assert (await ask(one, question, Potluck_Caller=caller))[0] == 200
        assert (await ask(other, question, **{CALLER_HEADER: "client:operator"}))[0] == 404


async def test_a_removed_member_is_refused_on_a_connection_that_stands(closed: Closed) -> None:
    async with closed.session("client:operator") as session:
        async with session.get("/metrics") as answer:
            assert answer.status == 200
        del closed.members["client:operator"]
        async with session.get("/metrics") as answer:
            assert answer.status == 401
            assert "no member of this cluster" in (await answer.json())["error"]
        closed.members["client:operator"] = "viewer"
        async with session.post("/models/m/infer", data=b"[1, 2]") as answer:
            assert answer.status == 403, "it is asked again for each request"


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("Bearer viewer", 200),
        ("bearer  viewer ", 200),
        ("Bearer", 401),
        ("Bearer ", 401),
        ("Bearer viewer extra", 401),
        ("Basic dmlld2VyOg==", 401),
        ("viewer", 401),
        ("Bearer vi\u00e9wer", 401),
        ("Bearer " + "x" * 4000, 401),
    ],
)
async def test_the_header_is_read_as_rfc_6750_has_it(closed: Closed, said: str, status: int) -> None:
    async with closed.session() as session, session.get("/metrics", headers={"Authorization": said}) as answer:
        assert answer.status == status


async def test_two_headers_are_none(closed: Closed) -> None:
    async with closed.session() as session:
        headers = [("Authorization", "Bearer viewer"), ("Authorization", "Bearer operator")]
        async with session.get("/metrics", headers=headers) as answer:
            assert answer.status == 401


async def test_nobody_announces_a_body_to_learn_which_blobs_there_are(closed: Closed, store: BlobStore) -> None:
    """A blob that is here is answered before its body is sent, and before any middleware."""
    ref = store.put_bytes(b"soup")
    for identity, status in (("", 401), ("client:stranger", 401), ("client:viewer", 403), ("client:user", 200)):
        for sha256 in (ref.sha256, "0" * 64) if status != 200 else (ref.sha256,):
            async with closed.session(identity) as session:
                headers = {"Expect": "100-continue", "Content-Length": "4"}
                async with session.put(f"/blobs/{sha256}", headers=headers, data=b"soup", expect100=True) as answer:
                    assert answer.status == status


async def test_plain_connections_get_nothing(closed: Closed) -> None:
    async with aiohttp.ClientSession(headers={"Authorization": "Bearer operator"}) as session:
        with pytest.raises(aiohttp.ClientError):
            await session.get(closed.base.replace("https", "http") + "/metrics")


async def test_all_that_one_member_follows_counts_together(closed: Closed, events: Events) -> None:
    async with AsyncExitStack() as open_ones:
        sessions = [await open_ones.enter_async_context(closed.session("client:viewer")) for _ in range(2)]
        for number in range(FOLLOWERS_EACH):
            answer = await open_ones.enter_async_context(sessions[number % 2].get("/v1/events"))
            assert answer.status == 200
        async with sessions[0].get("/v1/events") as refused:
            assert refused.status == 429
        async with closed.session(bearer="operator") as other, other.get("/v1/events") as answer:
            assert answer.status == 200, "from the same address, and another member"
    await eventually(lambda: not events._followers)


async def test_in_an_open_cluster_a_bearer_token_is_nothing(http: tuple[str, aiohttp.ClientSession]) -> None:
    base, session = http
    async with session.get(f"{base}/metrics", headers={"Authorization": "Bearer guessed"}) as answer:
        assert answer.status == 200


async def test_the_description_says_who_may_ask(closed: Closed) -> None:
    async with closed.session("client:viewer") as session, session.get("/openapi.json") as answer:
        document = await answer.json()
    schemes = document["components"]["securitySchemes"]
    assert {name: one["type"] for name, one in schemes.items()} == {"certificate": "mutualTLS", "bearer": "http"}
    assert document["security"] == [{"certificate": []}, {"bearer": []}]
    told = {
        (method, path): operation
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }
    assert told.pop(("get", "/v2/health/live"))["security"] == []
    for operation in told.values():
        assert {"401", "403"} <= set(operation["responses"])
        assert "security" not in operation
    assert told["post", "/models/{model}/infer"]["description"] == "Needs the role `user`."
    assert "security" not in openapi.description()


async def test_errors_are_those_of_each_protocol(closed: Closed) -> None:
    paths = ("/v2/models/m/infer", "/v1/models/m:predict", "/models/m/infer", "/models/m/classify")
    async with closed.session("client:viewer") as session:
        for path in paths:
            async with session.post(path, data=b"{}") as answer:
                assert answer.status == 403
                assert answer.content_type == "application/json"
                said = json.loads(await answer.read())
                assert said["error"].startswith(
                    f"POST {path} needs the role 'user', and client:viewer is a viewer: an operator gives it the role with"
                )
