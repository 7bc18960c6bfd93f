"""Several hosts on a bridge: `potluck up` on the first founds a closed cluster, and the others join it by its token, and not without."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from potluck.lifecycle import die_with_parent
from support import netns
from support.brokers import mosquitto_or_skip

pytestmark = [
    pytest.mark.netns,
    pytest.mark.timeout(180),
    pytest.mark.skipif(bool(netns.available()), reason=netns.available() or "available"),
]

POTLUCK = [sys.executable, "-m", "potluck.cli.main"]
SERVING_SECONDS = 15.0
"""From `potluck join` to serving, on a machine without other work."""
REMOVED_SECONDS = 10.0
TOKEN = re.compile(r"potluck join (POTLUCK-1-\S+)")


class Hosts:
    """Each host has its own home."""

    def __init__(self, network: netns.Network, folder: Path) -> None:
        self.network = network
        self.folder = folder
        self.first, self.second, self.third = network.hosts
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        # of its own: who looks for `default` on this machine, in another test, would find this one's operator
        self.cluster = f"t{uuid.uuid4().hex[:8]}"

    def environment(self, host: str) -> dict[str, str]:
        given = {key: value for key, value in os.environ.items() if not key.startswith("POTLUCK_")}
        homes = {f"XDG_{kind}_HOME": str(self.folder / host / kind.lower()) for kind in ("STATE", "CONFIG")}
        return given | homes | {"COLUMNS": "100"}

    def start(self, host: str, *arguments: str) -> None:
        with self.log(host).open("ab") as log:
            self.processes[host] = subprocess.Popen(
                self.network.command(host, *POTLUCK, "--cluster", self.cluster, *arguments),
                stdout=log, stderr=log, env=self.environment(host), preexec_fn=die_with_parent(),
            )  # fmt: skip

    def ask(self, host: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.network.command(host, *POTLUCK, "--cluster", self.cluster, *arguments), env=self.environment(host),
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def log(self, host: str) -> Path:
        return self.folder / f"{host}.log"

    def said(self, host: str) -> str:
        return self.log(host).read_text() if self.log(host).exists() else ""

    def until(self, check: Callable[[], object], what: str, seconds: float = 40.0) -> float:
        """How long it took."""
        began = time.monotonic()
        while not check():
            time.sleep(0.1)
            assert time.monotonic() - began < seconds, f"{what} did not happen:\n" + "\n".join(
                f"--- {host}\n{self.said(host)}" for host in self.network.hosts
            )
        return time.monotonic() - began

    def stop(self) -> None:
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            process.wait(30)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    mosquitto_or_skip()
    with netns.Network(3) as network:
        made = Hosts(network, tmp_path)
        try:
            yield made
        finally:
            made.stop()


def served(hosts: Hosts, nodes: int) -> Callable[[], object]:
    """Whether the newest that the coordinator said of itself is that it serves so many nodes."""

    def look() -> bool:
        counts = re.findall(r"is served \(since [^)]*\): (\d+) node", hosts.said(hosts.first))
        return bool(counts) and int(counts[-1]) == nodes

    return look


def test_a_machine_founds_a_closed_cluster_and_another_joins_by_token(hosts: Hosts) -> None:
    hosts.start(hosts.first, "up")
    hosts.until(lambda: TOKEN.search(hosts.said(hosts.first)), "the founding")
    hosts.until(served(hosts, 1), "the first host's own node")

    # nobody else asks, and no `up` founds a second one
    refused = hosts.ask(hosts.second, "up")
    assert refused.returncode == 7
    assert "is closed. To let this machine work for it" in refused.stderr
    # (all hosts see the first one's files, and so its operator's credentials)
    assert hosts.ask(hosts.second, "nodes", "--credentials", "none").returncode == 7

    found = TOKEN.search(hosts.said(hosts.first))
    assert found is not None
    began = time.monotonic()
    hosts.start(hosts.second, "join", found[1], "--name", "second")
    hosts.until(lambda: "node second is in cluster" in hosts.said(hosts.second), "the joining")
    took = time.monotonic() - began
    print(f"from join to serving: {took:.1f} s")
    busy = os.getloadavg()[0] / len(os.sched_getaffinity(0))
    assert took < SERVING_SECONDS * max(1.0, busy)
    hosts.until(served(hosts, 2), "the second node online")

    # a person at the third host: a token for a client, and then the usual commands
    made = hosts.ask(hosts.first, "token", "create", "--role", "viewer", "--json")
    assert made.returncode == 0, made.stderr
    joined = hosts.ask(hosts.third, "join", json.loads(made.stdout)["token"], "--name", "ann", "--json")
    assert (joined.returncode, json.loads(joined.stdout)["identity"]) == (0, "client:ann"), joined.stderr
    denied = hosts.ask(hosts.third, "nodes", "remove", "second")
    assert denied.returncode == 7
    assert "operator" in denied.stderr

    # who is removed is cut off
    removed = hosts.ask(hosts.first, "nodes", "remove", "second")
    assert removed.returncode == 0, removed.stderr
    hosts.until(served(hosts, 1), "the end of the second node", REMOVED_SECONDS)
    hosts.until(lambda: "or has removed this node" in hosts.said(hosts.second), "a word on it at the second host")

    # the founder comes back as what it was
    hosts.processes[hosts.first].send_signal(signal.SIGTERM)
    assert hosts.processes[hosts.first].wait(30) == 0
    hosts.log(hosts.first).unlink()
    hosts.start(hosts.first, "up")
    hosts.until(served(hosts, 1), "the founder's return")
    assert not TOKEN.search(hosts.said(hosts.first)), "the token is shown once"
