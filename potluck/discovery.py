"""Who is on the network: mDNS service discovery (RFC 6762, RFC 6763). The only import of zeroconf.

It is a hint, never identity: what answers is checked by the bus it leads to, and static seeds work without it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from zeroconf import IPVersion, NonUniqueNameException, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from potluck.errors import Unavailable
from potluck.logs import fields
from potluck.messages import PROTOCOL_VERSION
from potluck.network import lan_addresses, reachable_addresses
from potluck.settings import NetworkSettings, is_loopback, parse_address

log = logging.getLogger(__name__)

SERVICE_TYPE = "_potluck._tcp.local."
RESOLVE_MILLISECONDS = 3000
FIND_SECONDS = 5.0

Role = Literal["node", "coordinator", "candidate"]


@dataclass(frozen=True)
class Service:
    """What a daemon says of itself. `port` is that of its HTTP server, `broker_port` that of the bus (0: it has none).

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


class Discovery:
    """Browses for the services of one cluster, and advertises one of our own; an async context manager.

    Works on loopback alone when `listen_host` is a loopback address, else on the interfaces of the network.
    """

    def __init__(self, cluster: str, *, listen_host: str = "127.0.0.1") -> None:
        self._cluster = cluster
        self._interfaces = ["127.0.0.1"] if is_loopback(listen_host) else lan_addresses() or ["127.0.0.1"]
        self._listen_host = listen_host
        self._zeroconf: AsyncZeroconf | None = None
        self._browser: AsyncServiceBrowser | None = None
        self._found: dict[str, Service] = {}
        self._changed = asyncio.Event()
        self._resolving: set[asyncio.Task[None]] = set()
        self._info: AsyncServiceInfo | None = None

    async def __aenter__(self) -> Self:
        # IPv4 alone: beside another responder, IPv6 sockets end in EADDRINUSE, and every link here has IPv4.
        try:
            self._zeroconf = AsyncZeroconf(interfaces=self._interfaces, ip_version=IPVersion.V4Only)
        except OSError as error:
            raise Unavailable(
                f"mDNS cannot be used on {', '.join(self._interfaces)} ({error}): name the broker with --seed HOST"
            ) from error
        self._browser = AsyncServiceBrowser(self._zeroconf.zeroconf, SERVICE_TYPE, handlers=[self._on_change])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.withdraw()
        for task in list(self._resolving):
            task.cancel()
        await asyncio.gather(*self._resolving, return_exceptions=True)
        if self._browser is not None:
            await self._browser.async_cancel()
        if self._zeroconf is not None:
            await self._zeroconf.async_close()

    async def advertise(self, service: Service) -> None:
        """Let others find us, under another name when ours is taken."""
        for attempt in range(5):
            label = service.id if attempt == 0 else f"{service.id}-{attempt + 1}"
            info = _info(service, label, self._listen_host)
            try:
                # Unique by its random id, so that the probes (750 ms) tell nothing new.
                await self._open_zeroconf().async_register_service(info, cooperating_responders=True)
            except NonUniqueNameException:
                log.info("mDNS name taken %s", fields(name=label))
                continue
            self._info = info
            return
        raise Unavailable(f"mDNS names like {service.id} are all taken on this network")

    async def update(self, service: Service) -> None:
        """Say something else of ourselves: withdraw, and advertise anew (a role may have changed)."""
        await self.withdraw()
        await self.advertise(service)

    async def withdraw(self) -> None:
        """Take the advertisement back, so that nobody has to wait for its time to live."""
        info, self._info = self._info, None
        if info is not None:
            await (await self._open_zeroconf().async_unregister_service(info))

    def services(self, role: Role | None = None) -> list[Service]:
        """What is known now, by id."""
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

    def _open_zeroconf(self) -> AsyncZeroconf:
        assert self._zeroconf is not None
        return self._zeroconf

    def _on_change(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is ServiceStateChange.Removed:
            if self._found.pop(name, None) is not None:
                self._changed.set()
            return
        task = asyncio.create_task(self._resolve(zeroconf, name), name=f"resolve {name}")
        self._resolving.add(task)
        task.add_done_callback(self._resolving.discard)

    async def _resolve(self, zeroconf: Zeroconf, name: str) -> None:
        info = AsyncServiceInfo(SERVICE_TYPE, name)
        if not await info.async_request(zeroconf, RESOLVE_MILLISECONDS):
            return
        service = _service(info)
        if service is not None and service.cluster == self._cluster:
            self._found[name] = service
            self._changed.set()


def broker_addresses(network: NetworkSettings, discovery: Discovery | None) -> Callable[[], Awaitable[tuple[str, int]]]:
    """Where the bus may be, asked before each attempt to connect: the seeds in turn, then the coordinators that are found.

    Raises Unavailable when there is nothing to try within a few seconds, saying what was looked for.
    """
    seeds = [parse_address(seed) for seed in network.seeds]
    position = -1

    async def following() -> tuple[str, int]:
        nonlocal position
        position += 1
        if discovery is None:
            if not seeds:
                raise Unavailable("no broker is known: name one with --seed HOST, or do not turn discovery off")
            return seeds[position % len(seeds)]
        found = [
            (service.broker_host or service.host, service.broker_port)
            for service in discovery.services("coordinator")
            if service.broker_port
        ]
        choices = [*seeds, *found]
        if choices:
            return choices[position % len(choices)]
        service = await discovery.wait_for(lambda one: one.role == "coordinator" and one.broker_port > 0, FIND_SECONDS)
        if service is None:
            raise Unavailable(f"no coordinator of cluster {network.cluster!r} is found by mDNS yet")
        return service.broker_host or service.host, service.broker_port

    return following


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
    }
    return AsyncServiceInfo(
        SERVICE_TYPE,
        f"{label}.{SERVICE_TYPE}",
        addresses=[socket.inet_aton(address) for address in _ipv4(listen_host)],
        port=service.port,
        properties=facts,
        # The host's own name belongs to its own responder (avahi): it would be renamed "-2".
        server=f"{label}.local.",
    )


def _ipv4(listen_host: str) -> list[str]:
    return [address for address in reachable_addresses(listen_host) if ":" not in address] or ["127.0.0.1"]


def _service(info: AsyncServiceInfo) -> Service | None:
    """None for what is not ours, or speaks another version of the protocol's TXT record."""
    facts = info.decoded_properties
    addresses = info.parsed_addresses(IPVersion.V4Only)
    role = facts.get("role")
    if not addresses or role not in ("node", "coordinator", "candidate"):
        return None
    try:
        return Service(
            id=facts.get("id") or "",
            cluster=facts.get("cluster") or "",
            role=role,  # type: ignore[arg-type]
            host=_nearest(addresses),
            port=int(facts.get("port") or 0),
            broker_port=int(facts.get("broker") or 0),
            broker_host=facts.get("broker_host") or "",
            cores=int(facts.get("cores") or 0),
            memory_bytes=int(facts.get("memory") or 0),
            gpus=int(facts.get("gpus") or 0),
            version=int(facts.get("v") or 0),
        )
    except ValueError:
        return None


def _nearest(addresses: list[str]) -> str:
    """The address in a network that we are in too, by its first three octets; else the first."""
    ours = {address.rpartition(".")[0] for address in lan_addresses()}
    return next((address for address in addresses if address.rpartition(".")[0] in ours), addresses[0])
