"""Data that live on nodes do not cross the wire: all packets between machines are recorded, and searched for the data.

A second test shows that the search works: the same data, as a registered data set, are found in the recording.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from potluck.lifecycle import die_with_parent
from support import netns
from support.digits import mlp
from support.eventually import eventually_now

pytestmark = [
    pytest.mark.netns,
    pytest.mark.tensorflow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(netns.available()), reason=netns.available() or "available"),
    pytest.mark.skipif(shutil.which("tcpdump") is None, reason="tcpdump is not installed (apt install tcpdump)"),
]

POTLUCK = [sys.executable, "-m", "potluck.cli.main"]
CLUSTER = "wire"
ROWS = 120


class Clinics:
    """Two machines with a data set each, and a third one for the user."""

    def __init__(self, network: netns.Network, folder: Path) -> None:
        self.network = network
        self.folder = folder
        self.machines, self.desk = network.hosts[:2], network.hosts[2]
        self.processes: list[subprocess.Popen[bytes]] = []
        self.rows: list[np.ndarray] = []
        for number, host in enumerate(self.machines):
            rng = np.random.default_rng(100 + number)
            x = rng.uniform(0, 1, (ROWS, 64)).astype(np.float32)
            self.rows.append(x)
            np.savez(folder / f"{host}.npz", x=x, y=rng.integers(0, 10, ROWS))

    def start(self) -> None:
        for host in self.machines:
            self.processes.append(
                self._start(
                    host, *POTLUCK, "up", "--insecure", "--cluster", CLUSTER, "--state-dir", str(self.folder / host),
                    "--data", f"secret={self.folder / host}.npz",
                )
            )  # fmt: skip

    def ask(self, *arguments: str) -> str:
        command = self.network.command(self.desk, *POTLUCK, "--cluster", CLUSTER, *arguments)
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def holders(self) -> list[str]:
        command = self.network.command(self.desk, *POTLUCK, "--cluster", CLUSTER, "data", "list", "--json")
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        found = json.loads(done.stdout) if done.returncode == 0 else []
        return next((info["nodes"] for info in found if info["name"] == "node:secret"), [])

    @contextmanager
    def recorded(self, name: str) -> Iterator[Path]:
        """Record all that crosses the bridge during the block, into tcpdump's file."""
        path = self.folder / f"{name}.pcap"
        command = ["tcpdump", "-i", "br0", "-s", "0", "-B", "65536", "-U", "-w", str(path), "tcp"]
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.network.bridge_host, *command],
                stderr=log,
                preexec_fn=die_with_parent(),
            )
        try:
            eventually_now(lambda: b"listening" in (self.folder / f"{name}.log").read_bytes(), 20)
            yield path
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(20)
        assert b"0 packets dropped by kernel" in (self.folder / f"{name}.log").read_bytes()

    def stop(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            process.wait(40)

    def _start(self, host: str, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{host}.log").open("wb") as log:
            return subprocess.Popen(
                self.network.command(host, *command), stdout=log, stderr=log, preexec_fn=die_with_parent()
            )


@pytest.fixture(scope="module")
def clinics(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clinics]:
    with netns.Network(3) as network:
        running = Clinics(network, tmp_path_factory.mktemp("clinics"))
        running.start()
        try:
            eventually_now(lambda: len(running.holders()) == 2, 90, every=0.5)
            yield running
        finally:
            running.stop()


def found_of(rows: np.ndarray, recording: bytes) -> int:
    """How many of the rows are in the recording: four neighbouring values of a row are enough."""
    return sum(any(row[start : start + 4].tobytes() in recording for start in (0, 20, 40, 60)) for row in rows)


def test_nothing_of_the_data_is_on_the_wire(clinics: Clinics) -> None:
    model = clinics.folder / "model.keras"
    mlp(width=16).save(model)
    with clinics.recorded("federated") as path:
        printed = clinics.ask(
            "train", str(model), "node:secret", "--validation", "node:secret", "--epochs", "3", "--json"
        )
        clinics.ask("evaluate", str(model), "node:secret")
    assert len(json.loads(printed)["history"]) == 3
    recording = path.read_bytes()
    assert len(recording) > model.stat().st_size, "the model itself went to both"
    assert [found_of(rows, recording) for rows in clinics.rows] == [0, 0]


def test_data_that_may_leave_are_found_on_the_wire(clinics: Clinics) -> None:
    model = clinics.folder / "model.keras"
    mlp(width=16).save(model)
    with clinics.recorded("shared") as path:
        clinics.ask("train", str(model), f"{clinics.folder / clinics.machines[0]}.npz")
    # Packets may end anywhere, so a few rows are cut in all four places. Most rows are enough.
    assert found_of(clinics.rows[0], path.read_bytes()) > ROWS * 0.9
