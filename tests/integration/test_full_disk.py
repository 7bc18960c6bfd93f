"""A node whose disk is full in the middle of training gives its part back and says why; at the coordinator, jobs wait for room."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from potluck.client import Client
from potluck.client.health import examine
from potluck.errors import DiskFull
from potluck.local_cluster import LocalCluster
from potluck.settings import ClientSettings
from support.digits import mlp, split
from support.engine_lab import engine_lab, training
from support.eventually import eventually_now

pytestmark = [pytest.mark.tensorflow, pytest.mark.timeout(300)]
PIECE_BYTES = 64 * 1024


@contextmanager
def small(mount: Path) -> Iterator[Path]:
    """A file system of 32 MiB."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small file system")
    mount.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(mount)], check=False).returncode:
        pytest.skip("may not mount here")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The state of node 2."""
    with small(tmp_path / "cluster" / "node-2") as mount:
        yield mount


@pytest.fixture
def coordinators_disk(tmp_path: Path) -> Iterator[Path]:
    with small(tmp_path / "cluster" / "coordinator") as mount:
        yield mount


def fill(path: Path) -> None:
    """Take almost all room. Others write there too, so it writes until the disk is full, and then gives a little back."""

    def write() -> None:
        with path.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * PIECE_BYTES)

    with pytest.raises(OSError, match="No space left"):
        write()
    os.truncate(path, max(0, path.stat().st_size - PIECE_BYTES))


def test_a_disk_that_fills_up_while_training(small_disk: Path) -> None:
    data = split()
    with LocalCluster(small_disk.parent, cluster="disk", nodes=2, discovery=False) as cluster:

        def coordinator_said(*words: str) -> bool:
            lines = cluster.coordinator.log_path.read_text().splitlines()
            return any(all(word in line for word in words) for line in lines)

        with Client(f"{cluster.broker_host}:{cluster.broker_port}", cluster=cluster.cluster) as client:
            job = client.train(
                mlp(width=4000), (data["x_train"], data["y_train"]), epochs=12, strategy="local", round_seconds=1.0
            )
            eventually_now(lambda: job.status().progress.round >= 2, 100)
            fill(small_disk / "something-else")
            eventually_now(lambda: coordinator_said("node-2", "disk"), 100)
            job.wait(timeout=200)
            assert len(job.result().history) == 12
            found = client.evaluate(job.model(), (data["x_test"], data["y_test"])).wait(timeout=100)
            assert found.result().evaluation.metrics["accuracy"] > 0.9
            # With room again it takes part again.
            (small_disk / "something-else").unlink()
            again = client.train(mlp(), (data["x_train"], data["y_train"]), epochs=3, strategy="local")
            eventually_now(lambda: "node-2" in again.status().progress.nodes, 100)
            again.wait(timeout=100)
            assert np.isfinite(again.history["loss"]).all()


def test_a_job_waits_for_room_at_the_coordinator(coordinators_disk: Path) -> None:
    data = split()
    with LocalCluster(coordinators_disk.parent, cluster="room", nodes=1, discovery=False) as cluster:
        seed = f"{cluster.broker_host}:{cluster.broker_port}"
        settings = ClientSettings(cluster=cluster.cluster, seeds=(seed,))
        with Client(seed, cluster=cluster.cluster) as client:
            job = client.train(
                mlp(width=4000), (data["x_train"], data["y_train"]), epochs=12, strategy="local", round_seconds=1.0
            )
            eventually_now(lambda: job.status().progress.round >= 2, 100)
            fill(coordinators_disk / "something-else")
            eventually_now(lambda: "waits for room at the coordinator" in job.status().progress.message, 60)

            async def told() -> bool:
                return any("jobs wait: the disk is full" in problem for problem in (await examine(settings)).problems)

            async def well() -> bool:
                return not await told()

            eventually_now(told, 60)
            assert job.status().state == "running"
            (coordinators_disk / "something-else").unlink()
            job.wait(timeout=200)
            assert len(job.result().history) == 12
            eventually_now(well, 30)


async def test_an_engine_without_room_says_so_and_goes_on(small_disk: Path) -> None:
    data = split()
    async with engine_lab(small_disk) as lab:
        shards = lab.files.arrays(1, x=data["x_train"], y=data["y_train"])
        task = training(lab.files.model(mlp(width=4000)), shards, samples=64)
        fill(small_disk / "something-else")
        with pytest.raises(DiskFull, match="disk is full"):
            await lab.run(task)
        (small_disk / "something-else").unlink()
        assert (await lab.run(task)).samples == 64
