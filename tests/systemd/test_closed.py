"""The services on a machine with a network: the coordinator founds a closed cluster, and the node beside it joins by a token."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from support.booted import Installation, Machine

pytestmark = pytest.mark.timeout(300)
COORDINATOR, NODE = "potluck-coordinator.service", "potluck-node.service"
NETWORK = ("10.9.8.7/24", "10.9.8.255")
GATEWAY = 7814
EXPOSURE_LIMIT = 2.0
OUTSIDER = """
# Speaks TLS to each port without a certificate, and without caring about the server's: what does it get?
import socket, ssl, sys

context = ssl.create_default_context()
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
CONNECT = bytes.fromhex("100d00044d5154540402003c000178")  # MQTT 3.1.1, client id "x"
for port in sys.argv[1:]:
    for request in (CONNECT, b"GET /v1/jobs HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n"):
        try:
            with socket.create_connection(("127.0.0.1", int(port)), timeout=10) as plain:
                with context.wrap_socket(plain) as connection:
                    connection.sendall(request)
                    answer = connection.recv(100)
        except OSError as error:
            answer = type(error).__name__.encode()
        print(port, answer.split(b"\\r\\n")[0].decode(errors="replace") or "closed", sep="\\t")
"""
TRAIN = """
import keras, numpy
from potluck.client import Client

x = numpy.random.default_rng(1).normal(size=(512, 8)).astype("float32")
y = (x.sum(axis=1) > 0).astype("int64")
model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(2, activation="softmax")])
model.compile(optimizer="adam", loss="sparse_categorical_crossentropy")
with Client() as client:
    print(*client.train(model, (x, y), epochs=2, batch_size=16, name="kept").wait(timeout=120).history["loss"])
"""


@pytest.fixture(scope="module")
def before(machine: Machine, wheel: Path) -> set[str]:
    """What is on the disk when potluck is installed, and its services are not."""
    Installation(machine, wheel)
    return machine.files()


@pytest.fixture(scope="module")
def founded(machine: Machine, before: set[str]) -> tuple[Installation, dict[str, Any]]:
    """The machine's installation, and what `service install` said."""
    machine.run("ip", "link", "add", "lan0", "type", "veth", "peer", "name", "lan1")
    for name in ("lan0", "lan1"):
        machine.run("ip", "link", "set", name, "up")
    machine.run("ip", "address", "add", NETWORK[0], "dev", "lan0")
    installation = Installation(machine)
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
    told = machine.run("systemd-analyze", "security", "--offline=true", "--no-pager", COORDINATOR, NODE)
    levels = re.findall(r"Overall exposure level for (\S+): ([\d.]+)", told)
    assert [unit for unit, _ in levels] == [COORDINATOR, NODE]
    assert all(float(level) <= EXPOSURE_LIMIT for _, level in levels), levels


def test_only_its_own_ports_are_open_and_none_answers_an_outsider(
    machine: Machine, founded: tuple[Installation, dict[str, Any]]
) -> None:
    (node,) = founded[0].answer("nodes")
    own = {8883, 8884, 7814, int(node["http"][0].rsplit(":", 1)[1])}
    found = machine.listening()
    assert {port for kind, _, port in found if kind == "tcp"} == own
    assert {port for kind, _, port in found if kind == "udp"} == {5353}, "mDNS"
    answers = founded[0].python(OUTSIDER, *map(str, sorted(own))).splitlines()
    assert len(answers) == 8
    for line in answers:
        port, answer = line.split("\t")
        refused = re.fullmatch(r"(?:SSL|Connection)\w*Error|closed", answer)
        assert refused or (port == str(GATEWAY) and re.match(r"HTTP/1\.[01] 40[013]", answer)), line


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


def test_the_operator_trains_and_the_cluster_outlives_a_reboot(
    machine: Machine, founded: tuple[Installation, dict[str, Any]]
) -> None:
    """Also when the network is not there any more, or not yet."""
    potluck, _ = founded
    losses = machine.run(potluck.folder / "bin/python", "-c", TRAIN, seconds=200).split()
    assert len(losses) == 2
    machine.reboot()
    machine.until(lambda: [machine.fact(unit, "ActiveState") for unit in (COORDINATOR, NODE)] == ["active"] * 2, 60)
    assert machine.settled() == "running"
    assert "online" in [one["state"] for one in potluck.answer("nodes")]
    assert [model["name"] for model in potluck.answer("models")] == ["kept"]


def test_purged_it_leaves_no_key_behind(
    machine: Machine, founded: tuple[Installation, dict[str, Any]], before: set[str]
) -> None:
    founded[0].potluck("service", "uninstall", "--purge")
    homes = ("root/.keras", "root/.config/matplotlib", "root/.cache")  # of the libraries of who trained
    left = {place for place in machine.files() - before if not place.startswith(homes)}
    assert left <= {"root/.config"}
    assert before <= machine.files()
    assert machine.run("find", "/run", "/tmp", "-name", "*potluck*") == ""
