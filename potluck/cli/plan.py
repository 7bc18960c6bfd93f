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
    """`NAME=PATH` of data that live on this machine."""
    gateway_port: int | None = None
    asked: bool = True
    """Whether the user said how the machine is to listen; else `potluck up` finds out what fits."""
    closed: bool = False
    """Whether this machine is a member of a closed cluster, or founds one."""

    def environment(self, daemon: str) -> dict[str, str]:
        """What a daemon gets beside its command line."""
        if not self.closed or daemon != "coordinator":
            return {}
        found = {"POTLUCK_CLOSED": "true"}
        if self.broker_port is not None:
            found["POTLUCK_BROKER__CLOSED_PORT"] = str(self.broker_port)
        return found

    def flags(self, daemon: str) -> list[str]:
        """The command line of a daemon, after its module's name."""
        flags = ["--cluster", self.network.cluster, "--listen", self.listen.host, "--log-level", self.log_level]
        for seed in self.network.seeds if daemon == "node" or not self.closed else ():
            flags += ["--seed", seed]
        if self.listen.insecure:
            flags.append("--insecure")
        if self.state_dir is not None:
            flags += ["--state-dir", str(self.state_dir / daemon)]
        if daemon == "coordinator" and self.broker_port is not None and not self.closed:
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
        """The command line that repeats this plan for the network; `elsewhere`: for other machines, without this machine's own options."""
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
        """Raises Conflict where this machine already has a node or another `up`; the error names it and what to do.

        A user who names a state folder wants a second one on this machine: then only that folder is checked.
        """
        for user in here.users(self.state_dir, ("up", "node")):
            raise already(str(user), f"kill {user.pid}" if user.pid and not user.elsewhere else "")
        for unit in here.units() if self.state_dir is None else ():
            if unit.name == here.NODE_UNIT:
                raise already(str(unit), "sudo systemctl stop potluck-node")

    def check_ports(self) -> None:
        """Raises InvalidSettings where a port that was asked for is taken; the error names the option of `up` for another port."""
        for option, port in (("--broker-port", self.broker_port), ("--gateway-port", self.gateway_port)):
            if port:
                bind(Listen(host=self.listen.host, port=port), option).close()


def already(who: str, end: str = "") -> Conflict:
    """The error that names what already runs here, and what ends it."""
    return Conflict(
        f"nothing was started: this machine already has {who}; `potluck status` shows its state"
        + (f", `{end}` ends it" if end else "")
    )
