"""How a machine becomes a member of a closed cluster with a join token, and how its certificate is renewed.

Whoever has the token knows the beginning of the fingerprint of the cluster's CA, and nothing else is believed before it was compared:

1. `GET /v1/ca`, of anybody. Nothing secret is sent. Another CA ends it.
2. From now on only that CA is trusted, and only a server whose certificate says `coordinator.potluck`.
3. `POST /v1/join` with the token's secret and a signing request. The key stays here.
4. The certificate that comes back must be by that CA, for that key, and for us.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import random
import ssl
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import aiohttp
import msgspec

from potluck.credentials import Credentials
from potluck.errors import Conflict, InvalidRequest, NotAllowed, Overloaded, PotluckError, Unavailable
from potluck.logs import fields
from potluck.net.http_client import session
from potluck.net.side import ca_hint
from potluck.security import certificates, cluster_file, contexts, folder
from potluck.security.cluster_file import ClusterFile
from potluck.surviving import surviving
from potluck.wire import joining, tokens
from potluck.wire.addresses import address, is_place
from potluck.wire.identities import Role
from potluck.wire.joining import BODY_LIMIT_BYTES, CA_PATH, JOIN_PATH, RENEW_PATH, Joined, JoinRequest, RenewRequest
from potluck.wire.members import MemberName
from potluck.wire.tokens import JoinToken

log = logging.getLogger(__name__)

ANSWER_SECONDS = 5.0
"""How long one question may take: the connection, the handshake and the whole answer."""
JOIN_SECONDS = 20.0
"""How long joining may take: an answer that was cut off is asked for again, with the same key."""
AGAIN_SECONDS = 1.0
FIND_SECONDS = 3.0
"""How long mDNS is asked for a cluster whose token names no address that answers."""
PLACES = 16
TRIED = "token.json"
RENEWED_AT = 2 / 3
"""The part of a certificate's life after which it is renewed, ..."""
JITTER = 0.1
"""... earlier by up to this part of that time, so that machines that joined together do not come back together."""
RETRY_SECONDS = (600.0, 3600.0)
"""The pause after a renewal that failed: the first for RETRIES times, then the second."""
RETRIES = 6
LOOK_SECONDS = 600.0
"""The clock is looked at so often: it may be set, and the machine may sleep."""
_SAID = 300


class WrongCluster(PotluckError):
    """Whoever answers at an address of the token is not the cluster that the token is for."""

    code = "wrong_cluster"
    exit_code = 2


@dataclass(frozen=True)
class Enrolled:
    """What a member has after joining: it is in no folder yet."""

    known: ClusterFile
    certificate: bytes
    ca: bytes
    key: bytes = field(repr=False)

    @property
    def role(self) -> Role:
        return "node" if self.known.identity.startswith("node:") else "client"

    def save_as(self, role: Role, where: Path) -> None:
        """`save`, if it is a member of this kind. Raises InvalidRequest."""
        if self.role != role:
            wanted = "node" if role == "node" else "user"
            raise InvalidRequest(
                f"this token is for a {self.role}, and here a {role} joins: make one with `potluck token create --role {wanted}`"
            )
        self.save(where)

    def save(self, where: Path) -> None:
        """Write the credentials into a folder. The key comes last: without it, nobody takes the folder for a member's.

        Raises InvalidSettings.
        """
        folder.write(where / folder.CA_CERTIFICATE, self.ca, folder.PUBLIC)
        cluster_file.write(where, self.known)
        folder.write_pair(where, self.role, self.key, self.certificate)


def note_tried(where: Path, token: JoinToken, error: str = "") -> None:
    """Note, beside the credentials, how this token was answered: `error`, or "": it let us in. It is tried only once."""
    said = {"token_id": token.token_id.hex(), "error": error}
    folder.write(where / TRIED, msgspec.json.encode(said), folder.PUBLIC)


def tried(where: Path, token: JoinToken) -> str | None:
    """How this token was answered; None: it was not tried, or another one since."""
    try:
        with (where / TRIED).open("rb") as file:
            said = msgspec.json.decode(file.read(BODY_LIMIT_BYTES), type=dict[str, str])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return said.get("error", "") if said.get("token_id") == token.token_id.hex() else None


Hints = Callable[[JoinToken], Awaitable[Sequence[str]]]
"""Where else a token's cluster may be: `host:port` of HTTPS servers. Whoever answers there is checked like everybody."""


async def enrol(
    token: JoinToken,
    name: str,
    *,
    key: bytes | None = None,
    hints: Hints | None = None,
    limit_seconds: float = JOIN_SECONDS,
) -> Enrolled:
    """Join the token's cluster under this name, with this private key (PEM; None: a new one).

    An answer may be lost after the token was used. The coordinator gives it again to the same key, so keep the key for another try.
    `hints` are asked for when no address of the token answers: None: mDNS.
    Raises WrongCluster, NotAllowed for a token that lets nobody in, Conflict for a name that is taken, InvalidRequest, Overloaded, and
    Unavailable when nobody answered in time.
    """
    check_name(name)
    key = key or certificates.new_key()
    deadline = time.monotonic() + limit_seconds
    places, hinted = list(token.endpoints), False
    reasons: dict[str, str] = {}
    while True:
        async with aclosing(_trusted(places, token, reasons)) as answering:
            async for place, ca in answering:
                try:
                    return await _join(place, ca, token, name, key)
                except Unavailable as error:
                    reasons[place] = error.message
                except Overloaded as error:
                    pause = error.retry_after_seconds or AGAIN_SECONDS
                    if time.monotonic() + pause > deadline:
                        raise
                    reasons[place] = error.message
                    await asyncio.sleep(pause)
        if time.monotonic() + AGAIN_SECONDS > deadline:
            raise Unavailable(_nobody(reasons))
        if not hinted:
            hinted = True
            found = await (hints or hinted_by_mdns)(token)
            places += [place for place in found if place not in places and is_place(place)][:PLACES]
        await asyncio.sleep(AGAIN_SECONDS)


def check_name(name: str) -> None:
    """Raises InvalidRequest for a name that no member can have."""
    try:
        msgspec.convert(name, MemberName)
    except msgspec.ValidationError as error:
        raise InvalidRequest(
            f"{name[:80]!r} cannot be the name of a member: use letters, digits, '.', '_' and '-', beginning with a letter or digit, at most 50"
        ) from error


def _nobody(reasons: dict[str, str]) -> str:
    where = "; ".join(f"{place} ({reason})" for place, reason in reasons.items())
    asked = f"its coordinator did not answer: {where}" if where else "the token names no address, and mDNS finds none"
    return (
        f"this machine could not join: {asked}. Is the coordinator's machine on, and can this one reach it? "
        "Then type the same again: the token is still good"
    )


async def hinted_by_mdns(token: JoinToken) -> Sequence[str]:
    """The HTTPS servers of coordinators that say, by mDNS, that they have the token's CA. Empty where there is no multicast."""
    from potluck.net.discovery import ANY_CLUSTER, Discovery  # mDNS is slow to import

    wanted = ca_hint(token.fingerprint)

    async def heard(host: str) -> list[str]:
        with suppress(Unavailable):
            async with Discovery(ANY_CLUSTER, listen_host=host) as discovery:
                await discovery.wait_for(lambda one: one.role == "coordinator" and one.ca == wanted, FIND_SECONDS)
                return [f"{one.host}:{one.port}" for one in discovery.services("coordinator") if one.ca == wanted]
        return []

    found = await asyncio.gather(heard("127.0.0.1"), heard("0.0.0.0"))  # noqa: S104 - where to look, nothing is served
    return list(dict.fromkeys(place for places in found for place in places))


async def _trusted(
    places: Iterable[str], token: JoinToken, reasons: dict[str, str]
) -> AsyncGenerator[tuple[str, bytes]]:
    """(place, CA) of those that show the token's CA, the quickest first. All are asked at once: they get to know nothing.

    Raises WrongCluster when an address of the token shows another CA; others are left out. Who does not answer is noted in `reasons`.
    """

    async def ask(place: str) -> tuple[str, bytes | None]:
        try:
            return place, _checked_ca(await _get_ca(place), token, place)
        except WrongCluster as error:
            if place in token.endpoints:
                raise
            reasons[place] = error.message
        except PotluckError as error:
            reasons[place] = error.message
        return place, None

    asking = [asyncio.create_task(ask(place), name=f"ca of {place}") for place in places]
    try:
        for first in asyncio.as_completed(asking):
            place, ca = await first
            if ca is not None:
                yield place, ca
    finally:
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)


def _checked_ca(said: bytes, token: JoinToken, place: str) -> bytes:
    """The CA's certificate in an answer, alone. Raises WrongCluster when it is not the token's, InvalidRequest when it is none."""
    ca = certificates.alone(said)
    shown = certificates.read(ca).fingerprint[: tokens.FINGERPRINT_BYTES]
    if not hmac.compare_digest(shown, token.fingerprint):
        raise WrongCluster(
            f"{place} is not the cluster of this token: the fingerprint of its CA is {shown.hex()}, and the token names "
            f"{token.fingerprint.hex()}. Nothing secret was sent. Either another cluster has this address now, or somebody poses as "
            "yours: make a new token on the coordinator's machine, and compare"
        )
    certificates.check(ca, ca, time.time())
    return ca


async def _get_ca(place: str) -> bytes:
    """What a server says the CA is. It may be anybody. Raises Unavailable."""
    status, said, _ = await _ask("GET", place, CA_PATH, b"", _over(contexts.blind(certificates.COORDINATOR)))
    if status != 200:
        raise Unavailable(f"it answers {status}, so it is no coordinator of a closed cluster")
    return said


async def _join(place: str, ca: bytes, token: JoinToken, name: str, key: bytes) -> Enrolled:
    question = JoinRequest(
        token_id=token.token_id.hex(),
        secret=token.secret.hex(),
        request=certificates.signing_request(key).decode(),
        name=name,
    )
    trusting = _over(contexts.trusting(ca, certificates.COORDINATOR))
    joined = await _admitted(place, JOIN_PATH, question, trusting)
    return _checked(joined, ca, key, name)


def _checked(joined: Joined, ca: bytes, key: bytes, name: str) -> Enrolled:
    """What a coordinator gave us, if it fits. Raises InvalidRequest, and Conflict when the certificate names somebody else."""
    known = ClusterFile(
        cluster=joined.cluster,
        cluster_id=joined.cluster_id,
        brokers=joined.brokers,
        http=joined.http,
        identity=joined.identity,
    )
    certificate = certificates.alone(joined.certificate.encode())
    found, issuer = certificates.check(certificate, ca, time.time()), certificates.read(ca)
    kind, _, called = found.identity.partition(":")
    if found.identity != known.identity or kind not in ("node", "client") or called != name:
        raise Conflict(
            f"the coordinator gave a certificate to {found.identity[:80]!r}, and this machine asked to be {name!r}: join under that name"
        )
    if found.public_key != certificates.public_key_of(key):
        raise InvalidRequest("the coordinator gave a certificate for another key than this machine's: try again")
    named = certificates.ca_name(known.cluster)
    if (issuer.identity, issuer.organization, found.organization) != (named, known.cluster_id, known.cluster_id):
        raise InvalidRequest(f"the coordinator says that it is of cluster {known.cluster!r}, and its CA says otherwise")
    return Enrolled(known, certificate, ca, key)


def _over(context: ssl.SSLContext) -> Credentials:
    """Credentials that name nobody: what is asked with them is asked over this context."""
    return Credentials(client_tls=context, broker_tls=context)


async def _admitted(place: str, path: str, question: JoinRequest | RenewRequest, credentials: Credentials) -> Joined:
    """The answer to a question that changes who is a member. Raises what the coordinator says, and Unavailable."""
    status, said, retry_seconds = await _ask("POST", place, path, joining.encode(question), credentials)
    if status == 200:
        return joining.decode(said, Joined)
    text = _said(said)
    if status in (401, 403):
        raise NotAllowed(text or "the coordinator does not let this machine in")
    if status == 409:
        raise Conflict(text or "the name is taken")
    if status == 429:
        raise Overloaded(text or "too many tries: wait a minute", retry_after_seconds=retry_seconds)
    if 400 <= status < 500:
        raise InvalidRequest(text or f"the coordinator answers {status}")
    raise Unavailable(text or f"it answers {status}")


async def _ask(
    method: str, place: str, path: str, body: bytes, credentials: Credentials
) -> tuple[int, bytes, float | None]:
    """(status, body, seconds to wait before another try) of one answer. Raises Unavailable; also for a body that does not end."""
    url = f"{_address(place)}{path}"
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    try:
        async with (
            asyncio.timeout(ANSWER_SECONDS),
            session(credentials, connect_seconds=ANSWER_SECONDS, idle_seconds=ANSWER_SECONDS) as http,
            http.request(method, url, data=body or None, headers=headers, allow_redirects=False) as answer,
        ):
            said = bytearray()
            async for piece in answer.content.iter_any():
                said += piece
                if len(said) > BODY_LIMIT_BYTES:
                    raise Unavailable(f"its answer has more than {BODY_LIMIT_BYTES} bytes")
            return answer.status, bytes(said), _seconds(answer.headers.get("Retry-After", ""))
    except TimeoutError as error:
        raise Unavailable(f"no whole answer within {ANSWER_SECONDS:g} s") from error
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise Unavailable(_printable(str(error) or type(error).__name__)) from error


def _address(place: str) -> str:
    host, _, port = place.rpartition(":")
    return address(host.strip("[]"), int(port), "https")


def _seconds(text: str) -> float | None:
    return float(text) if text.isascii() and text.isdecimal() and len(text) < 6 else None


def _said(body: bytes) -> str:
    """The sentence in an answer that is an error, for people: the gateway answers with {"error": ...}."""
    try:
        said = msgspec.json.decode(body, type=dict[str, object])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""
    text = said.get("error")
    return _printable(text) if isinstance(text, str) else ""


def _printable(text: str) -> str:
    """A text of others, which cannot write into a terminal as it likes."""
    return "".join(sign if sign.isprintable() else " " for sign in text)[:_SAID]


# --- renewing ---------------------------------------------------------------------------------------------------------------------------


def renewal_at(certificate: certificates.Certificate, early: float = 0.0) -> float:
    """When to renew a certificate, in seconds since the epoch. `early`: from 0 to 1, how much of the jitter is used."""
    began = certificate.not_before + certificates.EARLY_SECONDS
    return began + (certificate.not_after - began) * RENEWED_AT * (1 - JITTER * early)


def own_certificate(where: Path, role: Role) -> certificates.Certificate:
    """What our certificate in a folder says. Raises InvalidSettings, and InvalidRequest when it is none."""
    return certificates.read(folder.certificate_of(folder.secret(folder.pair(where, role))))


async def renew(where: Path, role: Role, credentials: Credentials, places: Sequence[str] = ()) -> None:
    """Get a new certificate for a new key, store both, and use them in `credentials` from now on.

    `places`: where the coordinator is now, as far as is known; then where it was when we last heard. Raises NotAllowed for a member
    that was removed, Unavailable when no coordinator answers, InvalidSettings for a folder that cannot be used.
    """
    known = cluster_file.read(where)
    ca = folder.public(where / folder.CA_CERTIFICATE)
    key = certificates.new_key()
    question = RenewRequest(request=certificates.signing_request(key).decode())
    # not our usual context: it would ask a node as well
    asking = _over(contexts.client_context(where, role, certificates.COORDINATOR))
    reasons: dict[str, str] = {}
    for place in dict.fromkeys([*filter(is_place, places), *known.http]):
        try:
            joined = await _admitted(place, RENEW_PATH, question, asking)
        except Unavailable as error:
            reasons[place] = error.message
            continue
        renewed = _checked(joined, ca, key, known.identity.partition(":")[2])
        if renewed.known.identity != known.identity or renewed.known.cluster_id != known.cluster_id:
            raise InvalidRequest(f"the coordinator at {place} renewed the certificate of somebody else")
        await asyncio.to_thread(renewed.save, where)
        credentials.renew(where, role)
        log.info("certificate renewed %s", fields(identity=known.identity, by=place))
        return
    where_asked = "; ".join(f"{place} ({reason})" for place, reason in reasons.items())
    raise Unavailable(f"the certificate could not be renewed: no coordinator answers at {where_asked}")


async def keep_renewed(
    where: Path, role: Role, credentials: Credentials, places: Callable[[], Sequence[str]] = tuple
) -> NoReturn:
    """Renew the certificate in a folder at two thirds of its life, again and again, until cancelled."""
    failures = 0
    while True:
        with surviving("renewal of the certificate"):
            try:
                found = await asyncio.to_thread(own_certificate, where, role)
                await _until(renewal_at(found, random.random()))
                await renew(where, role, credentials, places())
            except PotluckError as error:
                log.warning("certificate not renewed %s", fields(reason=error.message))
            else:
                failures = 0
                continue
        failures += 1
        await asyncio.sleep(RETRY_SECONDS[0] if failures <= RETRIES else RETRY_SECONDS[1])


async def follow_renewed(where: Path, role: Role, credentials: Credentials) -> NoReturn:
    """Use what somebody else renews in a folder, until cancelled."""
    until = 0.0
    while True:
        try:
            found = await asyncio.to_thread(own_certificate, where, role)
            if until and found.not_after != until:
                credentials.renew(where, role)
            until = found.not_after
        except PotluckError as error:
            log.warning("certificate not read again %s", fields(reason=error.message))
        await asyncio.sleep(LOOK_SECONDS)


async def _until(moment: float) -> None:
    """Return at this time, by a clock that may be set meanwhile."""
    while True:
        left = moment - time.time()
        if left <= 0:
            return
        await asyncio.sleep(min(left, LOOK_SECONDS))
