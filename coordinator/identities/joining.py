"""How a machine joins over HTTPS, and renews its certificate: what `potluck.wire.joining` describes.

An answer leaves only when all that it says is on the disk, and when the broker judges by it. Whoever loses an answer asks again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable

from aiohttp import web

from coordinator.identities.authority import Authority
from coordinator.identities.journaled import JournaledMembers
from coordinator.identities.members import AnyIdentityEvent
from coordinator.identities.tries import Tries, neighbourhood
from potluck.errors import (
    Conflict,
    InvalidRequest,
    NotAllowed,
    NotAuthenticated,
    Overloaded,
    PotluckError,
    TimedOut,
    TooLarge,
    Unavailable,
)
from potluck.logs import Seldom, fields
from potluck.net.peers import peer_identity
from potluck.security import certificates
from potluck.surviving import as_defect
from potluck.wire import joining
from potluck.wire.joining import BODY_LIMIT_BYTES, CA_PATH, JOIN_PATH, RENEW_PATH, Joined, JoinRequest, RenewRequest

log = logging.getLogger(__name__)

BODY_SECONDS = 5.0
RULES_SECONDS = 10.0
"""How long the broker may take to read its rules."""
AT_ONCE = 256
"""How many whom the coordinator lets in may wait for disk and broker at the same time."""
BODIES_EACH = 32
"""How many questions of one address may be under way whose body has not come: they may be anybody's."""
RENEWALS = 10
"""How often one member may renew its certificate in a minute: each is an event on the disk."""
LOG_SECONDS = 60.0

_STATUS: dict[type[PotluckError], int] = {
    NotAuthenticated: 401,
    NotAllowed: 403,
    Conflict: 409,
    TooLarge: 413,
    Overloaded: 429,
    TimedOut: 408,
    InvalidRequest: 400,
}


class Joining:
    """`places` gives the brokers for a kind of member (`node`, `client`) and the HTTP servers, `host:port` each."""

    def __init__(
        self,
        members: JournaledMembers,
        authority: Authority,
        apply: Callable[[], Awaitable[None]],
        places: Callable[[str], tuple[tuple[str, ...], tuple[str, ...]]],
        cluster: str,
        cluster_id: str,
        seconds: float,
    ) -> None:
        """`apply` returns when the broker judges by what was recorded; `seconds`: how long certificates last."""
        self._members = members
        self._authority = authority
        self._apply = apply
        self._places = places
        self._cluster = cluster
        self._cluster_id = cluster_id
        self._seconds = seconds
        self._busy = 0
        self._coming: Counter[str] = Counter()
        """Questions whose body has not come, by address."""
        self.tries = Tries()
        self._renewals = Tries(each=RENEWALS)
        self._seldom = Seldom(LOG_SECONDS)

    @property
    def coming(self) -> int:
        """How many questions to join are under way whose body has not come."""
        return self._coming.total()

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get(CA_PATH, self._ca),
            web.post(JOIN_PATH, self._answering(self._join)),
            web.post(RENEW_PATH, self._answering(self._renew)),
        ]

    async def _ca(self, request: web.Request) -> web.Response:
        return web.Response(body=self._authority.ca, content_type="application/x-pem-file")

    async def _join(self, request: web.Request) -> Joined:
        place = neighbourhood(request.remote or "")
        if wait := self.tries.wait(place, time.monotonic()):
            raise _too_often(wait)
        if self._coming[place] >= BODIES_EACH:
            raise Overloaded(
                f"{BODIES_EACH} machines at your address are about to join: try again", retry_after_seconds=1.0
            )
        self._coming[place] += 1
        try:
            body = await _body(request)
        finally:
            self._coming[place] -= 1
            if not self._coming[place]:
                del self._coming[place]
        asked = joining.decode(body, JoinRequest)
        try:
            token = self._members.members.token(asked.token_id, asked.secret)
        except NotAuthenticated as error:
            wait = self.tries.wrong(place, time.monotonic())
            if (more := self._seldom.due(f"wrong token from {place}")) is not None:
                log.warning("wrong join token %s", fields(peer=request.remote, more=more or None))
            raise (_too_often(wait) if wait else error) from error
        public_key = certificates.requested_key(asked.request.encode())
        key, now = hashlib.sha256(public_key).hexdigest(), self._members.clock()
        identity = self._members.members.may_join(token, asked.name, key, now)
        certificate, until = self._signed(identity, token.role, public_key)
        events = self._members.members.join(token, identity, key, until, now)
        await self._take(events)
        log.info(
            "member joined %s", fields(member=identity, role=token.role, peer=request.remote, token=token.token_id)
        )
        return self._joined(identity, certificate)

    async def _renew(self, request: web.Request) -> Joined:
        identity = peer_identity(request.transport)  # a bearer token gets nobody a certificate
        if not identity:
            raise NotAuthenticated("a certificate is renewed over a connection that shows the present one")
        member = self._members.members.standing(identity, self._members.clock())
        if member is None or member.role == "coordinator":
            raise NotAllowed(
                f"{identity} is no member of this cluster (any more): join it with a new token and another name"
            )
        asked = joining.decode(await _body(request), RenewRequest)
        public_key = certificates.requested_key(asked.request.encode())
        # Members that were removed while the body came are not renewed, and nobody is renewed all the time.
        member = self._members.members.standing(identity, self._members.clock())
        if member is None:
            raise NotAllowed(f"{identity} was removed from the cluster")
        if wait := self._renewals.wait(identity, time.monotonic()):
            raise _too_often(wait)
        self._renewals.wrong(identity, time.monotonic())
        certificate, until = self._signed(identity, member.role, public_key)
        await self._take(self._members.members.renew(identity, until))
        log.info("certificate renewed %s", fields(member=identity))
        return self._joined(identity, certificate)

    def _signed(self, identity: str, role: str, public_key: bytes) -> tuple[bytes, float]:
        """A certificate (PEM) for this member, and when it ends."""
        name = identity.partition(":")[2]
        profile = certificates.node_profile(name) if role == "node" else certificates.client_profile(name, role)
        certificate = self._authority.sign(public_key, profile, self._seconds)
        return certificate, certificates.read(certificate).not_after

    async def _take(self, events: list[AnyIdentityEvent]) -> None:
        """Record, and return when it is safe on the disk and the broker knows. Only those come here who are let in."""
        if self._busy >= AT_ONCE:
            raise Overloaded("too many machines join now: try again", retry_after_seconds=1.0)
        self._busy += 1
        try:
            self._members.record(events)
            await self._members.safe()
            async with asyncio.timeout(RULES_SECONDS):
                await self._apply()
        except TimeoutError as error:
            raise Unavailable("the broker takes long to read its rules: ask again", retry_after_seconds=1.0) from error
        finally:
            self._busy -= 1

    def _joined(self, identity: str, certificate: bytes) -> Joined:
        brokers, http = self._places(identity.partition(":")[0])
        return Joined(
            identity=identity,
            certificate=certificate.decode("ascii"),
            ca=self._authority.ca.decode("ascii"),
            cluster=self._cluster,
            cluster_id=self._cluster_id,
            brokers=brokers,
            http=http,
        )

    def _answering(
        self, handler: Callable[[web.Request], Awaitable[Joined]]
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        """`handler`, with its errors as answers in JSON."""

        async def answered(request: web.Request) -> web.Response:
            try:
                return web.Response(body=joining.encode(await handler(request)), content_type="application/json")
            except Exception as error:  # noqa: BLE001 - whoever asked hears of it, and nobody else
                return _problem(as_defect(error, request.path))

        return answered


async def _body(request: web.Request) -> bytes:
    """Raises TooLarge and TimedOut: nobody holds a place for long."""
    if (request.content_length or 0) > BODY_LIMIT_BYTES:
        raise TooLarge(f"the body has {request.content_length} bytes, more than {BODY_LIMIT_BYTES}")
    found = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while piece := await request.content.readany():
                found += piece
                if len(found) > BODY_LIMIT_BYTES:
                    raise TooLarge(f"the body has more than {BODY_LIMIT_BYTES} bytes")
    except TimeoutError as error:
        raise TimedOut(f"the body did not come within {BODY_SECONDS:g} s") from error
    return bytes(found)


def _too_often(seconds: float) -> Overloaded:
    return Overloaded("too many tries: wait a minute", retry_after_seconds=seconds)


def _problem(error: PotluckError) -> web.Response:
    default = 503 if error.retryable else 500
    status = next((status for kind, status in _STATUS.items() if isinstance(error, kind)), default)
    headers = {}
    if error.retry_after_seconds:
        headers["Retry-After"] = str(max(1, round(error.retry_after_seconds)))
    if status in (408, 413):
        headers["Connection"] = "close"  # the rest of the body is not read
    return web.json_response({"error": error.message, "code": error.code}, status=status, headers=headers)
