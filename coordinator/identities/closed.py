"""A closed cluster's part of the coordinator, put together: members, CA, broker, joining and removing. Only then is this imported."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NoReturn

from aiohttp import web

from coordinator.identities import founding
from coordinator.identities.joining import Joining
from coordinator.identities.journaled import JournaledMembers
from coordinator.identities.proof import Prover
from coordinator.identities.questions import MemberQuestions
from coordinator.identities.rules import Rules
from coordinator.identities.visitors import Visitors
from coordinator.journal import FATAL, Journal
from coordinator.sealing import ForwardClock, Sealing
from potluck.credentials import Credentials
from potluck.errors import PotluckError
from potluck.logs import Seldom, fields
from potluck.net.addresses import reachable_addresses
from potluck.net.broker import ClosedBroker, start_closed_broker
from potluck.security import certificates
from potluck.settings import CoordinatorSettings, short_hostname
from potluck.surviving import surviving
from potluck.wire.addresses import place
from potluck.wire.births import CoordinatorProof
from potluck.wire.seals import Sealer
from potluck.wire.topics import Topics

log = logging.getLogger(__name__)

DAY_SECONDS = 86400.0
CHECK_SECONDS = 60.0
"""How often to look whether a certificate of ours has to be made again. A machine may have slept meanwhile."""
PLACES = 8
"""How many of our addresses a member is told."""
LOG_SECONDS = 600.0


class Closed:
    """What the daemon needs of it, in this order: the constructor, `start_broker`, `serve`, and then the tasks of `tasks`.

    Raises InvalidSettings for a state folder that lacks something or is another cluster's.
    """

    def __init__(
        self,
        settings: CoordinatorSettings,
        state: Path,
        journal: Journal,
        session: str,
        session_of: Callable[[str], str],
    ) -> None:
        """`session`: that of this coordinator; `session_of`: the present one of a node; "": it is not known."""
        self._settings = settings
        self._journal = journal
        self.known = JournaledMembers(journal)
        self._founded = founding.found(
            state,
            settings.cluster,
            journal.cluster_id,
            short_hostname(),
            settings.certificate_days * DAY_SECONDS,
            has_members=bool(self.known.members.known),
            hosts=_hosts(settings.listen.host),
        )
        self._founded.renew(at_start=True)
        self._record_own()
        self.known.members.own = frozenset(self._founded.ends())
        self.credentials = Credentials.load(self._founded.identity, "coordinator")
        self.operator = Credentials.load(state / founding.OPERATOR, "client")
        """Those of this machine's operator: a client, also of another coordinator with our CA."""
        self.authority = self._founded.authority
        self.fingerprint = certificates.read(self.authority.ca).fingerprint
        """SHA-256 of the CA's public key."""
        self.topics = Topics(settings.cluster)
        sign = self._founded.signer()
        self.visitors = Visitors()
        self._prover = Prover(self.topics.coordinator_proof, session, journal.epoch, journal.cluster_id, sign)
        sealer = Sealer(session, journal.epoch, journal.cluster_id, sign)
        self.sealing = Sealing(sealer, self.topics, session_of, ForwardClock())
        self._to_show: set[str] = set()
        """Certificates of ours that were made again, and are not in use yet."""
        self._seldom = Seldom(LOG_SECONDS)
        self.publish_proof: Callable[[], None] = lambda: None
        """Called when there is something new to prove."""
        self.on_removed: Callable[[str], Awaitable[None]] = _nothing
        """Called with the identity of a member that was removed, once it has no rights at the broker any more."""

    async def start_broker(self) -> ClosedBroker:
        """Our own mosquitto, with the rules for the present members. Raises as `start_closed_broker`."""
        broker = self._settings.broker
        self.broker = await start_closed_broker(
            broker,
            self._settings.listen.host,
            (broker.closed_port, broker.client_port),
            self._founded.state / founding.BROKER,
            self.topics,
            self.known.members.allowed(self.known.clock()),
        )
        return self.broker

    def serve(self, port: int) -> None:
        """Once the broker runs. `port`: that of our HTTP server."""
        self._port = port
        broker, founded = self.broker, self._founded
        self.rules = Rules(self.known, broker, self.authority, broker.host, founded.state)
        self.rules.on_removed = self._removed
        seconds = self._settings.certificate_days * DAY_SECONDS
        cluster, cluster_id = self._settings.cluster, self._journal.cluster_id
        self.joining = Joining(self.known, self.authority, self.rules.apply, self.places, cluster, cluster_id, seconds)
        self.questions = MemberQuestions(self.known, self.rules, lambda: self.places("node")[1], self.fingerprint)
        near = broker.host  # on this machine: it works without a network, and after its address has changed
        founded.tell_operator(cluster, cluster_id, (place(near, broker.client_port),), (place(near, port),))

    def routes(self) -> list[web.RouteDef]:
        """What those may ask over HTTPS who are no members yet, and members that renew."""
        return self.joining.routes()

    def places(self, kind: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The brokers for a kind of member (`node`, `client`), and our HTTP servers: `host:port` each."""
        hosts = reachable_addresses(self._settings.listen.host)[:PLACES]
        broker_port = self.broker.client_port if kind == "client" else self.broker.port
        return tuple(place(host, broker_port) for host in hosts), tuple(place(host, self._port) for host in hosts)

    def proof(self) -> CoordinatorProof:
        """What is to be retained on the bus now."""
        now = self.known.clock()
        return self._prover.prove(self._founded.command_certificate(), self.known.members.revoked(now), now)

    def role_of(self, identity: str) -> str | None:
        """The role of a member; None: nobody of this identity may take part now."""
        found = self.known.members.standing(identity, self.known.clock())
        return None if found is None else found.role

    def bearer(self, token: str) -> str | None:
        """The identity of the member with this bearer token; None: nobody has it."""
        found = self.known.members.bearer(token, self.known.clock())
        return None if found is None else found.identity

    async def keep_certificates(self) -> NoReturn:
        """Make our own certificates again before they end, and end what members whose own has ended still ask; until cancelled."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            await self.renew_own()
            if count := self.visitors.end_others(lambda identity: self.role_of(identity) is not None):
                log.info("requests of members ended whose certificate or token has ended %s", fields(requests=count))

    async def renew_own(self) -> None:
        """Make those of our certificates again whose time has come, and use them. What fails is tried again at the next call."""
        with surviving("renewal of our certificates", fatal=FATAL):
            self.known.members.forget(self.known.clock())
            try:
                if self._founded.due_at() <= time.time():
                    self._to_show |= set(await asyncio.to_thread(self._founded.renew))
                await self._show_renewed()
            except FATAL:
                raise
            except PotluckError as error:
                if self._seldom.due("renewal") is not None:
                    log.error("our certificates are not renewed %s", fields(reason=error.message))

    async def _show_renewed(self) -> None:
        if not self._to_show:
            return
        names = ",".join(sorted(self._to_show))
        if founding.COORDINATOR in self._to_show:
            self.credentials.renew(self._founded.identity, "coordinator")
        if founding.CLIENT in self._to_show:
            self.operator.renew(self._founded.state / founding.OPERATOR, "client")
        self._record_own()
        if founding.BROKER in self._to_show:
            await self.broker.reload()
        if founding.COMMANDS in self._to_show:
            self.publish_proof()
        self._to_show.clear()
        log.info("our certificates renewed %s", fields(names=names))

    def _record_own(self) -> None:
        """We and the machine's operator are members too."""
        for identity, (role, until) in self._founded.ends().items():
            self.known.record(self.known.members.found(identity, role, until, self.known.clock()))

    async def _removed(self, identity: str) -> None:
        self.publish_proof()
        log.info("member removed %s", fields(member=identity, requests=self.visitors.end(identity)))
        await self.on_removed(identity)

    def metrics(self) -> str:
        """For Prometheus: lines for the page `/metrics`."""
        now, lines = self.known.clock(), []
        counts = dict.fromkeys(("coordinator", "node", "viewer", "user", "operator"), 0)
        for one in self.known.members.known.values():
            if one.stands(now):
                counts[one.role] = counts.get(one.role, 0) + 1
        lines += ["# HELP potluck_members Members of the closed cluster by role.", "# TYPE potluck_members gauge"]
        lines += [f'potluck_members{{role="{role}"}} {count}' for role, count in counts.items()]
        for name, kind, text, value in (
            ("join_tokens", "gauge", "Join tokens that still let somebody in.", len(self.known.members.token_infos(now))),
            ("wrong_joins_total", "counter", "Tries to join with a wrong token.", self.joining.tries.count),
            ("removed_members", "gauge", "Removed members whose certificates are valid still.", len(self.known.members.removed(now))),
            ("removed_connections", "gauge", "Their connections to the broker, without any right.", self.rules.lingering),
        ):  # fmt: skip
            lines += [f"# HELP potluck_{name} {text}", f"# TYPE potluck_{name} {kind}", f"potluck_{name} {value}"]
        return "\n".join(lines) + "\n"


def _hosts(listen_host: str) -> tuple[str, ...]:
    """Names and addresses of this machine, for browsers and curl."""
    found = ("localhost", "127.0.0.1", socket.gethostname(), *reachable_addresses(listen_host))
    return tuple(dict.fromkeys(one for one in found if one.isascii() and 0 < len(one) < 64))


async def _nothing(identity: str) -> None:
    """Before anybody asks to be told."""
