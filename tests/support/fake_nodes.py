"""Nodes with fake engines in a local cluster."""

from __future__ import annotations

import sys
from pathlib import Path

from potluck.local_cluster import Daemon, LocalCluster

HERE = Path(__file__).parent


def fake_node(running: LocalCluster, node_id: str, program: str = "fake_engine_node") -> Daemon:
    """Start such a node; it joins soon. `program`: the module in this folder to run."""
    command = [
        sys.executable, str(HERE / f"{program}.py"), "--cluster", running.cluster, "--node-id", node_id,
        "--state-dir", str(running.folder / node_id), "--seed", f"{running.broker_host}:{running.broker_port}", "--no-discovery",
    ]  # fmt: skip
    node = Daemon(node_id, command, running.folder / f"{node_id}.log", running.coordinator.environment)
    node.start()
    running.nodes.append(node)
    return node
