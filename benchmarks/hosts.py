"""Machines for benchmarks of training: network namespaces with links of a given rate, each limited to a part of a core.

Needs root, Linux, iproute2, and cgroups for quotas (version 1 or 2).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from potluck.errors import TimedOut, Unavailable
from potluck.local_cluster import Daemon
from support.netns import Network, available, run

__all__ = ["Hosts", "available"]

READY_SECONDS = 60.0
PERIOD_MICROSECONDS = 20_000
BROKER_PORT = 1883


class Hosts:
    """A host for the coordinator and one for each node, below `folder`; a context manager.

    `megabits`: rate of each host's link, both ways; None: as fast as the kernel. `shares`: each node's part of a core.
    Each node is pinned to the core with the most left, the largest share first.
    """

    def __init__(self, folder: Path, cluster: str, shares: Sequence[float], megabits: float | None = None) -> None:
        self.folder = folder
        self.cluster = cluster
        self.shares = tuple(shares)
        self._network = Network(1 + len(self.shares))
        self._megabits = megabits
        self._stack = ExitStack()
        self.nodes: list[Daemon] = []

    def __enter__(self) -> Hosts:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._stack.enter_context(self._network)
            if self._megabits is not None:
                for host in self._network.hosts:
                    self._shape(host, self._megabits)
            self.coordinator = self._daemon(0, "coordinator", "coordinator", "--broker-port", str(BROKER_PORT))
            self._start(self.coordinator, "coordinator ready ")
            self._cores = cores_for(self.shares, sorted(os.sched_getaffinity(0)))
            for number in range(1, len(self.shares) + 1):
                self.start_node(number)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in self.nodes:
            daemon.terminate()
        for daemon in self.nodes:
            daemon.wait(10)
        if hasattr(self, "coordinator"):
            self.coordinator.terminate()
            self.coordinator.wait(10)
        self._stack.close()

    @property
    def address(self) -> str:
        """The broker's address."""
        return f"{self._network.address(self._network.hosts[0])}:{BROKER_PORT}"

    def host_address(self, number: int) -> str:
        return self._network.address(self._network.hosts[number])

    def rest(self) -> None:
        """Stop the nodes: another program needs their cores and links now."""
        for node in self.nodes:
            node.terminate()
        for node in self.nodes:
            node.wait(10)

    def start_node(self, number: int) -> Daemon:
        """Node `number` (from 1), on its host, core and share."""
        node = self._daemon(
            number, "node", f"node-{number}", "--node-id", f"node-{number}", "--seed", self.address, "--no-discovery"
        )
        node.cores = frozenset({self._cores[number - 1]})
        share = self.shares[number - 1]
        if share < 1:
            node.command = self._quota(share) + node.command
        self.nodes.append(node)
        self._start(node, "node joined ")
        return node

    def inside(self, number: int, *command: str) -> list[str]:
        """A command on host `number`; 0 is the coordinator's host."""
        return self._network.command(self._network.hosts[number], *command)

    def bytes_on_wire(self) -> int:
        """Bytes sent by all hosts since they were made, by their interfaces' counters."""
        total = 0
        for host in self._network.hosts:
            shown = run(*self._network.command(host, "cat", "/sys/class/net/eth0/statistics/tx_bytes"))
            total += int(shown)
        return total

    def _shape(self, host: str, megabits: float) -> None:
        # Both directions: what it sends at the host's own end, what it receives at the bridge's end.
        number = self._network.hosts.index(host) + 1
        burst = max(32, int(megabits * 1000 / 8 * 0.004))  # KiB of 4 ms
        for where, device in ((host, "eth0"), (self._network.bridge_host, f"p{number}")):
            run(
                *self._network.command(where, "tc", "qdisc", "add", "dev", device, "root", "tbf"),
                *("rate", f"{megabits:g}mbit", "burst", f"{burst}kb", "latency", "50ms"),
            )

    def _quota(self, share: float) -> list[str]:
        """The beginning of a command line that limits the rest to a part of a core."""
        name = f"potluck-bench-{uuid.uuid4().hex[:8]}"
        v1, v2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
        group = (v1 if v1.is_dir() else v2) / name
        group.mkdir()
        self._stack.callback(_remove_group, group)
        quota = int(PERIOD_MICROSECONDS * share)
        if v1.is_dir():
            (group / "cpu.cfs_period_us").write_text(str(PERIOD_MICROSECONDS))
            (group / "cpu.cfs_quota_us").write_text(str(quota))
        else:
            (group / "cpu.max").write_text(f"{quota} {PERIOD_MICROSECONDS}")
        return ["sh", "-c", f'echo $$ > {group / "cgroup.procs"} && exec "$@"', "sh"]

    def _daemon(self, host: int, module: str, name: str, *arguments: str) -> Daemon:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("POTLUCK_")}
        environment |= {"POTLUCK_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        listen = self._network.address(self._network.hosts[host])
        command = self.inside(
            host, sys.executable, "-P", "-m", "potluck.daemons", module, "--cluster", self.cluster, "--state-dir", str(self.folder / name),
            "--listen", listen, "--insecure", *arguments,
        )  # fmt: skip
        return Daemon(name, command, self.folder / f"{name}.log", environment)

    def _start(self, daemon: Daemon, words: str) -> None:
        daemon.start()
        deadline = time.monotonic() + READY_SECONDS
        while words not in daemon.log_path.read_text(errors="replace"):
            if not daemon.running:
                raise Unavailable(f"{daemon.name} ended; its log ends:\n{daemon.log_tail()}")
            if time.monotonic() > deadline:
                raise TimedOut(f"{daemon.name} was not ready in {READY_SECONDS:.0f} s:\n{daemon.log_tail()}")
            time.sleep(0.05)


def cores_for(shares: Sequence[float], cores: Sequence[int]) -> list[int]:
    """The core for each share; two shares that are too much for one core together get different cores if possible."""
    taken = dict.fromkeys(cores, 0.0)
    found: dict[int, int] = {}
    for number in sorted(range(len(shares)), key=lambda number: -shares[number]):
        found[number] = min(taken, key=lambda core: taken[core])
        taken[found[number]] += shares[number]
    return [found[number] for number in range(len(shares))]


def _remove_group(group: Path) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            group.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


def shell(command: Sequence[str]) -> str:
    """The output of a command."""
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout
