"""`potluck service` on a booted machine, from install to purge: potluck as pipx installs it, in a home that is closed to others.

The tests share one machine, and each leaves both services running for the next.
"""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from potluck.wire import codec
from potluck.wire.births import NodeStatus
from potluck.wire.reports import LeaseRefused, LeaseRenewed, LeaseTaken, ShardFinished
from potluck.wire.values import Message
from support.booted import Installation, Machine, build_wheel, copied_sources

UNITS = ("potluck-coordinator.service", "potluck-node.service")
NODE = "potluck-node.service"
EXPOSURE_LIMIT = 2.0
BACK_SECONDS = 10
"""A daemon that is stopped is back within this."""
TRAIN = """
# arguments: the model's name, epochs, rows of data, width of the hidden layer, and whether to wait; prints the job and its losses
import sys
import keras, numpy
from potluck.client import Client

name, epochs, rows, width, wait = sys.argv[1], *map(int, sys.argv[2:])
x = numpy.random.default_rng(1).normal(size=(rows, 64)).astype("float32")
y = (x.sum(axis=1) > 0).astype("int64")
layers = [keras.layers.Dense(width, activation="relu"), keras.layers.Dense(2, activation="softmax")]
model = keras.Sequential([keras.Input((64,)), *layers])
model.compile(optimizer="adam", loss="sparse_categorical_crossentropy")
with Client("127.0.0.1") as client:
    job = client.train(model, (x, y), epochs=epochs, batch_size=16, name=name)
    print(job.id)
    if wait:
        print(*job.wait(timeout=120).history["loss"])
"""

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def before(machine: Machine, wheel: Path) -> set[str]:
    """What is on the disk when potluck is installed, and its services are not."""
    assert machine.settled() == "running"
    Installation(machine, wheel)
    return machine.files()


@pytest.fixture(scope="module")
def potluck(machine: Machine, wheel: Path, before: set[str]) -> Installation:
    """Installed as the first machine of a cluster, with both services running."""
    installation = Installation(machine)
    installation.potluck("service", "install", "--role", "coordinator")
    run(machine)
    return installation


def run(machine: Machine, seconds: float = 60) -> None:
    """Wait until both services are active."""
    machine.until(lambda: [machine.fact(unit, "ActiveState") for unit in UNITS] == ["active"] * 2, seconds)


@contextlib.contextmanager
def overheard(machine: Machine, file: Path) -> Iterator[Path]:
    """A file with all that is published on the broker meanwhile."""
    with file.open("w") as output:
        listener = subprocess.Popen(
            machine.inside("mosquitto_sub", "--host", "127.0.0.1", "--topic", "potluck/v1/#", "-F", "%r %x"),
            stdout=output,
        )
        try:
            machine.until(lambda: file.stat().st_size, 10)  # retained messages: it is connected
            yield file
        finally:
            for process in psutil.Process(
                listener.pid
            ).children():  # the listener itself: nsenter does not pass signals on
                process.terminate()
            listener.wait(10)


def said(file: Path) -> list[Message]:
    """The messages in order; without those that were retained before."""
    lines = [line.split(" ", 1) for line in file.read_text().splitlines()]
    return [codec.decode(bytes.fromhex(text))[0] for retained, text in lines if retained == "0" and text]


def test_what_is_installed_starts_and_may_do_little_else(machine: Machine, potluck: Installation) -> None:
    states = potluck.answer("service", "status")
    assert [(one["name"], one["state"], one["restarts"]) for one in states] == [
        ("potluck-coordinator", "active", 0),
        ("potluck-node", "active", 0),
    ]
    assert "is served" in states[0]["said"]
    # With the drop-ins that belong to this installation.
    told = machine.run("systemd-analyze", "security", "--offline=true", "--no-pager", *UNITS)
    levels = re.findall(r"Overall exposure level for (\S+): ([\d.]+)", told)
    assert [unit for unit, _ in levels] == list(UNITS)
    assert all(float(level) <= EXPOSURE_LIMIT for _, level in levels), levels


def test_only_its_own_ports_are_open_and_only_on_loopback(machine: Machine, potluck: Installation) -> None:
    (node,) = potluck.answer("nodes")
    own = {
        ("tcp", "127.0.0.1", 1883),
        ("tcp", "127.0.0.1", 7814),
        ("tcp", "127.0.0.1", int(node["http"][0].rsplit(":", 1)[1])),
    }
    found = machine.listening()
    assert {one for one in found if one[0] == "tcp"} == own
    assert {port for kind, _, port in found if kind == "udp"} == {5353}, "mDNS"


def test_a_job_runs(machine: Machine, potluck: Installation) -> None:
    _, *losses = potluck.python(TRAIN, "first", "3", "1024", "8", "1").split()
    assert len(losses) == 3
    assert float(losses[-1]) < float(losses[0])


def test_a_stopped_node_is_back_soon(machine: Machine, potluck: Installation) -> None:
    """With its engine: it still runs after the job."""
    assert "node.engine" in machine.run("ps", "-e", "-o", "args")
    before = machine.pid(NODE)
    stopped_at = time.monotonic()
    machine.run("kill", "-STOP", str(before))
    machine.until(lambda: machine.pid(NODE) not in (0, before), BACK_SECONDS + 10)
    back_at = (
        int(machine.fact(NODE, "ExecMainStartTimestampMonotonic")) / 1e6
    )  # the clock of the kernel, which is ours too
    assert 0 < back_at - stopped_at <= BACK_SECONDS
    run(machine)
    assert "watchdog" in machine.log(NODE).lower()


def test_they_start_with_the_machine(machine: Machine, potluck: Installation) -> None:
    machine.reboot()
    assert machine.settled() == "running"
    run(machine)
    assert "ordering cycle" not in machine.log()
    assert machine.run("systemctl", "--failed", "--no-legend") == ""
    assert [model["name"] for model in potluck.answer("models")] == ["first"]


def test_after_crashes_it_waits_longer_each_time(machine: Machine, potluck: Installation) -> None:
    crash(machine)
    for seconds in (2, 4, 8):
        while f"waits {seconds} s" not in (status := status_after_crash(machine)):
            assert "waits" not in status, status
    # It does wait so long.
    run(machine, 30)
    facts = machine.facts(NODE, "ExecMainStartTimestampMonotonic", "ActiveEnterTimestampMonotonic")
    assert int(facts["ActiveEnterTimestampMonotonic"]) - int(facts["ExecMainStartTimestampMonotonic"]) >= 8e6

    # After a life of more than a minute, it starts at once. The minute is taken from what the daemon has noted.
    count, begun_at = machine.run("cat", "/run/potluck-node/starts").split()
    assert int(count) > 2
    machine.run("sh", "-c", f"echo {count} {float(begun_at) - 61} >/run/potluck-node/starts")
    crash(machine)
    run(machine)
    assert machine.run("cat", "/run/potluck-node/starts").split()[0] == "0"


def crash(machine: Machine) -> None:
    """Kill the node, and wait until its next life has begun."""
    before = machine.pid(NODE)
    machine.run("systemctl", "kill", "--kill-whom=main", f"--signal={signal.SIGKILL.name}", NODE)
    machine.until(lambda: machine.pid(NODE) not in (0, before), 15)


def status_after_crash(machine: Machine) -> str:
    """What the next life says first."""
    crash(machine)
    return machine.until(lambda: machine.fact(NODE, "StatusText"), 15)


def test_a_stop_gives_leases_back_and_fires_no_will(machine: Machine, potluck: Installation, tmp_path: Path) -> None:
    """While the engine starts: a shard that is nearly done would be finished."""
    limit = machine.fact(NODE, "TimeoutStopUSec")
    machine.run("systemctl", "restart", NODE)
    run(machine)
    script = potluck.scripted(TRAIN, "endless", "1000", "4096", "8", "0")
    with (
        overheard(machine, tmp_path / "heard") as file,
        subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as client,
    ):
        machine.until(lambda: any(isinstance(one, LeaseRenewed) and one.stage for one in said(file)), 60)
        started = time.monotonic()
        machine.run("systemctl", "stop", NODE)
        assert time.monotonic() - started < int(limit.removesuffix("s"))
        goodbye = machine.until(
            lambda: next((one for one in said(file) if isinstance(one, NodeStatus) and one.state == "offline"), None)
        )
        messages = said(file)
        job = client.communicate(timeout=60)[0].strip()
    assert goodbye.left, "a goodbye, and no will"
    before_it = messages[: messages.index(goodbye)]
    refused = [one for one in before_it if isinstance(one, LeaseRefused)]
    assert {one.error.code for one in refused} == {"unavailable"}
    given_back = {one.attempt_id for one in refused}
    ended = given_back | {one.attempt_id for one in before_it if isinstance(one, ShardFinished)}
    assert {one.attempt_id for one in messages if isinstance(one, LeaseTaken)} <= ended
    assert machine.facts(NODE, "ActiveState", "Result") == {"ActiveState": "inactive", "Result": "success"}
    potluck.potluck("cancel", job)
    machine.run("systemctl", "start", NODE)
    run(machine)


def test_a_reload_changes_settings_and_ends_nothing(machine: Machine, potluck: Installation) -> None:
    before = machine.pid(NODE)
    settings = machine.path("/etc/potluck/node.toml")
    settings.write_text(settings.read_text().replace('log_level = "INFO"', 'log_level = "DEBUG"'))
    machine.run("systemctl", "reload", NODE)
    machine.until(lambda: "log_level" in machine.log(NODE))
    assert machine.pid(NODE) == before
    assert machine.fact(NODE, "ActiveState") == "active"


def test_wrong_settings_are_named_and_not_tried_again(machine: Machine, potluck: Installation) -> None:
    settings = machine.path("/etc/potluck/node.toml")
    right = settings.read_text()
    settings.write_text(right.replace("threads = 0", "threads = -1"))
    try:
        machine.fails("systemctl", "restart", NODE)
        machine.until(lambda: machine.fact(NODE, "ActiveState") == "failed")
        assert machine.fact(NODE, "SubState") == "failed"
        code, told = machine.fails(potluck.program, "service", "status")
        assert code == 1
        assert "threads" in told
    finally:
        settings.write_text(right)
    machine.run("systemctl", "start", NODE)
    run(machine)


def test_an_upgrade_keeps_data_and_settings(machine: Machine, potluck: Installation, tmp_path: Path) -> None:
    settings = machine.path("/etc/potluck/node.toml").read_text()
    identity = machine.path("/var/lib/private/potluck-node/node-id").read_text()
    before = machine.pid(NODE)
    Installation(machine, build_wheel(copied_sources(tmp_path / "newer", version="0.1.0.post7"), tmp_path))
    potluck.potluck("service", "install", "--role", "coordinator")
    machine.until(lambda: machine.pid(NODE) not in (0, before))
    run(machine)
    (node,) = potluck.answer("nodes")
    assert node["software"]["potluck"] == "0.1.0.post7"
    assert machine.path("/etc/potluck/node.toml").read_text() == settings
    assert machine.path("/var/lib/private/potluck-node/node-id").read_text() == identity
    assert "first" in [model["name"] for model in potluck.answer("models")]


def test_uninstall_keeps_the_data_and_purge_leaves_nothing(
    machine: Machine, potluck: Installation, before: set[str]
) -> None:
    potluck.potluck("service", "uninstall")
    left = machine.files() - before
    kept = ("etc/potluck", "var/lib/potluck-", "var/lib/private/potluck-")
    assert {"etc/potluck/node.toml", "var/lib/private/potluck-coordinator/journal.sqlite"} <= left
    assert [place for place in left if not place.startswith(kept)] == []
    # A name without a unit may stay in systemd's memory, if the unit's last process was just ending when systemd looked.
    known = machine.run("systemctl", "list-units", "--all", "--no-legend", "--plain", "potluck*").splitlines()
    assert [line for line in known if "not-found inactive dead" not in " ".join(line.split())] == []
    assert machine.listening() == set()
    potluck.potluck("service", "uninstall", "--purge")
    assert machine.files() == before
    assert machine.run("find", "/run", "/tmp", "-name", "*potluck*") == ""
