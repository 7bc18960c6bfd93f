"""The services on a machine with a network: the coordinator founds a closed cluster, and the node beside it joins by a token."""

from __future__ import annotations

import re
from typing import Any

import pytest

from support.booted import Installation, Machine

pytestmark = pytest.mark.timeout(200)
COORDINATOR, NODE = "potluck-coordinator.service", "potluck-node.service"
NETWORK = ("10.9.8.7/24", "10.9.8.255")


@pytest.fixture(scope="module")
def founded(machine: Machine, wheel: Any) -> tuple[Installation, dict[str, Any]]:
    """The machine's installation, and what `service install` said."""
    machine.run("ip", "link", "add", "lan0", "type", "veth", "peer", "name", "lan1")
    for name in ("lan0", "lan1"):
        machine.run("ip", "link", "set", name, "up")
    machine.run("ip", "address", "add", NETWORK[0], "dev", "lan0")
    installation = Installation(machine, wheel)
    return installation, installation.answer("service", "install", "--role", "coordinator")


def test_a_first_machine_founds_a_closed_cluster(
    machine: Machine, founded: tuple[Installation, dict[str, Any]]
) -> None:
    potluck, said = founded
    assert said["services"] == ["potluck-coordinator", "potluck-node"]
    assert re.search(r"service install --join POTLUCK-1-\S+$", said["next"])
    machine.until(lambda: machine.fact(NODE, "ActiveState") == "active", 60)
    # root asks as the machine's operator, whose files belong to the service's user
    (node,) = potluck.answer("nodes")
    assert node["state"] == "online"
    assert all(one.startswith("https://10.9.8.7:") for one in node["http"])
    (operator,) = potluck.answer("clients", "list")
    assert operator["role"] == "operator"
    assert "join-token" not in machine.run("ls", "/etc/potluck")
    modes = machine.run("stat", "-L", "-c", "%a %n", "/var/lib/private/potluck-node/identity/node.pem")
    assert modes.startswith("600 ")


def test_only_its_own_ports_are_open(machine: Machine, founded: tuple[Installation, dict[str, Any]]) -> None:
    (node,) = founded[0].answer("nodes")
    own = {8883, 8884, 7814, int(node["http"][0].rsplit(":", 1)[1])}
    found = machine.listening()
    assert {port for kind, _, port in found if kind == "tcp"} == own
    assert {port for kind, _, port in found if kind == "udp"} == {5353}, "mDNS"


def test_it_is_the_same_after_a_restart_and_when_it_is_installed_again(
    machine: Machine, founded: tuple[Installation, dict[str, Any]]
) -> None:
    potluck, _ = founded
    (before,) = potluck.answer("nodes")
    said = potluck.answer("service", "install", "--role", "coordinator")
    assert re.search(r"--join POTLUCK-1-\S+$", said["next"])
    machine.until(lambda: [one["state"] for one in potluck.answer("nodes")] == ["online"], 60)
    (after,) = potluck.answer("nodes")
    assert after["node_id"] == before["node_id"]


def test_a_removed_node_joins_again_under_another_name_by_a_token(
    machine: Machine, founded: tuple[Installation, dict[str, Any]]
) -> None:
    potluck, said = founded
    (before,) = potluck.answer("nodes")
    assert potluck.answer("nodes", "remove", before["node_id"]) == {"removed": f"node:{before['node_id']}"}
    machine.until(lambda: "online" not in [one["state"] for one in potluck.answer("nodes")], 30)
    token = said["next"].rpartition(" ")[2]
    status, text = machine.fails(potluck.program, "join", token)
    assert (status, "choose another name" in text) == (2, True), text
    settings = machine.path("/etc/potluck/node.toml")
    settings.write_text(settings.read_text().replace('node_id = ""', 'node_id = "another"'))
    assert potluck.answer("join", token)["identity"] == "node:another"
    machine.until(
        lambda: ("another", "online") in [(one["node_id"], one["state"]) for one in potluck.answer("nodes")], 60
    )
