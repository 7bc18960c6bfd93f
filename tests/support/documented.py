"""Runs the commands that the protocol page shows, on a test's cluster."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

from potluck.local_cluster import LocalCluster

PAGE = Path(__file__).parents[2] / "docs" / "protocol.md"


def shortest_way(cluster: LocalCluster, model: str) -> list[dict[str, Any]]:
    """The answers to the commands of "The shortest way", with `model` (4 numbers per row) in place of the page's `iris`."""
    section = PAGE.read_text(encoding="utf-8").split("## The shortest way")[1].split("\n## ")[0]
    (script,) = re.findall(r"```sh\n(.*?)```", section, flags=re.DOTALL)
    for page, here in (
        ("-h 127.0.0.1", f"-h {cluster.broker_host} -p {cluster.broker_port}"),
        ("potluck/v1/default/", f"potluck/v1/{cluster.cluster}/"),
        ("/models/iris/", f"/models/{model}/"),
    ):
        assert page in script
        script = script.replace(page, here)
    done = subprocess.run(
        ["bash", "-e"], input=script, env=os.environ, capture_output=True, text=True, timeout=60, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]
