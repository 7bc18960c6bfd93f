"""Several hosts on a bridge: `potluck up` runs on each, nobody gives an address, and the machines work together.

The commands are those of the README, for a user who has just installed potluck on three machines.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from potluck.lifecycle import die_with_parent
from potluck.settings import GATEWAY_PORT
from support import netns
from support.digits import mlp, split, write_png_folder

pytestmark = [
    pytest.mark.netns,
    pytest.mark.timeout(240),
    pytest.mark.skipif(bool(netns.available()), reason=netns.available() or "available"),
]

POTLUCK = [sys.executable, "-m", "potluck.cli.main"]
ANSWER_SECONDS = 180
"""From the first command to the first answer, on a machine without other work. Three hosts share its cores."""
PATIENCE_SECONDS = 600
FIRST_QUESTIONS_SECONDS = 12
"""A new browser asks by itself for this long (RFC 6762, section 5.2: after one second, two, four, ...)."""


class Hosts:
    """Hosts where `potluck up` runs, and a last one for the user, the desk."""

    def __init__(self, network: netns.Network, folder: Path) -> None:
        self.network = network
        self.folder = folder
        self.machines = network.hosts[:-1]
        self.desk = network.hosts[-1]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.begun = time.monotonic()

    def environment(self, host: str) -> dict[str, str]:
        """The environment of a host, with its own home."""
        given = {key: value for key, value in os.environ.items() if not key.startswith("POTLUCK_")}
        return given | {"XDG_STATE_HOME": str(self.folder / host), "COLUMNS": "80"}

    def up(self, host: str) -> None:
        command = self.network.command(host, *POTLUCK, "up", "--insecure")
        with self.log(host).open("wb") as log:
            self.processes[host] = subprocess.Popen(
                command, stdout=log, stderr=log, env=self.environment(host), preexec_fn=die_with_parent()
            )

    def ask(self, *arguments: str, seconds: float = 60, host: str = "") -> subprocess.CompletedProcess[str]:
        """A `potluck` command at the desk, or on another host."""
        host = host or self.desk
        return subprocess.run(
            self.network.command(host, *POTLUCK, *arguments), env=self.environment(host),
            capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip

    def online(self) -> int:
        answer = self.ask("nodes", "--json")
        if answer.returncode:
            return 0
        return sum(node["state"] == "online" for node in json.loads(answer.stdout))

    def log(self, host: str) -> Path:
        return self.folder / f"{host}.log"

    def logs(self) -> str:
        return "\n".join(f"--- {host}\n{self.log(host).read_text()}" for host in self.machines)

    def coordinator(self) -> str:
        """The host that started the coordinator."""
        return next(host for host in self.machines if "started the broker" in self.log(host).read_text())

    def stop(self) -> None:
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        for host, process in self.processes.items():
            assert process.wait(20) == 0, f"{host} did not end well:\n{self.log(host).read_text()}"


def wait_until(check: Callable[[], bool], hosts: Hosts, what: str, seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        time.sleep(0.05)
        assert time.monotonic() < deadline, f"{what} did not happen:\n{hosts.logs()}"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with netns.Network(4) as network:
        made = Hosts(network, tmp_path_factory.mktemp("hosts"))
        for host in made.machines:
            made.up(host)
        try:
            yield made
        finally:
            made.stop()


@pytest.mark.tensorflow
@pytest.mark.timeout(PATIENCE_SECONDS)
def test_five_commands_and_three_minutes_lead_to_the_first_answer(hosts: Hosts, tmp_path: Path) -> None:
    """Three of the commands are `potluck up --insecure`. The user does not wait for the cluster in between."""
    import keras

    for part in ("train", "test"):
        write_png_folder(tmp_path / part, 400 if part == "train" else 100)
    model = keras.Sequential(
        [keras.Input((16, 16, 3)), keras.layers.Conv2D(16, 3, activation="relu"), keras.layers.Flatten()]
    )
    model.add(keras.layers.Dense(10, activation="softmax"))
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.save(tmp_path / "model.keras")
    wait_until(lambda: hosts.online() > 0, hosts, "the first node")
    trained = hosts.ask(
        *f"train {tmp_path}/model.keras {tmp_path}/train --validation {tmp_path}/test".split(),
        *["--epochs", "20", "--name", "pictures", "--deploy", "all"], seconds=PATIENCE_SECONDS,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr + hosts.logs()
    answered = hosts.ask("infer", "pictures", str(tmp_path / "test" / "seven" / "0007.png"))
    assert answered.returncode == 0, answered.stderr
    assert "seven" in answered.stdout
    took = time.monotonic() - hosts.begun
    print(f"five commands, {took:.0f} s to the first answer")
    busy = os.getloadavg()[0] / len(os.sched_getaffinity(0))  # with other tests
    assert took < ANSWER_SECONDS * max(1.0, busy)


def test_status_shows_the_cluster(hosts: Hosts) -> None:
    wait_until(lambda: hosts.online() == 3, hosts, "three nodes online")
    said = hosts.ask("status")
    assert said.returncode == 0, said.stdout
    server = hosts.network.address(hosts.coordinator())
    for line in (
        "cluster      default: all is well",
        f"gateway      http://{server}:{GATEWAY_PORT}",
        f"broker       {server}:1883",
    ):
        assert line in said.stdout
    assert "nodes        3 of 3 online" in said.stdout
    assert len(said.stdout.splitlines()) <= 10
    assert f"http://{server}:{GATEWAY_PORT}" in hosts.ask("nodes").stdout
    again = hosts.ask("up", "--insecure", host=hosts.machines[0])
    assert again.returncode == 1
    assert f"`potluck up` (pid {hosts.processes[hosts.machines[0]].pid}, cluster 'default', since " in again.stderr


def test_three_machines_find_each_other_and_start_one_coordinator(hosts: Hosts) -> None:
    wait_until(lambda: hosts.online() == 3, hosts, "three nodes online")
    started = [host for host in hosts.machines if "started the broker" in hosts.log(host).read_text()]
    assert len(started) == 1
    assert "INSECURE" in hosts.log(started[0]).read_text()


@pytest.mark.tensorflow
def test_they_train_and_evaluate_together_and_survive_a_pulled_cable(hosts: Hosts, tmp_path: Path) -> None:
    wait_until(lambda: hosts.online() == 3, hosts, "three nodes online")
    model, train, test = tmp_path / "mlp.keras", tmp_path / "train.npz", tmp_path / "test.npz"
    mlp().save(model)
    data = split()
    np.savez(train, x=data["x_train"], y=data["y_train"])
    np.savez(test, x=data["x_test"], y=data["y_test"])
    added = hosts.ask("data", "add", str(train), "--name", "digits")
    assert added.returncode == 0, added.stderr
    submitted = hosts.ask("train", str(model), "digits", "--epochs", "200", "--name", "mlp", "--detach", "--json")
    assert submitted.returncode == 0, submitted.stderr
    job_id = json.loads(submitted.stdout)["job_id"]

    def epoch() -> int:
        job = json.loads(hosts.ask("job", job_id, "--json").stdout)
        return int(job["progress"]["epoch"]) if job["state"] == "running" else 1000 * (job["state"] == "succeeded")

    wait_until(lambda: epoch() > 20, hosts, "the first epochs", seconds=90)
    unplugged = next(host for host in hosts.machines if host != hosts.coordinator())
    hosts.network.cut(unplugged)
    wait_until(lambda: hosts.ask("status").returncode == 1, hosts, "the loss being told", seconds=60)
    assert re.search(r"is (silent since|offline, last seen)", hosts.ask("status").stdout)
    ended = hosts.ask("job", job_id, "--wait", "--json", seconds=150)
    assert ended.returncode == 0, ended.stderr + hosts.logs()
    assert json.loads(ended.stdout)["state"] == "succeeded"
    evaluated = hosts.ask("evaluate", "mlp", str(test), "--json", seconds=100)
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["metrics"]["accuracy"] > 0.9

    hosts.network.mend(unplugged)
    wait_until(lambda: hosts.online() == 3, hosts, "the node's return")
    wait_until(lambda: "node reconnected" in hosts.log(unplugged).read_text(), hosts, "its saying so")


def test_two_coordinators_that_began_while_the_switch_was_off_become_one_cluster(tmp_path: Path) -> None:
    """Each started its own coordinator. Their mDNS messages reached nobody meanwhile, and no cable was unplugged."""
    with netns.Network(3) as network:
        hosts = Hosts(network, tmp_path)
        network.isolate(hosts.machines[0])
        for host in hosts.machines:
            hosts.up(host)
        try:
            for host in hosts.machines:
                wait_until(lambda host=host: "is in cluster" in hosts.log(host).read_text(), hosts, "a cluster")  # type: ignore[misc]
            time.sleep(FIRST_QUESTIONS_SECONDS)
            network.reunite(hosts.machines[0])
            # No client asks meanwhile: all hosts would hear its question by mDNS, and the answers.
            wait_until(lambda: "gives way" in hosts.logs(), hosts, "an end of one of the two", 90)
            wait_until(lambda: hosts.online() == 2, hosts, "one cluster")
            assert sum("gives way" in hosts.log(host).read_text() for host in hosts.machines) == 1, hosts.logs()
        finally:
            hosts.stop()
