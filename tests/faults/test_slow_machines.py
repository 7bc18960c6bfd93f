"""A machine that is slow, or stands still for a while, makes nobody wait; and it takes part again when it can."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from potluck.client import Client
from potluck.local_cluster import LocalCluster
from potluck.wire.jobs import JobProgress
from support.digits import mlp, split
from support.processes import engines, throttled

pytestmark = [pytest.mark.tensorflow, pytest.mark.timeout(300)]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path, cluster="slow", nodes=2, discovery=False) as running:
        yield running


def until(job: Any, holds: Callable[[JobProgress], bool]) -> JobProgress:
    for progress in job.progress():
        if holds(progress):
            return progress
    raise AssertionError("the job ended before")


def test_a_frozen_engine_is_gone_on_without_and_takes_part_again(cluster: LocalCluster) -> None:
    data = split()
    with Client(f"{cluster.broker_host}:{cluster.broker_port}", cluster=cluster.cluster) as client:
        job = client.train(mlp(), (data["x_train"], data["y_train"]), epochs=5000, batch_size=32)
        until(job, lambda progress: progress.round > 3 and len(progress.nodes) == 2)
        name = cluster.nodes[1].name
        frozen = engines(cluster.nodes[1].pid)["work"]
        os.kill(frozen.pid, signal.SIGSTOP)
        try:
            late = until(job, lambda progress: name in progress.waiting)
            after = until(job, lambda progress: progress.round > late.round + 3)
            assert name in after.waiting
            assert name not in after.nodes
        finally:
            os.kill(frozen.pid, signal.SIGCONT)
        until(job, lambda progress: name in progress.nodes and name not in progress.waiting)
        assert frozen.is_running(), "it was not ended for standing still for a while"
        job.stop()
        job.wait(timeout=60)
        assert job.history["accuracy"][-1] > 0.95


def test_a_node_that_becomes_twenty_times_slower_holds_up_nobody(cluster: LocalCluster) -> None:
    data = split()
    with Client(f"{cluster.broker_host}:{cluster.broker_port}", cluster=cluster.cluster) as client:
        job = client.train(mlp(), (data["x_train"], data["y_train"]), epochs=5000, batch_size=32)
        before = until(job, lambda progress: progress.round > 3 and len(progress.nodes) == 2)
        rate = samples_per_second(job, before.round + 20)
        name = cluster.nodes[1].name
        slowed = engines(cluster.nodes[1].pid)["work"]
        with throttled(slowed, 1 / 20):
            noticed = until(job, lambda progress: name in progress.waiting)
            assert noticed.waiting[name]
            assert samples_per_second(job, noticed.round + 20) > rate / 4, (
                "half of it is the other node's, and the machine is shared"
            )
            job.stop()
            job.wait(timeout=60)
        assert slowed.is_running(), "it was not ended for being slow"
        assert job.history["accuracy"][-1] > 0.95


def samples_per_second(job: Any, round: int) -> float:
    """Of the rounds from now until this one."""
    first = until(job, lambda progress: True)
    started = time.monotonic()
    last = until(job, lambda progress: progress.round >= round)
    return (last.done - first.done) / (time.monotonic() - started)
