"""How a daemon starts, tells systemd, and stops: signals, sd_notify, and children that die with their parent."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from potluck import logs
from potluck.errors import PotluckError
from potluck.settings import CoordinatorSettings, NodeSettings

log = logging.getLogger(__name__)

S = TypeVar("S", NodeSettings, CoordinatorSettings)

_PR_SET_PDEATHSIG = 1
_notify_address = ""


def notify(state: str) -> None:
    """Tell systemd `READY=1`, `STOPPING=1`, `STATUS=...` (sd_notify(3)); nothing happens outside of a unit."""
    address = _notify_address or os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.connect(address)
        sock.sendall(state.encode())


def _keep_notify_socket() -> None:
    """Take NOTIFY_SOCKET out of the environment: our children (a broker, an engine) are not to speak to systemd for us."""
    global _notify_address
    _notify_address = os.environ.pop("NOTIFY_SOCKET", "")


def stop_event(loop: asyncio.AbstractEventLoop) -> asyncio.Event:
    """An event that SIGTERM or SIGINT sets; the second signal ends the process at once."""
    event = asyncio.Event()

    def on_signal(number: int) -> None:
        if event.is_set():
            os._exit(128 + number)
        event.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return event


def die_with_parent() -> Callable[[], None] | None:
    """A `preexec_fn` for subprocess: the child gets SIGKILL when its parent's thread ends (prctl(2)); None off Linux.

    The library is loaded here, before the fork: afterwards only async-signal-safe work is allowed.
    """
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def set_death_signal() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before prctl took effect
            os._exit(1)

    return set_death_signal


def add_daemon_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that all daemons have."""
    parser.add_argument("--config", metavar="FILE", help="settings in TOML (examples in configs/)")
    parser.add_argument("--cluster", metavar="NAME", help="the cluster's name (default: default)")
    parser.add_argument("--listen", metavar="ADDRESS", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="HTTP port (default: any free one)")
    parser.add_argument(
        "--insecure", action="store_true", default=None, help="allow --listen beyond loopback, unencrypted"
    )
    parser.add_argument("--state-dir", metavar="FOLDER", help="where everything that must last is kept")
    parser.add_argument("--no-discovery", dest="discovery", action="store_false", default=None, help="do not use mDNS")
    parser.add_argument("--log-level", metavar="LEVEL", help="DEBUG, INFO, WARNING or ERROR (default: INFO)")


def daemon_flags(arguments: argparse.Namespace) -> dict[str, object]:
    """Their values by the names of the settings; None where a flag was not given."""
    return {
        "cluster": arguments.cluster,
        "listen.host": arguments.listen,
        "listen.port": arguments.port,
        "listen.insecure": arguments.insecure,
        "state_dir": arguments.state_dir,
        "discovery.enabled": arguments.discovery,
        "log_level": arguments.log_level,
    }


def run_daemon(name: str, read_settings: Callable[[], S], serve: Callable[[S], Coroutine[Any, Any, None]]) -> None:
    """Read the settings, configure the logs, serve, and exit: with the code of the PotluckError that ended it, if one did."""
    try:
        settings = read_settings()
        logs.configure(settings.log_level)
        _keep_notify_socket()
        if settings.listen.insecure:
            log.warning("INSECURE: %s listens on %s without encryption or identities", name, settings.listen.host)
        # What is imported stays: without this each full collection looks at all of it, and nobody is answered meanwhile.
        gc.collect()
        gc.freeze()
        asyncio.run(serve(settings))
    except* PotluckError as group:
        found: BaseException = group
        while isinstance(found, BaseExceptionGroup):
            found = found.exceptions[0]
        assert isinstance(found, PotluckError)
        sys.stderr.write(f"{name}: {found.message}\n")
        sys.exit(found.exit_code)
