"""What `potluck up` was asked for: the daemons' command lines, and whether this machine is free for them."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from potluck.cli import here
from potluck.errors import Conflict
from potluck.net.addresses import bind
from potluck.settings import Listen, NetworkSettings, is_loopback, parse_address


@dataclass(frozen=True)
class Plan:
    """What was asked for."""

    network: NetworkSettings
    listen: Listen
    state_dir: Path | None
    broker_port: int | None
    log_level: str
    data: tuple[str, ...] = ()
    """`NAME=PATH` of the data that live here."""
    gateway_port: int | None = None

    def flags(self, daemon: str) -> list[str]:
        """The command line of a daemon, after its module's name."""
        flags = ["--cluster", self.network.cluster, "--listen", self.listen.host, "--log-level", self.log_level]
        for seed in self.network.seeds:
            flags += ["--seed", seed]
        if self.listen.insecure:
            flags.append("--insecure")
        if self.state_dir is not None:
            flags += ["--state-dir", str(self.state_dir / daemon)]
        if daemon == "coordinator" and self.broker_port is not None:
            flags += ["--broker-port", str(self.broker_port)]
        if daemon == "coordinator" and self.gateway_port is not None:
            flags += ["--port", str(self.gateway_port)]
        if daemon == "node":
            for data in self.data:
                flags += ["--data", data]
        return flags

    @property
    def private(self) -> bool:
        """Whether nothing beyond this machine reaches its daemons."""
        return is_loopback(self.listen.host)

    def shared(self, *, elsewhere: bool = False) -> str:
        """The command line that is this plan and serves the network; `elsewhere`: on other machines, without what is this one's own."""
        words = ["potluck", "up", "--insecure"]
        for seed in self.network.seeds:
            if not (elsewhere and is_loopback(parse_address(seed)[0])):
                words += ["--seed", seed]
        if self.network.cluster != NetworkSettings().cluster:
            words += ["--cluster", self.network.cluster]
        if not elsewhere:
            if self.state_dir is not None:
                words += ["--state-dir", str(self.state_dir)]
            if self.broker_port is not None:
                words += ["--broker-port", str(self.broker_port)]
            if self.gateway_port is not None:
                words += ["--gateway-port", str(self.gateway_port)]
            for data in self.data:
                words += ["--data", data]
        return shlex.join(words)

    def check_free(self) -> None:
        """Raises Conflict where this machine has a node already, or another `up`, saying which and what to do.

        Who names a state folder means a second one on this machine: then only that folder is looked at.
        """
        for user in here.users(self.state_dir, ("up", "node")):
            raise already(str(user), f"kill {user.pid}" if user.pid and not user.elsewhere else "")
        for unit in here.units() if self.state_dir is None else ():
            if unit.name == here.NODE_UNIT:
                raise already(str(unit), "sudo systemctl stop potluck-node")

    def check_ports(self) -> None:
        """Raises InvalidSettings where a port that was asked for is taken, and names the option of `up` that chooses another."""
        for option, port in (("--broker-port", self.broker_port), ("--gateway-port", self.gateway_port)):
            if port:
                bind(Listen(host=self.listen.host, port=port), option).close()


def already(who: str, end: str = "") -> Conflict:
    """What there is in place of what was asked for, and what ends it."""
    return Conflict(
        f"nothing is started: there is {who} already; `potluck status` says how it is"
        + (f", `{end}` ends it" if end else "")
    )
