"""SIGHUP: real daemons take over changed settings, and nothing ends them."""

from __future__ import annotations

import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from potluck.wire.births import NodeCapacity
from support.eventually import eventually
from support.node_lab import Lab, NodeProcess, node_lab

HANGUP_BIT = 1 << (signal.SIGHUP - 1)


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    async with node_lab(tmp_path) as lab:
        yield lab


def hang_up(node: NodeProcess) -> None:
    assert node.process is not None
    node.process.send_signal(signal.SIGHUP)


def ignored_signals(pid: int) -> int:
    """A mask, from proc_pid_status(5)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("SigIgn:")[1].split()[0], 16)


async def test_a_node_takes_over_its_data_and_log_level(lab: Lab, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 2), np.float32), y=np.arange(4))
    file = tmp_path / "node.toml"
    file.write_text("log_level = 'WARNING'\n")
    node = await lab.node("--config", str(file))
    file.write_text(f"log_level = 'INFO'\ntelemetry_seconds = 9.0\n[data]\na = '{tmp_path / 'a.npz'}'\n")
    hang_up(node)
    await lab.heard(NodeCapacity, lambda one: [data.name for data in one.data] == ["a"])
    # a line of level INFO
    assert "settings reloaded changed=log_level,data" in node.log()

    file.write_text("log_level = 'INFO'\n[data]\na = 7\n")
    hang_up(node)
    await eventually(lambda: "settings not reloaded, the old ones stay" in node.log())
    assert f"{file}:3: data.a is 7, expected" in node.log()

    file.write_text("log_level = 'INFO'\nseeds = ['127.0.0.1:1']\nresend_seconds = 7.0\n")
    before = len(lab.all(NodeCapacity))
    hang_up(node)
    await lab.heard(NodeCapacity, lambda one: one.data == (), after=before)
    assert await node.stop() == 0


async def test_what_needs_a_restart_is_named(lab: Lab, tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text("")
    node = await lab.node("--config", str(file), "--log-level", "INFO")
    file.write_text("engine_idle_seconds = 1.0\n[listen]\nport = 9\n[http]\nconnections = 9\n")
    hang_up(node)
    await eventually(lambda: "need a restart have changed too changed=listen,http,engine_idle_seconds" in node.log())
    assert "settings reloaded changed=nothing" in node.log()


async def test_a_coordinator_takes_over_its_log_level_and_its_broker_is_no_heir(tmp_path: Path) -> None:
    """It was started by somebody who ignores SIGHUP, as `nohup` does. It listens all the same, and its children know nothing of it."""
    file = tmp_path / "coordinator.toml"
    file.write_text("[discovery]\nenabled = false\n[listen]\nport = 0\n[broker]\nport = 0\n")
    ignoring = (
        "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv(sys.executable, sys.argv[1:])"
    )
    command = [sys.executable, "-c", ignoring, sys.executable, "-m", "coordinator", "--config", str(file)]
    coordinator = NodeProcess(tmp_path, [*command, "--state-dir", str(tmp_path / "state")])
    await coordinator.start()
    try:
        await eventually(lambda: "coordinator ready" in coordinator.log(), 30)
        for child in psutil.Process(coordinator.pid).children(recursive=True):
            # mosquitto has a handler of its own for it
            assert not ignored_signals(child.pid) & HANGUP_BIT
        file.write_text(file.read_text() + "[bus]\nplain = true\n")
        hang_up(coordinator)
        await eventually(lambda: "need a restart have changed too changed=bus" in coordinator.log())
        file.write_text("cluster = ")
        hang_up(coordinator)
        await eventually(lambda: "settings not reloaded" in coordinator.log())
        assert coordinator.process is not None
        assert coordinator.process.returncode is None
    finally:
        assert await coordinator.stop() == 0
