"""The first machine of a closed cluster: what `service install --role coordinator` makes of a machine that is on a network.

The tests share one machine, in their order. How a second machine joins is tried with network namespaces (tests/integration).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.booted import Installation, Machine

UNITS = ("potluck-coordinator.service", "potluck-node.service")
BROKER, CLIENTS, GATEWAY = 8883, 8884, 7814
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

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def before(machine: Machine, potluck: Installation) -> set[str]:
    """What is on the disk without the services."""
    return machine.files()


@pytest.fixture(scope="module")
def potluck(machine: Machine, wheel: Path) -> Installation:
    return Installation(machine, wheel)


def run(machine: Machine) -> None:
    machine.until(lambda: [machine.fact(unit, "ActiveState") for unit in UNITS] == ["active"] * 2, 60)


def test_it_founds_a_cluster_that_its_own_node_has_joined(
    machine: Machine, potluck: Installation, before: set[str]
) -> None:
    # It listens beyond loopback if the machine has an address there. This one has none, so it must be told.
    said = potluck.answer("service", "install", "--role", "coordinator", "--listen", "0.0.0.0")
    run(machine)
    assert " service install --join POTLUCK-" in said["next"]
    told = machine.run("systemd-analyze", "security", "--offline=true", "--no-pager", *UNITS)
    levels = re.findall(r"Overall exposure level for (\S+): ([\d.]+)", told)
    assert [unit for unit, _ in levels] == list(UNITS)
    assert all(float(level) <= EXPOSURE_LIMIT for _, level in levels), levels


def test_no_other_port_is_open_and_none_answers_an_outsider(machine: Machine, potluck: Installation) -> None:
    (node,) = potluck.answer("nodes")
    blobs = int(node["http"][0].rsplit(":", 1)[1])
    assert node["http"][0].startswith("https:")
    listening = machine.listening()
    assert {port for kind, _, port in listening if kind == "tcp"} == {BROKER, CLIENTS, GATEWAY, blobs}
    assert {port for kind, _, port in listening if kind == "udp"} == {5353}, "mDNS"
    answers = potluck.python(OUTSIDER, *map(str, (BROKER, CLIENTS, blobs, GATEWAY))).splitlines()
    assert len(answers) == 8
    for line in answers:
        port, answer = line.split("\t")
        refused = re.fullmatch(r"(?:SSL|Connection)\w*Error|closed", answer)
        assert refused or (port == str(GATEWAY) and re.match(r"HTTP/1\.[01] 40[013]", answer)), line


def test_the_operator_trains_and_the_cluster_outlives_a_reboot(machine: Machine, potluck: Installation) -> None:
    losses = machine.run(potluck.folder / "bin/python", "-c", TRAIN, seconds=200).split()
    assert len(losses) == 2
    machine.reboot()
    run(machine)
    assert machine.settled() == "running"
    (node,) = potluck.answer("nodes")
    assert node["state"] == "online"
    assert [model["name"] for model in potluck.answer("models")] == ["kept"]


def test_purged_it_leaves_no_key_behind(machine: Machine, potluck: Installation, before: set[str]) -> None:
    potluck.potluck("service", "uninstall", "--purge")
    homes = ("root/.keras", "root/.config/matplotlib", "root/.cache")  # of the libraries of who trained
    left = {place for place in machine.files() - before if not place.startswith(homes)}
    assert left <= {"root/.config"}
    assert before <= machine.files()
    assert machine.run("find", "/run", "/tmp", "-name", "*potluck*") == ""
