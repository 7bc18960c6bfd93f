"""Several hosts on one machine: network namespaces joined by a bridge (needs root; Linux)."""

from __future__ import annotations

import functools
import os
import subprocess
import uuid
from types import TracebackType
from typing import Self


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout


class Network:
    """`hosts` namespaces with the addresses 10.77.0.1, .2, ... on their own bridge; removed after the block."""

    def __init__(self, hosts: int) -> None:
        tag = uuid.uuid4().hex[:5]
        self.bridge_host = f"pl{tag}b"
        self.hosts = [f"pl{tag}h{number}" for number in range(1, hosts + 1)]

    def __enter__(self) -> Self:
        try:
            # The bridge is in a namespace too: the machine's own network does not change.
            run("ip", "netns", "add", self.bridge_host)
            run("ip", "-n", self.bridge_host, "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
            run("ip", "-n", self.bridge_host, "link", "set", "br0", "up")
            for number, host in enumerate(self.hosts, 1):
                run("ip", "netns", "add", host)
                run(
                    "ip",
                    "link",
                    "add",
                    "eth0",
                    "netns",
                    host,
                    "type",
                    "veth",
                    "peer",
                    "name",
                    f"p{number}",
                    "netns",
                    self.bridge_host,
                )
                run("ip", "-n", self.bridge_host, "link", "set", f"p{number}", "master", "br0", "up")
                run("ip", "-n", host, "link", "set", "lo", "up")
                run("ip", "-n", host, "link", "set", "eth0", "up")
                run("ip", "-n", host, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        for name in (*self.hosts, self.bridge_host):
            subprocess.run(("ip", "netns", "delete", name), capture_output=True, check=False, timeout=20)

    def address(self, host: str) -> str:
        return f"10.77.0.{self.hosts.index(host) + 1}"

    def command(self, host: str, *command: str) -> list[str]:
        """The command line that runs `command` on that host."""
        return ["ip", "netns", "exec", host, *command]

    def cut(self, host: str) -> None:
        """Pull the host's cable."""
        run("ip", "-n", host, "link", "set", "eth0", "down")

    def isolate(self, host: str) -> None:
        """Switch off the host's port at the switch. The host's own link stays up."""
        run("ip", "-n", self.bridge_host, "link", "set", self._port(host), "nomaster")

    def reunite(self, host: str) -> None:
        run("ip", "-n", self.bridge_host, "link", "set", self._port(host), "master", "br0", "up")

    def _port(self, host: str) -> str:
        return f"p{self.hosts.index(host) + 1}"

    def mend(self, host: str) -> None:
        run("ip", "-n", host, "link", "set", "eth0", "up")


@functools.cache
def available() -> str:
    """Why namespaces cannot be used here; empty when they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    tried = f"pl{uuid.uuid4().hex[:5]}try"  # a unique name: parallel test runs do not disturb each other
    try:
        run("ip", "netns", "add", tried)
    except OSError as error:
        return f"network namespaces cannot be made here (apt install iproute2): {error}"
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made here: {error.stderr.strip()}"
    run("ip", "netns", "delete", tried)
    return ""
