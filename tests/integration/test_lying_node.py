"""A node with wrong results beside an honest one: real daemons, and TensorFlow in the honest one."""

from __future__ import annotations

from pathlib import Path

import pytest

from potluck.client import Client
from potluck.local_cluster import LocalCluster
from support.digits import mlp, split
from support.eventually import eventually_now
from support.fake_nodes import fake_node

pytestmark = [pytest.mark.tensorflow, pytest.mark.timeout(200)]


def test_a_lying_node_changes_no_result_gets_no_more_jobs_and_is_named(tmp_path: Path) -> None:
    data = split()
    x, y = data["x_train"], data["y_train"]
    with (
        LocalCluster(tmp_path, cluster="liar", nodes=1, discovery=False) as cluster,
        Client(f"{cluster.broker_host}:{cluster.broker_port}", cluster="liar") as client,
    ):
        cluster._wait_joined(fake_node(cluster, "liar", "lying_node"))
        model = mlp()
        expected = model.evaluate(x, y, verbose=0, return_dict=True)

        def left_out() -> str:
            found = client.evaluate(model, (x, y)).wait(timeout=120).evaluation
            assert found.count == len(x)
            assert found.metrics["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert found.metrics["accuracy"] == pytest.approx(expected["accuracy"], abs=1e-6)
            return next(one.left_out for one in client.nodes() if one.node_id == "liar")

        why = eventually_now(left_out, 60)
        assert "3 of its results were not what was asked for" in why
        assert str(2**53) in why
