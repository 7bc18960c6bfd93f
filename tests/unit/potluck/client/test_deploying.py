"""The options of `deploy` in the client: numbers of replicas in all their forms, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import typer

from potluck.cli import output
from potluck.cli.models import _seconds
from potluck.client import deploying
from potluck.errors import InvalidRequest
from potluck.wire.jobs import Deploy
from potluck.wire.questions import DeploymentInfo, ReplicaInfo


@pytest.mark.parametrize(
    ("replicas", "fields"),
    [
        (2, {"replicas": 2}),
        ("2", {"replicas": 2}),
        ("all", {"replicas": 0}),
        ("2..4", {"replicas": 2, "min_replicas": 2, "max_replicas": 4}),
        ("0..4", {"replicas": 1, "min_replicas": 0, "max_replicas": 4, "idle_seconds": 300.0}),
    ],
)
def test_replicas(replicas: int | str, fields: dict[str, Any]) -> None:
    found = deploying.fields(replicas, {})
    assert found == fields
    assert Deploy(model="m", **found)


@pytest.mark.parametrize(
    ("replicas", "options", "said"),
    [
        ("two", {}, "replicas must be .*'MIN..MAX', not 'two'"),
        ("4..2", {}, "MAX at least MIN and 1, not '4..2'"),
        ("0..0", {}, "MAX at least MIN and 1"),
        (-1, {}, "not -1"),
        (0, {}, "from 1 to 999,999, .all., or .MIN..MAX., not 0"),
        ("0", {}, "not 0"),
        ("9" * 20, {}, "from 1 to 999,999, .*, not 9999"),
        ("1..4", {"idle_seconds": 60}, r"always keeps 1 loaded: to unload all when idle, write '0\.\.4'"),
        (1, {"canary": 101}, "canary must be a whole number of percent"),
        (1, {"canary": 0}, "of percent, from 1 to 100"),
        (1, {"rollback_factor": 0.5}, r"above 1, or 0 \(never\)"),
    ],
)
def test_what_cannot_be_is_refused(replicas: int | str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        deploying.fields(replicas, options)


def test_other_options_go_with_them() -> None:
    found = deploying.fields("0..4", {"idle_seconds": 60, "canary": 10, "keep": True})
    assert found["idle_seconds"] == 60
    assert (found["canary"], found["keep"]) == (10, True)


def test_a_deployment_is_told_with_its_traffic_and_reason(capsys: pytest.CaptureFixture[str]) -> None:
    ready = ReplicaInfo(replica_id="m:2/a/1", node_id="a", state="ready")
    output.show(
        output.deployments_table(
            [
                DeploymentInfo(
                    name="m:1",
                    wanted=1,
                    replicas=(ready,),
                    state="ready",
                    role="stable",
                    weight=90,
                    p99_seconds=0.012,
                    min_replicas=1,
                    max_replicas=4,
                ),
                DeploymentInfo(name="m:2", wanted=2, replicas=(), state="withdrawn", reason="rolled back: its p99"),
            ]
        )
    )
    first, second = capsys.readouterr().out.splitlines()[1:]
    for said in ("m:1", "ready", "stable 90 %", "1/1..4", "12.0 ms"):
        assert said in first
    assert first.endswith("  on a ready")
    for said in ("m:2", "withdrawn", "0/2"):
        assert said in second
    assert second.endswith("  rolled back: its p99")


def test_an_objective_is_given_in_milliseconds_or_seconds() -> None:
    assert [_seconds(text) for text in ("50ms", "0.05", "2s", "0")] == [0.05, 0.05, 2.0, 0.0]
    for wrong in ("soon", "-1", "nan", "2h", "4000"):
        with pytest.raises(typer.BadParameter, match="write 50ms"):
            _seconds(wrong)
    assert deploying.fields(1, {"objective": 0.05})["objective_seconds"] == 0.05
    with pytest.raises(InvalidRequest, match="objective must be a number of seconds"):
        deploying.fields(1, {"objective": "soon"})
