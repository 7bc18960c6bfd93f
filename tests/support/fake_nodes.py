"""Nodes with engines that only play, in a local cluster."""

from __future__ import annotations

import sys
from pathlib import Path

from potluck.local_cluster import Daemon, LocalCluster

FAKE = str(Path(__file__).with_name("fake_engine_node.py"))


def fake_node(running: LocalCluster, node_id: str) -> Daemon:
    """Start one; it joins soon."""
    command = [
        sys.executable, FAKE, "--cluster", running.cluster, "--node-id", node_id,
        "--state-dir", str(running.folder / node_id), "--seed", f"{running.broker_host}:{running.broker_port}", "--no-discovery",
    ]  # fmt: skip
    node = Daemon(node_id, command, running.folder / f"{node_id}.log", running.coordinator.environment)
    node.start()
    running.nodes.append(node)
    return node
