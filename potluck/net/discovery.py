"""Who is on the network: mDNS service discovery (RFC 6762, RFC 6763). The only import of zeroconf.

It gives hints, never identities: the bus that it leads to checks who answers. Static seeds work without it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from zeroconf import Error as ZeroconfError
from zeroconf import IPVersion, NonUniqueNameException, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from potluck.errors import Unavailable
from potluck.logs import fields
from potluck.net.addresses import lan_addresses, reachable_addresses
from potluck.net.side import CA_DIGITS, CLOSED_CLIENT_PORT, CLOSED_PORT, OPEN, Side
from potluck.settings import BROKER_PORT, NetworkSettings, is_loopback, parse_address, typed
from potluck.wire.births import PROTOCOL_VERSION

log = logging.getLogger(__name__)

SERVICE_TYPE = "_potluck._tcp.local."
RESOLVE_MILLISECONDS = 3000
FIND_SECONDS = 5.0
ASKS_SECONDS = 4.0
"""A new browser asks again and again by itself for this long."""
ANY_CLUSTER = ""
"""As the cluster of a Discovery: whoever has a join token does not know the name of its cluster."""
_CA = re.compile(f"[0-9a-f]{{{CA_DIGITS}}}")
SERVICES_LIMIT = 10_000
"""How many services are known at once."""
NAMES = 5
"""How many names are tried before an advertisement is given up."""

Role = Literal["node", "coordinator", "candidate"]


@dataclass(frozen=True)
class Service:
    """What a daemon says of itself. `port` is the port of its HTTP server, `broker_port` the port of its broker (0: it has none).

    `broker_host` is empty when the broker runs where the daemon does.
    """

    id: str
    cluster: str
    role: Role
    host: str
    port: int
    broker_port: int = 0
    broker_host: str = ""
    cores: int = 0
    memory_bytes: int = 0
    gpus: int = 0
    version: int = PROTOCOL_VERSION
    founded: int = 0
    """Of a coordinator: when its journal began, as Unix time in seconds."""
    empty: bool = False
    """Of a coordinator: whether its journal keeps nothing yet."""
    ca: str = ""
    """Of a closed cluster: the first CA_DIGITS hexadecimal digits of the SHA-256 of its CA's public key; "": it is open."""
    client_port: int = 0
    """Of a coordinator of a closed cluster: the broker's port for clients."""


class Discovery:
    """Browses for the services of one cluster (or ANY_CLUSTER), and advertises one of our own; an async context manager.

    Works only on loopback when `listen_host` is a loopback address, else on the interfaces of the network. `refresh` looks at
    the interfaces again.
    """

    def __init__(self, cluster: str, *, listen_host: str = "127.0.0.1") -> None:
        self._cluster = cluster
        self._listen_host = listen_host
        self._interfaces: list[str] = []
        self._zeroconf: AsyncZeroconf | None = None
        self._browser: AsyncServiceBrowser | None = None
        self._browsing_since = 0.0
        self._found: dict[str, Service] = {}
        self._changed = asyncio.Event()
        self._resolving: dict[str, asyncio.Task[None]] = {}
        self._service: Service | None = None
        self._info: AsyncServiceInfo | None = None
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> Self:
        """Raises Unavailable where there is no multicast."""
        self._open(self._usable())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        async with self._lock:
            await self._close()

    async def advertise(self, service: Service) -> None:
        """Let others find us, under another name if ours is taken. Raises Unavailable."""
        async with self._lock:
            self._service = service
            await self._register(service)

    async def update(self, service: Service) -> None:
        """Change what we advertise: withdraw, and advertise again (the role may have changed)."""
        async with self._lock:
            await self._unregister()
            self._service = service
            await self._register(service)

    async def withdraw(self) -> None:
        """Take the advertisement back, so that nobody has to wait for its time to live."""
        async with self._lock:
            self._service = None
            await self._unregister()

    async def refresh(self) -> bool:
        """Use the network as it is now. Returns whether it has changed: a cable was plugged in, an address came late.

        After a change, all services must be found again. Raises Unavailable.
        """
        interfaces = self._usable()
        if interfaces == self._interfaces:
            return False
        async with self._lock:
            log.info("mDNS moves %s", fields(before=",".join(self._interfaces) or None, now=",".join(interfaces)))
            self._interfaces = []
            await self._close()
            self._found.clear()
            try:
                self._open(interfaces)
                if self._service is not None:
                    await self._register(self._service)
            except Unavailable:
                self._interfaces = []  # the next call tries again
                raise
        return True

    async def look_again(self) -> None:
        """Ask the network once more who is there. A browser asks only when it begins; after that, it hears new announcements.

        If a cable or a switch was out when a daemon announced itself, only this finds the daemon. Raises Unavailable.
        """
        async with self._lock:
            if self._zeroconf is None or time.monotonic() - self._browsing_since < ASKS_SECONDS:
                return
            try:
                # A browser that is ended before zeroconf has started takes zeroconf with it.
                await self._zeroconf.zeroconf.async_wait_for_start()
            except ZeroconfError as error:
                raise Unavailable(f"mDNS has not started: {error!r}") from error
            before, self._browser = self._browser, self._browse(self._zeroconf)
            if before is not None:
                await before.async_cancel()

    def services(self, role: Role | None = None) -> list[Service]:
        """The services known now, sorted by id."""
        found = (service for service in self._found.values() if role is None or service.role == role)
        return sorted(found, key=lambda service: service.id)

    async def wait_for(self, predicate: Callable[[Service], bool], timeout_seconds: float) -> Service | None:
        """The first service that fits; None when none does in time."""
        try:
            async with asyncio.timeout(timeout_seconds):
                while True:
                    self._changed.clear()
                    for service in self.services():
                        if predicate(service):
                            return service
                    await self._changed.wait()
        except TimeoutError:
            return None

    def _usable(self) -> list[str]:
        return ["127.0.0.1"] if is_loopback(self._listen_host) else lan_addresses() or ["127.0.0.1"]

    def _open(self, interfaces: list[str]) -> None:
        # IPv4 only: beside another mDNS responder, IPv6 sockets fail with EADDRINUSE, and every link here has IPv4.
        try:
            self._zeroconf = AsyncZeroconf(interfaces=list(interfaces), ip_version=IPVersion.V4Only)
        except OSError as error:
            raise Unavailable(
                f"mDNS cannot be used on {', '.join(interfaces)} ({error}): name the broker with --seed HOST"
            ) from error
        self._interfaces = interfaces
        self._browser = self._browse(self._zeroconf)

    def _browse(self, zeroconf: AsyncZeroconf) -> AsyncServiceBrowser:
        self._browsing_since = time.monotonic()
        return AsyncServiceBrowser(zeroconf.zeroconf, SERVICE_TYPE, handlers=[self._on_change])

    async def _close(self) -> None:
        await self._unregister()
        for task in self._resolving.values():
            task.cancel()
        await asyncio.gather(*self._resolving.values(), return_exceptions=True)
        browser, self._browser = self._browser, None
        opened, self._zeroconf = self._zeroconf, None
        if browser is not None:
            await browser.async_cancel()
        if opened is not None:
            await opened.async_close()

    async def _register(self, service: Service) -> None:
        if self._zeroconf is None:
            raise Unavailable("mDNS is not usable now: the network went away")
        for attempt in range(NAMES):
            info = _info(service, _label(service, attempt), self._listen_host)
            try:
                # A random id needs no probes (750 ms). A node's id may be set by hand, and so be the same on two machines.
                await self._zeroconf.async_register_service(info, cooperating_responders=service.role != "node")
            except NonUniqueNameException:
                log.info("mDNS name taken %s", fields(name=info.name))
                continue
            except ZeroconfError as error:
                raise Unavailable(f"{service.id} cannot be advertised by mDNS: {error!r}") from error
            self._info = info
            return
        raise Unavailable(f"mDNS names like {service.id} are all taken on this network")

    async def _unregister(self) -> None:
        info, self._info = self._info, None
        if info is not None and self._zeroconf is not None:
            await (await self._zeroconf.async_unregister_service(info))

    def _on_change(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        resolving = self._resolving.pop(name, None)
        if resolving is not None:
            resolving.cancel()
        if state_change is ServiceStateChange.Removed:
            if self._found.pop(name, None) is not None:
                self._changed.set()
            return
        if name not in self._found and len(self._found) + len(self._resolving) >= SERVICES_LIMIT:
            return  # anybody on the network may announce any number
        task = asyncio.create_task(self._resolve(zeroconf, name), name=f"resolve {name}")
        self._resolving[name] = task
        task.add_done_callback(lambda done: self._resolving.get(name) is done and self._resolving.pop(name))

    async def _resolve(self, zeroconf: Zeroconf, name: str) -> None:
        info = AsyncServiceInfo(SERVICE_TYPE, name)
        try:
            if not await info.async_request(zeroconf, RESOLVE_MILLISECONDS):
                return
        except ZeroconfError as error:  # zeroconf has ended meanwhile, or never started
            log.debug("not resolved %s", fields(name=name[:100], reason=repr(error)))
            return
        service = _service(info)
        if service is not None and self._cluster in (ANY_CLUSTER, service.cluster):
            self._found[name] = service
            self._changed.set()


def precedence(coordinator: Service) -> tuple[bool, int, str]:
    """A sort key for coordinators of one cluster name, so that all try the same one first: one that keeps something, then the oldest."""
    return coordinator.empty, coordinator.founded, coordinator.id


def broker_addresses(
    network: NetworkSettings, discovery: Discovery | None, side: Side = OPEN
) -> Callable[[], Awaitable[tuple[str, int]]]:
    """Where the broker may be. The bus asks this before each attempt to connect: first the seeds in turn, then the coordinators found.

    Raises Unavailable when there is nothing to try within a few seconds; the text says what was looked for.
    """
    port = BROKER_PORT if not side.ca else CLOSED_CLIENT_PORT if side.client else CLOSED_PORT
    seeds = [parse_address(seed, port) for seed in network.seeds]
    tried_at: dict[tuple[str, int], int] = {}
    attempts = 0

    def found() -> list[tuple[str, int]]:
        services = sorted(discovery.services("coordinator"), key=precedence) if discovery is not None else []
        return [broker for one in services if (broker := side.broker(one)) is not None]

    def missing() -> str:
        kept_out = any(one.ca for one in discovery.services("coordinator")) if discovery is not None else False
        if kept_out and not side.ca:
            return closed_text(network.cluster)
        return f"no coordinator of {'the closed ' if side.ca else ''}cluster {network.cluster!r} is found by mDNS yet"

    async def following() -> tuple[str, int]:
        nonlocal attempts
        if discovery is not None:
            await discovery.refresh()
        elif not seeds:
            raise Unavailable("no broker is known: name one with --seed HOST, or do not turn discovery off")
        choices = [*seeds, *found()]
        if not choices and discovery is not None:
            await discovery.look_again()
            await discovery.wait_for(lambda one: side.broker(one) is not None, FIND_SECONDS)
            choices = found()
        if not choices:
            raise Unavailable(missing())
        # The address tried longest ago, or never: the new address of a coordinator that moved comes before its old one.
        address = min(choices, key=lambda choice: tried_at.get(choice, 0))
        attempts += 1
        tried_at[address] = attempts
        for gone in tried_at.keys() - set(choices):
            del tried_at[gone]
        return address

    return following


def closed_text(cluster: str, host: str = "") -> str:
    """What to tell a daemon without credentials that finds a closed cluster."""
    create = typed("potluck token create", cluster)
    return (
        f"cluster {cluster!r} is closed. To let this machine work for it, type `{create}` on {_machine(host)}, and here the `potluck join` "
        "that it shows"
    )


def closed_to_clients(cluster: str, host: str = "") -> str:
    """What to tell a command without credentials that finds a closed cluster. A node's credentials on its machine are not the commands'."""
    create = typed("potluck token create --role user", cluster)
    return (
        f"cluster {cluster!r} is closed, and only its nodes and clients may ask. To ask from here, type `{create}` on {_machine(host)}, "
        "and here the `potluck join` that it shows"
    )


def _machine(host: str) -> str:
    return f"the coordinator's machine ({host})" if host else "the coordinator's machine"


def _label(service: Service, attempt: int) -> str:
    """The instance's name (RFC 6763, section 4.1.1: at most 63 bytes). It has a hash, as nodes of two clusters may have the same id."""
    told_apart = hashlib.sha256(f"{service.cluster} {service.role} {service.id}".encode()).hexdigest()[:6]
    readable = "".join(sign if sign.isalnum() else "-" for sign in service.id[:40])
    return f"{readable}-{told_apart}" + (f"-{attempt + 1}" if attempt else "")


def _info(service: Service, label: str, listen_host: str) -> AsyncServiceInfo:
    facts = {
        "id": service.id,
        "cluster": service.cluster,
        "role": service.role,
        "port": str(service.port),
        "broker": str(service.broker_port),
        "broker_host": service.broker_host,
        "cores": str(service.cores),
        "memory": str(service.memory_bytes),
        "gpus": str(service.gpus),
        "v": str(service.version),
        "founded": str(service.founded),
        "empty": str(int(service.empty)),
    }
    if service.ca:
        facts |= {"ca": service.ca, "clients": str(service.client_port)}
    return AsyncServiceInfo(
        SERVICE_TYPE,
        f"{label}.{SERVICE_TYPE}",
        addresses=[socket.inet_aton(address) for address in _ipv4(listen_host)],
        port=service.port,
        properties=facts,
        # Not the host's own name: it belongs to the host's own responder (avahi), which would rename the host to "-2".
        server=f"{label}.local.",
    )


def _ipv4(listen_host: str) -> list[str]:
    return [address for address in reachable_addresses(listen_host) if ":" not in address] or ["127.0.0.1"]


_NUMBERS = ("port", "broker", "cores", "memory", "gpus", "v", "founded", "empty", "clients")
_PORTS = ("port", "broker", "clients")


def _service(info: AsyncServiceInfo) -> Service | None:
    """The service in a record; None if it is not ours, or cannot be read."""
    facts = info.decoded_properties
    addresses = info.parsed_addresses(IPVersion.V4Only)
    id, role = facts.get("id"), facts.get("role")
    if not addresses or not id or role not in ("node", "coordinator", "candidate"):
        return None
    try:
        numbers = {key: int(facts.get(key) or 0) for key in _NUMBERS}
    except ValueError:
        return None
    broker_host, ca = facts.get("broker_host") or "", facts.get("ca") or ""
    if not (id.isprintable() and broker_host.isprintable() and min(numbers.values()) >= 0):
        return None
    if max(numbers[port] for port in _PORTS) > 65535 or max(numbers.values()) >= 2**53:
        return None
    if ca and not _CA.fullmatch(ca):
        return None  # neither an open cluster's nor a closed one's
    return Service(
        id=id,
        cluster=facts.get("cluster") or "",
        role=role,  # type: ignore[arg-type]
        host=_nearest(addresses),
        port=numbers["port"],
        broker_port=numbers["broker"],
        broker_host=broker_host,
        cores=numbers["cores"],
        memory_bytes=numbers["memory"],
        gpus=numbers["gpus"],
        version=numbers["v"],
        founded=numbers["founded"],
        empty=bool(numbers["empty"]),
        ca=ca,
        client_port=numbers["clients"],
    )


def _nearest(addresses: list[str]) -> str:
    """The first address whose first three octets are those of an address of ours; if there is none, the first."""
    ours = {address.rpartition(".")[0] for address in lan_addresses()}
    return next((address for address in addresses if address.rpartition(".")[0] in ours), addresses[0])
