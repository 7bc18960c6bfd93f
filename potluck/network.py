"""This machine's addresses, as others on the network reach it."""

from __future__ import annotations

import socket
from ipaddress import ip_address

import psutil

from potluck.errors import CannotListen
from potluck.settings import Listen, is_loopback

# Bridges and tunnels of containers and VPNs: reachable from this machine only, or not meant for us.
_PRIVATE_PREFIXES = ("lo", "docker", "br-", "virbr", "tun", "tap", "cni", "flannel", "podman")
_LAST_RESORT_PREFIXES = ("veth",)


def lan_addresses() -> list[str]:
    """IPv4 addresses of the interfaces that are up, without loopback, container bridges and tunnels.

    veth interfaces count only where nothing else is there: inside a container or a network namespace they are the network.
    """
    stats = psutil.net_if_stats()
    found: dict[str, list[str]] = {}
    for name, addresses in psutil.net_if_addrs().items():
        if name in stats and not stats[name].isup:
            continue
        usable = [a.address for a in addresses if a.family == socket.AF_INET and not ip_address(a.address).is_loopback]
        if usable and not name.startswith(_PRIVATE_PREFIXES):
            found[name] = usable
    first = {name: usable for name, usable in found.items() if not name.startswith(_LAST_RESORT_PREFIXES)}
    return [address for usable in (first or found).values() for address in usable]


def reachable_addresses(listen_host: str) -> list[str]:
    """The addresses at which a server that listens on `listen_host` can be reached."""
    if listen_host in ("0.0.0.0", "::", ""):  # noqa: S104 - recognised, not bound
        return lan_addresses() or ["127.0.0.1"]
    return ["127.0.0.1"] if is_loopback(listen_host) and listen_host == "localhost" else [listen_host]


def base_urls(listen_host: str, port: int) -> tuple[str, ...]:
    """`http://<address>:<port>` for each of them."""
    hosts = (f"[{address}]" if ":" in address else address for address in reachable_addresses(listen_host))
    return tuple(f"http://{host}:{port}" for host in hosts)


def bind(listen: Listen) -> socket.socket:
    """A bound TCP socket, so that its port is known before the server starts. Raises CannotListen when it cannot be had."""
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((listen.host, listen.port))
    except OSError as error:
        sock.close()
        raise CannotListen(
            f"cannot listen on {listen.host}:{listen.port}: {error.strerror}: choose another --port or --listen"
        ) from error
    sock.setblocking(False)
    return sock
