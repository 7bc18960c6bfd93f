"""A client's link to one cluster: bus, discovery, the coordinator's status, and the blobs that it pushes and pulls."""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from msgspec.structs import replace

from potluck.blobs.store import BlobStore
from potluck.bus.connecting import refusal
from potluck.bus.mqtt import Addresses, Bus, Envelope, Handler, MqttBus
from potluck.client.arguments import checked
from potluck.client.membership import Membership, config_folder
from potluck.credentials import Credentials
from potluck.errors import InvalidRequest, NotAuthenticated, PotluckError, TimedOut, Unavailable, expected
from potluck.logs import fields
from potluck.net.addresses import lan_addresses
from potluck.net.side import CLOSED_CLIENT_PORT, OPEN, Side
from potluck.settings import ClientSettings, PositiveSeconds, parse_address, typed
from potluck.settings_sources import load
from potluck.sole_use import users_here
from potluck.wire import roles
from potluck.wire.addresses import place, placed
from potluck.wire.births import OURS, CoordinatorStatus, Versions, versions_of
from potluck.wire.questions import CancelInfer, Infer, Inferred, SubmitJob, Undeploy
from potluck.wire.topics import Topics
from potluck.wire.values import BlobRef, Message

if TYPE_CHECKING:
    from potluck.blobs.download import Downloader
    from potluck.security.cluster_file import ClusterFile

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)
T = TypeVar("T")

_PUSHES_AT_ONCE = 4
_STORE_LIMIT_BYTES = 1 << 50
"""No limit: the store is a temporary folder, and only the disk limits it."""
_FIND_SECONDS = 4.0
"""mDNS finds an existing cluster within this time, even where questions may take longer: `potluck up` looks for three seconds."""
_ASK_AGAIN_SECONDS = 5.0
"""After this time without an answer, a question is sent again with the same id: a restarted coordinator gets it too."""
_CANCEL_SECONDS = 1.0
_RENEW_SECONDS = 5.0
_NODE_CONNECT_SECONDS = 1.0
"""A node that does not answer within this time may be unreachable from here."""


class _MayBeLost(Unavailable):
    """The question or its answer may not have arrived. Never leaves this module."""


class Connection:
    """Open between `__aenter__` and `__aexit__`. Raises Unavailable when no broker, or no coordinator that is needed, is found in time."""

    def __init__(
        self,
        settings: ClientSettings,
        credentials: Credentials,
        *,
        bus: Bus | None = None,
        needs_coordinator: bool = True,
        member: Membership | None = None,
    ) -> None:
        """`member`: who we are in a closed cluster; `settings` and `credentials` are then its own."""
        self.settings = settings
        self.credentials = credentials
        self._needs_coordinator = needs_coordinator
        self._member = member if member is not None and member.known is not None else None
        self.topics = Topics(settings.cluster, client=self._member.name if self._member else "")
        self._given_bus = bus
        self._status: CoordinatorStatus | None = None
        self._online = asyncio.Event()
        self._inferring: set[str] = set()
        """Ids of inferences that wait for their answers."""
        self._was_connected = False
        self._cut = False
        """Whether the connection was lost and the coordinator has not been heard since: it may have lost its own connection too."""
        self._foreign: Versions | None = None
        """The versions of the protocol that the coordinator speaks, where we speak none of them."""
        self._followers: dict[str, list[Handler]] = {}
        self._stack = AsyncExitStack()
        self._downloader: Downloader | None = None
        self._making = asyncio.Lock()
        self._running: asyncio.Task[None] | None = None
        self._keeping: asyncio.Task[None] | None = None
        """Keeps the certificate valid."""

    @classmethod
    def of(cls, member: Membership, *, bus: Bus | None = None, needs_coordinator: bool = True) -> Connection:
        """The connection of a client, to an open or a closed cluster."""
        return cls(member.settings, member.credentials, bus=bus, needs_coordinator=needs_coordinator, member=member)

    async def __aenter__(self) -> Connection:
        try:
            await self._open()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._close()

    async def _open(self) -> None:
        limit_seconds = min(self.settings.timeout_seconds, _FIND_SECONDS)
        renewing = asyncio.create_task(self._renew(), name="renewal") if self._member is not None else None
        try:
            await self._connect(limit_seconds)
        finally:
            if renewing is not None:
                await renewing

    async def _connect(self, limit_seconds: float) -> None:
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="potluck-")))
        self.store = BlobStore(self.folder / "blobs", _STORE_LIMIT_BYTES)
        if self._given_bus is not None:
            self.bus = self._given_bus
        else:
            if self._member is None or self._member.known is None:
                addresses = await self._addresses(limit_seconds)
            else:
                addresses = await self._closed_addresses(self._member.known, self._member.side, limit_seconds)
            self.bus = MqttBus(
                addresses,
                self.topics,
                self.credentials,
                client_id=f"{self._member.name if self._member else 'client'}-{uuid.uuid4().hex[:12]}",
                timings=self.settings.bus,
                highest_version=4,  # as in the node: our messages are complete without MQTT 5, and this is faster
            )
        self.bus.subscribe(self.topics.coordinator_status, self._on_status)
        self.bus.on_connect(self._connected)
        self._running = asyncio.create_task(self.bus.run(), name="client bus")
        # Long enough for one attempt and a moment more: the bus then knows why it failed.
        attempt_seconds = self.settings.bus.connect_timeout_seconds + 1.0
        if self._member is not None:  # after the places that we know, mDNS is asked
            attempt_seconds += _FIND_SECONDS + attempt_seconds
        await self.bus.connected(min(self.settings.timeout_seconds, attempt_seconds))
        if self._needs_coordinator:
            await self.coordinator(limit_seconds)

    async def _close(self) -> None:
        running, self._running = self._running, None
        keeping, self._keeping = self._keeping, None
        for task in (running, keeping):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
                if not task.cancelled():
                    task.exception()  # it ended before us: callers were told that there is no connection
        await self._stack.aclose()

    async def _addresses(self, limit_seconds: float) -> Addresses:
        """Where the broker is: the seeds; else mDNS on loopback and on the network, whichever answers first; else what daemons here know.

        A coordinator that hangs does not answer by mDNS, but its broker still works. Raises Unavailable when nothing answers in time, and
        at once when every seed refuses: a daemon would wait, a client does not.
        """
        # imported here: the import takes time, and job clients do not need it
        from potluck.net.discovery import Discovery, broker_addresses, closed_to_clients

        settings = self.settings
        if settings.seeds or not settings.discovery.enabled:
            brokers = [parse_address(seed) for seed in settings.seeds]
            answering = await _knock(brokers, self.credentials, limit_seconds)
            first = sorted(settings.seeds, key=lambda seed: parse_address(seed) != answering)
            return broker_addresses(replace(settings, seeds=tuple(first)), None)
        found = [
            await self._stack.enter_async_context(Discovery(settings.cluster, listen_host=host))
            for host in ("127.0.0.1", "0.0.0.0")  # noqa: S104 - where to look, nothing is served
        ]
        seen = [
            discovery.wait_for(lambda one: one.role == "coordinator" and one.broker_port > 0, limit_seconds)
            for discovery in found
        ]
        local = [user for user in users_here() if user.cluster == settings.cluster]
        knocking = asyncio.create_task(
            _first_found([_knock_at(user.broker, self.credentials, limit_seconds) for user in local if user.broker])
        )
        try:
            heard = await _first_found(seen)
            known = await knocking if heard is None else None
        finally:
            knocking.cancel()
            await asyncio.wait([knocking])
        if heard is None:
            if known is not None:
                return broker_addresses(replace(settings, seeds=(known,)), None)
            advice = f"start one with `{typed('potluck up', settings.cluster)}`"
            if local:
                advice = f"{local[0]} runs on this machine: if it has just started, try again in a moment, else its log says why"
            if lost := [user for user in local if user.broker]:
                advice = (
                    f"{lost[0]} runs on this machine, but its broker, {lost[0].broker}, does not answer: is the broker's machine on, "
                    "and the network up"
                )
            raise Unavailable(
                f"no cluster {settings.cluster!r} was found: within {limit_seconds:g} s, no coordinator answered by mDNS on "
                f"{', '.join(dict.fromkeys(['127.0.0.1', *lan_addresses()]))}: {advice}, or name its "
                "broker with --seed HOST[:PORT]"
            )
        if heard.ca and not any(OPEN.broker(one) for discovery in found for one in discovery.services()):
            raise NotAuthenticated(closed_to_clients(settings.cluster, heard.host))
        sources = [broker_addresses(settings, discovery) for discovery in found]

        async def following() -> tuple[str, int]:
            asked = [asyncio.ensure_future(source()) for source in sources]
            try:
                reasons: list[Unavailable] = []
                for first in asyncio.as_completed(asked):
                    try:
                        return await first
                    except Unavailable as error:
                        reasons.append(error)
                raise reasons[-1]
            finally:
                for task in asked:
                    task.cancel()
                await asyncio.wait(asked)

        return following

    async def _closed_addresses(self, known: ClusterFile, side: Side, limit_seconds: float) -> Addresses:
        """Where the broker of our closed cluster is: the seeds that were named, else where it was when we last heard, and then mDNS.

        Whoever answers must have a certificate by the cluster's CA, so all may be tried. Raises Unavailable at once when every seed refuses.
        """
        from potluck.net.discovery import broker_addresses

        settings, port = self.settings, CLOSED_CLIENT_PORT
        if settings.seeds or not settings.discovery.enabled:
            brokers = [parse_address(seed, port) for seed in settings.seeds or known.brokers]
            answering = await _knock(brokers, self.credentials, limit_seconds)
            first = sorted(brokers, key=lambda broker: broker != answering)
            return broker_addresses(replace(settings, seeds=tuple(place(*one) for one in first)), None, side)
        left = [parse_address(one) for one in reversed(known.brokers)]
        asked: Addresses | None = None

        async def following() -> tuple[str, int]:
            nonlocal asked
            if left:
                return left.pop()
            if asked is None:
                asked = await self._discovered(known, side)
            return await asked()

        return following

    async def _discovered(self, known: ClusterFile, side: Side) -> Addresses:
        """The addresses that mDNS finds, on loopback or on the network, and those that we know."""
        from potluck.net.discovery import Discovery, broker_addresses

        found = [
            await self._stack.enter_async_context(Discovery(self.settings.cluster, listen_host=host))
            for host in ("127.0.0.1", "0.0.0.0")  # noqa: S104 - where to look, nothing is served
        ]
        await _first_found([one.wait_for(lambda one: side.broker(one) is not None, _FIND_SECONDS) for one in found])
        heard = next((one for one in found if any(side.broker(service) for service in one.services())), found[1])
        return broker_addresses(replace(self.settings, seeds=known.brokers), heard, side)

    async def _renew(self) -> None:
        """Renew our certificate if its time has come. If that fails, it is good for a while still."""
        from potluck import enrolment

        member = self._member
        if member is None or member.where is None:
            return
        if not member.ours:
            self._keeping = asyncio.create_task(
                enrolment.follow_renewed(member.where, "client", self.credentials), name="certificate"
            )
            return
        try:
            if enrolment.renewal_at(enrolment.own_certificate(member.where, "client")) <= time.time():
                async with asyncio.timeout(_RENEW_SECONDS):
                    await enrolment.renew(member.where, "client", self.credentials)
        except (PotluckError, TimeoutError) as error:
            log.warning("certificate not renewed %s", fields(reason=str(error) or "no answer in time"))
        self._keeping = asyncio.create_task(
            enrolment.keep_renewed(member.where, "client", self.credentials, self._servers), name="certificate"
        )

    def _check_role(self, question: Message) -> None:
        """Raises NotAllowed where the broker would drop our question without a word: in MQTT 3.1.1 it cannot say so."""
        if self._member is not None and isinstance(question, SubmitJob | Infer):
            roles.check(roles.Caller(self.credentials.identity, self._member.role), type(question))

    def _servers(self) -> tuple[str, ...]:
        """`host:port` of the coordinator's servers, as it last said."""
        placed_at = [placed(one) for one in (self._status.http if self._status is not None else ())]
        return tuple(one[1] for one in placed_at if one is not None)

    def _on_status(self, envelope: Envelope) -> None:
        message = envelope.message
        if not isinstance(message, CoordinatorStatus):
            return
        theirs = versions_of(message)
        self._foreign = None if OURS.shared(theirs) else theirs
        if self._foreign:
            return
        if message.state == "online":
            known = self._status
            # The coordinator was restarted, or away for a while. A retained message does not prove that it is there now.
            lost = (known is not None and (known.session != message.session or not self._online.is_set())) or self._cut
            self._cut = self._cut and envelope.retained
            self._status = message
            self._online.set()
            if lost:
                self._ask_again()
        elif self._status is None or self._status.session == message.session:
            self._online.clear()

    async def _connected(self) -> None:
        """Called after each connect. Inferences travel at QoS 0: the broker keeps none for a coordinator that is away.

        Before the first connect nothing was sent, so nothing was lost.
        """
        if self._was_connected:
            self._cut = self._status is not None
            self._ask_again()
        self._was_connected = True

    def _ask_again(self) -> None:
        for question_id in tuple(self._inferring):
            self.bus.give_up(question_id, _MayBeLost("the coordinator was away, or could not be reached"))

    async def coordinator(self, timeout_seconds: float | None = None) -> CoordinatorStatus:
        """The status of the coordinator, once it is online. Raises Unavailable."""
        if not self._online.is_set():
            limit = self.settings.timeout_seconds if timeout_seconds is None else timeout_seconds
            try:
                async with asyncio.timeout(limit):
                    await self._online.wait()
            except TimeoutError:
                cluster = self.settings.cluster
                if self._foreign:
                    raise Unavailable(
                        f"the coordinator of cluster {cluster!r} speaks version {self._foreign} of the protocol, but this program speaks version "
                        f"{OURS}: install the same potluck on both"
                    ) from None
                if self._member is not None:
                    raise Unavailable(
                        f"the broker answers, but no coordinator of the closed cluster {cluster!r} is online, or {self.credentials.identity} "
                        "was removed from it: its operator knows more"
                    ) from None
                advice = (
                    f"one runs on this machine and hangs, unless it has just started: `{typed('potluck status', cluster)}` says more"
                    if any(user.what == "coordinator" and user.cluster == cluster for user in users_here())
                    else f"start one with `{typed('potluck up', cluster)}` (or potluck-coordinator), or name another --cluster"
                )
                raise Unavailable(
                    f"the broker answers, but no coordinator of cluster {cluster!r} is online: {advice}"
                ) from None
        assert self._status is not None
        return self._status

    # --- questions ------------------------------------------------------------------------------------------------------

    async def ask(self, question: Message, answer: type[M], *, topic: str | None = None) -> M:
        """The coordinator's answer. Raises the error that the answer carries, TimedOut, Unavailable.

        A question may be sent more than once, with the same id; the coordinator then gives the same answer.
        """
        self._check_role(question)
        deadline = time.monotonic() + self.settings.timeout_seconds
        question_id = uuid.uuid4().hex
        if not self._online.is_set():
            await self.coordinator()
        while True:
            left = deadline - time.monotonic()
            again = not isinstance(question, Undeploy) and left > 2 * _ASK_AGAIN_SECONDS
            try:
                got = await self.bus.request(
                    topic or self.topics.coordinator_inbox,
                    replace(question, id=question_id),
                    timeout_seconds=_ASK_AGAIN_SECONDS if again else max(0.05, left),
                )
            except TimedOut:
                if not again:
                    raise
                continue
            return expect(got, answer)

    async def infer(self, name: str, question: Infer, timeout_seconds: float | None = None) -> Inferred:
        """One inference. It is sent again only where it was lost: more requests do not help an overloaded cluster.

        With `timeout_seconds`, the cluster knows the deadline of the request. Cancelling this cancels the request in the cluster.
        """
        self._check_role(question)
        limit_seconds = self.settings.timeout_seconds if timeout_seconds is None else timeout_seconds
        if timeout_seconds is not None:
            question = replace(question, expires=time.time() + timeout_seconds)
        deadline = time.monotonic() + limit_seconds
        question_id = uuid.uuid4().hex
        while True:
            left = max(0.05, deadline - time.monotonic())
            if self.bus.trouble():
                await self.bus.connected(left)
            if not self._online.is_set():
                await self.coordinator(left)
            if timeout_seconds is not None:  # counted from receipt: the coordinator's clock may differ
                question = replace(question, valid_seconds=left)
            self._inferring.add(question_id)
            try:
                got = await self.bus.request(
                    self.topics.infer(name), replace(question, id=question_id), timeout_seconds=left, qos=0
                )
            except _MayBeLost:
                continue
            except asyncio.CancelledError:
                await self._cancel(name, question_id)
                raise
            finally:
                self._inferring.discard(question_id)
            return expect(got, Inferred)

    async def _cancel(self, name: str, question_id: str) -> None:
        """Tell that nobody waits for this inference any more. Where that cannot be sent soon, it is computed for nothing."""
        message = CancelInfer(id=question_id, reply_to=self.topics.client_inbox(self.bus.client_id))
        try:
            async with asyncio.timeout(_CANCEL_SECONDS):
                await self.bus.publish(self.topics.infer(name), message, qos=0)
        except (TimeoutError, PotluckError) as error:
            log.info("inference not cancelled %s", fields(model=name, reason=str(error)))

    def follow(self, job_id: str, handler: Handler) -> Callable[[], None]:
        """Call `handler` with messages about a job, until the returned function is called."""
        followers = self._followers.setdefault(job_id, [])
        followers.append(handler)
        topics = [self.topics.job(job_id, leaf) for leaf in ("status", "result")]
        if len(followers) == 1:

            def on_message(envelope: Envelope) -> None:
                for follower in tuple(self._followers.get(job_id, ())):
                    follower(envelope)

            for topic in topics:
                self.bus.subscribe(topic, on_message)

        def leave() -> None:
            followers.remove(handler)
            if not followers and self._followers.pop(job_id, None) is not None:
                for topic in topics:
                    self.bus.unsubscribe(topic)

        return leave

    async def _blobs(self) -> Downloader:
        """Made on first use: HTTP is slow to import, and many questions do not need it."""
        async with self._making:
            if self._downloader is None:
                from potluck.blobs.download import Downloader

                self._downloader = await self._stack.enter_async_context(Downloader(self.store, self.credentials))
            return self._downloader

    # --- blobs ----------------------------------------------------------------------------------------------------------

    async def push(self, source: bytes | memoryview | Path) -> BlobRef:
        """Bring bytes or a file to the coordinator's store, unless they are there. Raises Unavailable, TooLarge."""
        status = await self.coordinator()
        if not status.http:
            raise Unavailable("the coordinator names no HTTP address to push blobs to: is it listening?")
        return await (await self._blobs()).push(source, status.http)

    @contextmanager
    def packing_store(self) -> Iterator[BlobStore]:
        """A temporary store for packing blobs before they are pushed; removed at the end of the block."""
        with tempfile.TemporaryDirectory(prefix="packing-", dir=self.folder, ignore_cleanup_errors=True) as folder:
            yield BlobStore(Path(folder), _STORE_LIMIT_BYTES)  # a cancelled thread may still write to the folder

    async def push_blobs(self, store: BlobStore, refs: Sequence[BlobRef], sent: Callable[[BlobRef], None]) -> None:
        """Push blobs of a local store, a few at a time; calls `sent` for each. The first error stops it and is raised, not in a group."""
        slots = asyncio.Semaphore(_PUSHES_AT_ONCE)

        async def one(ref: BlobRef) -> None:
            async with slots:
                await self.push(store.path(ref.sha256))
            sent(ref)

        try:
            async with asyncio.TaskGroup() as tasks:
                for ref in refs:
                    tasks.create_task(one(ref), name=f"push {ref.sha256[:12]}")
        except BaseExceptionGroup as group:
            if (known := expected(group)) is not None:
                raise known from None
            errors = [error for error in group.exceptions if isinstance(error, PotluckError)]
            raise (errors or group.exceptions)[0] from group  # other errors show in its traceback

    async def send_inputs(self, data: bytes | memoryview, base: str) -> BlobRef:
        """Send a request's inputs to a node at this address. Raises Unavailable, soon if the node cannot be reached."""
        return await (await self._blobs()).send_inputs(data, base, _NODE_CONNECT_SECONDS)

    async def fetch(self, ref: BlobRef) -> Path:
        """A local file with the bytes of `ref`. Raises Unavailable, CorruptBlob."""
        if not ref.holders:
            ref = BlobRef(sha256=ref.sha256, size=ref.size, holders=(await self.coordinator()).http)
        return await (await self._blobs()).fetch(ref)


async def _knock(brokers: Sequence[tuple[str, int]], credentials: Credentials, limit_seconds: float) -> tuple[str, int]:
    """The first broker that accepts a connection. Raises Unavailable, with the reason of each, as soon as none is left."""
    reasons: dict[str, str] = {}

    async def knock(host: str, port: int) -> tuple[str, int] | None:
        if why := await refusal(host, port, credentials, limit_seconds):
            reasons[f"{host}:{port}"] = why
            return None
        return host, port

    if not brokers:
        raise Unavailable("no broker is known: name one with --seed HOST[:PORT], or turn discovery on")
    if (answering := await _first_found([knock(*broker) for broker in brokers])) is not None:
        return answering
    where = "; ".join(f"{place} ({reason})" for place, reason in reasons.items())
    raise Unavailable(
        f"no broker answers at {where}: start a cluster there with `potluck up`, or name another one with --seed HOST[:PORT]"
    )


async def _knock_at(place: str, credentials: Credentials, limit_seconds: float) -> str | None:
    """`place` (`host:port`) when it accepts a connection, else None."""
    try:
        await _knock([parse_address(place)], credentials, limit_seconds)
    except Unavailable:
        return None
    return place


async def _first_found(asked: Sequence[Awaitable[T | None]]) -> T | None:
    """The first result that is not None; cancels the rest. None when all results are None."""
    if not asked:
        return None
    running = [asyncio.ensure_future(one) for one in asked]
    try:
        for first in asyncio.as_completed(running):
            if (found := await first) is not None:
                return found
        return None
    finally:
        for task in running:
            task.cancel()
        await asyncio.wait(running)


def expect(message: Message, kind: type[M]) -> M:
    """`message`, if it has the type that answers the question. Raises InvalidRequest otherwise."""
    if not isinstance(message, kind):
        raise InvalidRequest(
            f"the coordinator answered with {type(message).__name__} where {kind.__name__} was expected: "
            "its version differs from this client's"
        )
    return message


def client_file() -> Path:
    """Where a user's client settings are, if there are any."""
    return config_folder() / "client.toml"


def client_settings(
    seed: str | Sequence[str] | None,
    cluster: str | None,
    timeout: float | None,
    credentials: str | Path | None = None,
) -> ClientSettings:
    """Settings from `client_file()`, if it exists, from `POTLUCK_*`, and from these arguments.

    Raises InvalidSettings, and InvalidRequest for arguments of wrong types.
    """
    given = (seed,) if isinstance(seed, str) else seed or ()
    seeds = checked("seed", given, tuple[str, ...], "a broker address (`host` or `host:port`), or several")
    checked("cluster", cluster, str | None, "the name of a cluster")
    checked("timeout", timeout, PositiveSeconds | None, "a number of seconds above 0")
    folder = str(credentials) if isinstance(credentials, Path) else credentials
    checked("credentials", folder, str | None, "the path of a folder with credentials")
    path = client_file()
    return load(
        ClientSettings,
        path if path.is_file() else None,
        {
            "seeds": [one for one in seeds if one] or None,
            "cluster": cluster,
            "timeout_seconds": timeout,
            "credentials": folder or None,
        },
    )
