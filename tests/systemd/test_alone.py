"""A node on a machine that starts while there is no cluster, and a machine that serves its network."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from support.booted import Installation, Machine

pytestmark = pytest.mark.timeout(200)
NODE = "potluck-node.service"
BOOT_SECONDS = 20
GIVEN_UP_SECONDS = 60
"""systemd waits no longer for a node without a cluster (JobRunningTimeoutSec, and some)."""


def test_a_node_without_a_cluster_does_not_hold_up_the_machine(machine: Machine, wheel: Path) -> None:
    """The rest of the machine starts as if there were no potluck, and what waits for the end of the boot does not wait for ever."""
    Installation(machine, wheel).potluck("service", "install")
    machine.reboot()
    started = time.monotonic()
    machine.until(lambda: machine.fact("multi-user.target", "ActiveState") == "active", BOOT_SECONDS)
    assert machine.settled(GIVEN_UP_SECONDS + 30) == "running"
    assert time.monotonic() - started < GIVEN_UP_SECONDS
    facts = machine.facts(NODE, "ActiveState", "NRestarts", "StatusText")
    assert (facts["ActiveState"], facts["NRestarts"]) == ("activating", "0")
    assert "looks for cluster" in facts["StatusText"]
    assert "ordering cycle" not in machine.log()


def test_a_coordinator_that_comes_later_is_joined(machine: Machine) -> None:
    """On all addresses, as on a network that is trusted. Nothing else listens there."""
    potluck = Installation(machine)
    before = machine.pid(NODE)
    said = potluck.answer("service", "install", "--role", "coordinator", "--no-node", "--insecure")
    assert said["services"] == ["potluck-coordinator"]
    machine.until(lambda: machine.fact(NODE, "ActiveState") == "active", 60)
    assert machine.pid(NODE) == before
    ports = {(kind, port) for kind, address, port in machine.listening() if not address.startswith("127.")}
    assert ports == {("tcp", 1883), ("tcp", 7814), ("udp", 5353)}
