"""This machine's addresses, as others on the network reach it."""

from __future__ import annotations

import errno
import logging
import socket
from ipaddress import ip_address

import psutil

from potluck.errors import CannotListen
from potluck.logs import fields
from potluck.settings import GATEWAY_PORT, Listen
from potluck.wire.addresses import Scheme, address

log = logging.getLogger(__name__)

GATEWAY_TRIES = 20
"""How many ports are tried, from GATEWAY_PORT up, before any free port is taken."""

# Bridges and tunnels of containers and VPNs: reachable from this machine only, or not meant for us.
_PRIVATE_PREFIXES = ("lo", "docker", "br-", "virbr", "tun", "tap", "cni", "flannel", "podman")
_LAST_RESORT_PREFIXES = ("veth",)


def lan_addresses() -> list[str]:
    """IPv4 addresses of the interfaces that are up, without loopback, container bridges and tunnels.

    veth interfaces count only if there are no others: inside a container or a network namespace they are the network.
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
    if listen_host in ("0.0.0.0", "::", ""):  # noqa: S104 - compared, not bound
        return lan_addresses() or ["127.0.0.1"]
    return ["127.0.0.1"] if listen_host == "localhost" else [listen_host]


def base_urls(listen_host: str, port: int, scheme: Scheme) -> tuple[str, ...]:
    """The addresses of an HTTP server that listens there."""
    return tuple(address(host, port, scheme) for host in reachable_addresses(listen_host))


def bind(listen: Listen, option: str = "--port (listen.port)", *, listening: bool = True) -> socket.socket:
    """A bound TCP socket, so that its port is known before the server starts. Unless `listening`, another program may still take the port.

    Raises CannotListen when the port cannot be had: the text says which program has it, and which `option` chooses another port.
    """
    try:
        return _bound(listen.host, listen.port, listening)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise CannotListen(taken_text(listen.host, listen.port, option)) from error
        raise CannotListen(
            f"cannot listen on {listen.host}:{listen.port}: {error.strerror}: choose another --listen (listen.host) or {option}"
        ) from error


def bind_gateway(listen: Listen) -> socket.socket:
    """Like `bind`. If another program has GATEWAY_PORT, this takes the next free port, and logs it."""
    if listen.port == GATEWAY_PORT:
        for port in (*range(GATEWAY_PORT, GATEWAY_PORT + GATEWAY_TRIES), 0):
            try:
                sock = _bound(listen.host, port, listening=True)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    break  # no other port would help: `bind` says why
                continue
            if port != GATEWAY_PORT:
                taken = fields(host=listen.host, port=GATEWAY_PORT, by=port_user(GATEWAY_PORT) or None)
                log.warning(
                    "gateway port taken, using the next free one %s %s", taken, fields(now=sock.getsockname()[1])
                )
            return sock
    return bind(listen)


def taken_text(host: str, port: int, option: str) -> str:
    """One sentence about a port that another program has, and the option that chooses another."""
    user = port_user(port)
    return f"port {port} on {host} is taken{f' by {user}' if user else ''}: choose another one with {option} (0: any free one)"


def port_user(port: int) -> str:
    """Which program listens on a TCP port of this machine, as `nginx (pid 17)`; "" if we cannot find out."""
    try:
        for one in psutil.net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN and one.laddr.port == port and one.pid:
                return f"{psutil.Process(one.pid).name()} (pid {one.pid})"
    except (psutil.Error, OSError) as error:
        log.debug("the program on a port is not known %s", fields(port=port, reason=str(error)))
    return ""


def _bound(host: str, port: int, listening: bool) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        if listening:  # with SO_REUSEADDR, two sockets may be bound to a port until one listens
            sock.listen()
    except BaseException:
        sock.close()
        raise
    sock.setblocking(False)
    return sock
