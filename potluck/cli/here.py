"""What of potluck runs on this machine: by its locks, its system services, and mDNS."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from potluck.credentials import Credentials
from potluck.net.addresses import lan_addresses
from potluck.net.discovery import Service
from potluck.settings import state_folder, state_path
from potluck.sole_use import WHATS, User, clock_text, user_of, users_here
from potluck.wire.addresses import address

NODE_UNIT = "potluck-node.service"
UNITS = (NODE_UNIT, "potluck-coordinator.service")
SYSTEMD = Path("/run/systemd/system")
"""Exists when systemd runs this machine (sd_booted(3))."""
ASK_SECONDS = 3.0
KNOCK_SECONDS = 1.0


@dataclass(frozen=True)
class Unit:
    """A system service of ours that runs, or tries to run. `said` is its STATUS=."""

    name: str
    state: str
    pid: int = 0
    since: float = 0.0
    said: str = ""

    def __str__(self) -> str:
        """`the system service potluck-node (pid 17, since 10:31: node attic-1 is in cluster default)`."""
        told = ", ".join(
            filter(
                None,
                (
                    f"pid {self.pid}" if self.pid else self.state,
                    f"since {clock_text(self.since)}" if self.since else "",
                ),
            )
        )
        return (
            f"the system service {self.name.removesuffix('.service')} ({told}{f': {self.said}' if self.said else ''})"
        )


def folder_of(state_dir: Path | None, what: str) -> Path:
    """The state folder of `node`, `coordinator` or `up` for this `--state-dir`."""
    return state_folder(str(state_dir / what) if state_dir is not None else "", what)


def path_of(state_dir: Path | None, what: str) -> Path:
    """Where that folder is; it is not made."""
    return state_path(str(state_dir / what) if state_dir is not None else "", what)


def users(state_dir: Path | None, whats: Iterable[str] = WHATS) -> list[User]:
    """The processes that use these state folders now."""
    return [user for what in whats if (user := user_of(folder_of(state_dir, what), what)) is not None]


def running() -> list[User | Unit]:
    """What runs here, in any state folder. A daemon that `potluck up` or a system service runs is not listed apart from it."""
    services = units()
    served = {unit.pid for unit in services}
    found = {(user.what, Path(user.folder)): user for user in (*users(None), *users_here())}
    ups = {folder for what, folder in found if what == "up"}
    tended = {*ups, *(folder.parent / what for folder in ups for what in WHATS)}
    shown = [user for (what, folder), user in found.items() if what == "up" or folder not in tended]
    return [*(user for user in shown if user.pid not in served), *services]


def units() -> list[Unit]:
    """Our system services that are active, activating or reloading. Empty where systemd cannot be asked."""
    if not SYSTEMD.is_dir():
        return []
    names = "Id,ActiveState,MainPID,ActiveEnterTimestamp,StatusText"
    try:
        asked = subprocess.run(
            ("systemctl", "show", "--timestamp=unix", f"--property={names}", *UNITS),
            capture_output=True, text=True, timeout=ASK_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [unit for block in asked.stdout.split("\n\n") if (unit := _unit(block)) is not None]


def _unit(block: str) -> Unit | None:
    facts = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
    state = facts.get("ActiveState", "")
    if state not in ("active", "activating", "reloading"):
        return None
    since = re.fullmatch(r"@(\d+)", facts.get("ActiveEnterTimestamp", ""))
    pid = facts.get("MainPID", "")
    return Unit(
        facts.get("Id", ""), state, int(pid) if pid.isdigit() else 0, float(since[1]) if since else 0.0,
        facts.get("StatusText", ""),
    )  # fmt: skip


def is_here(service: Service) -> bool:
    """Whether a service found by mDNS is on this machine."""
    return service.host in ("127.0.0.1", *lan_addresses())


async def node_here(services: Iterable[Service], credentials: Credentials) -> Service | None:
    """The first of these nodes that is on this machine and answers. mDNS alone may be out of date."""
    from potluck.net.http_client import is_there  # HTTP is slow to import, and mostly no node is here

    for service in services:
        if service.role == "node" and is_here(service):
            at = address(service.host, service.port, credentials.scheme)
            if await is_there(at, credentials, KNOCK_SECONDS):
                return service
    return None
