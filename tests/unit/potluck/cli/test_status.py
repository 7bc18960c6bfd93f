"""`potluck status`: problems are named, in ten lines, and the exit code says how bad it is."""

from __future__ import annotations

import pytest
from msgspec.structs import replace
from typer.testing import CliRunner

from potluck.cli.listing import Facts
from potluck.cli.main import app
from potluck.cli.status import LINES, fitting
from potluck.client import health
from potluck.client.health import Health, clocks, remarks, troubles
from potluck.sole_use import User
from potluck.wire.questions import DeploymentInfo, NodeInfo, ReplicaInfo
from potluck.wire.values import Capacity, ErrorInfo

CAPACITY = Capacity(
    hostname="attic", system="Linux", cores=4, memory_bytes=8 << 30, runtimes={"tensorflow": "2.21.0"}, gflops=40
)
NODE = NodeInfo(node_id="attic-1", state="online", capacity=CAPACITY, seen_at=1e9)
WELL = Health(
    cluster="default", broker="10.0.0.1:1883", coordinator="online", gateway=("http://10.0.0.1:7814",), nodes=(NODE,)
)
FAILING = DeploymentInfo(
    name="digits:1", wanted=1, state="failing",
    replicas=(ReplicaInfo(replica_id="r", node_id="attic-1", state="failed", error=ErrorInfo(code="x", message="no room", retryable=False)),),
)  # fmt: skip


def test_nothing_is_wrong_where_nothing_is() -> None:
    assert troubles(WELL) == []
    assert remarks(WELL) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"nodes": ()}, "no node has joined yet"),
        ({"nodes": (replace(NODE, state="offline"),)}, "no node is online"),
        ({"nodes": (NODE, replace(NODE, node_id="shed-2", state="offline"))}, "node shed-2 is offline, last seen "),
        ({"nodes": (replace(NODE, state="suspect"),)}, "node attic-1 is silent since"),
        (
            {"nodes": (replace(NODE, capacity=replace(CAPACITY, runtimes={"keras": "3"})),)},
            "node attic-1 cannot compute",
        ),
        ({"nodes": (replace(NODE, clock_ahead_seconds=-40.2),)}, "attic-1's clock is 40 s behind the coordinator's"),
        (
            {"shortage": "the disk is full"},
            "the coordinator can store no more data, models and results, and jobs wait: the disk",
        ),
        (
            {"nodes": (replace(NODE, shortage="the disk is full"),)},
            "node attic-1 can store no more data and models: the disk",
        ),
        ({"clock_ahead_seconds": 7200.0}, "this machine's clock is 7200 s ahead of the coordinator's"),
        ({"deployments": (FAILING,)}, "deployment digits:1 fails: no room"),
    ],
)
def test_what_is_wrong_is_said(changed: dict[str, object], said: str) -> None:
    assert any(said in text for text in troubles(replace(WELL, **changed))), said


def test_the_clock_that_is_wrong_is_the_one_that_no_other_agrees_with() -> None:
    nodes = tuple(replace(NODE, node_id=f"n{number}", clock_ahead_seconds=-3600.0 + number) for number in range(2))
    assert clocks(nodes, -3600.4) == ["the coordinator's clock is 3600 s ahead of all others: set it (NTP)"]
    assert clocks(nodes) == ["the coordinator's clock is 3600 s ahead of all others: set it (NTP)"]
    assert clocks(nodes, 0.2) == [
        "node n0's clock is 3600 s behind the coordinator's: set it (NTP)",
        "node n1's clock is 3599 s behind the coordinator's: set it (NTP)",
    ]
    assert clocks([replace(NODE, clock_ahead_seconds=90.0, state="offline")], 2.0) == []


def test_a_node_that_runs_here_and_has_not_come_is_told_of() -> None:
    up, coordinator = User("up", "default", 17), User("coordinator", "default", 18)
    empty = replace(WELL, nodes=())
    (said,) = troubles(empty, [coordinator, up])
    assert said.startswith("no node has joined yet, but `potluck up` (pid 17, cluster 'default') runs on this machine")
    assert troubles(empty, [coordinator]) == troubles(empty)


def test_a_node_that_left_is_no_trouble_and_loopback_is_remarked() -> None:
    left = replace(NODE, node_id="shed-2", state="offline", left=True)
    found = replace(WELL, nodes=(NODE, left), gateway=("http://127.0.0.1:7814",), cluster="lab")
    assert troubles(found) == []
    private, gone = remarks(found)
    assert private.endswith("\npotluck up --insecure --cluster lab")
    assert gone.startswith("node shed-2 left at")


def test_nodes_of_which_the_same_is_wrong_are_named_together() -> None:
    gone = [replace(NODE, node_id=f"shed-{number}", state="offline") for number in range(5)]
    (said,) = troubles(replace(WELL, nodes=(NODE, *gone[:3])))
    assert said.startswith("nodes shed-0, shed-1, shed-2 are offline, last seen ")
    silent = [replace(node, state="suspect") for node in gone]
    (said,) = troubles(replace(WELL, nodes=(NODE, *silent)))
    assert said.startswith("nodes shed-0, shed-1, shed-2 and 2 more are silent since ")


@pytest.mark.parametrize("width", [80, 10_000])
@pytest.mark.parametrize("count", [0, 1, 2, 20])
def test_ten_lines_hold_any_number_of_troubles(width: int, count: int) -> None:
    """The first problem is whole, the others are counted: with long ids, many deployments, and much on this machine."""
    others = tuple(f"10.0.0.{number}:1883" for number in range(9))
    deployments = tuple(replace(FAILING, name=f"a-model-with-a-long-name-{number}:12") for number in range(count))
    nodes = tuple(
        replace(NODE, node_id=f"the-{state}-{number}", state=state, clock_ahead_seconds=60.0 * number)  # type: ignore[arg-type]
        for state in ("offline", "suspect", "online")
        for number in range(count)
    )
    found = replace(WELL, since=1e9, nodes=nodes, deployments=deployments, others=others if count > 1 else ())
    found = replace(found, problems=tuple(troubles(found)), remarks=tuple(remarks(found)))
    local = [str(User(what, "default", 17 + count)) for what in ("up", "node", "coordinator")]
    rows = fitting(found, local, width)
    lines = [line.plain for line in Facts(rows).lines(width)]
    assert len(lines) <= LINES
    assert ("wrong", found.problems[0]) in rows
    shown = [text for name, text in rows if name == "wrong"]
    more = len(found.problems) - len(shown)
    assert more == 0 or rows[-1] == ("", f"and {more} more: `potluck status --json` shows all of them")


def test_what_leaves_no_room_for_what_is_wrong_is_not_shown() -> None:
    found = replace(WELL, problems=("x " * 200, "y"))
    names = [name for name, _ in fitting(found, ["here"], 80)]
    assert names == ["cluster", "broker", "coordinator", "wrong", "wrong"]


def test_three_nodes_that_are_gone_are_named_in_ten_lines_of_80_columns() -> None:
    gone = tuple(replace(NODE, node_id=f"machine-{number}", state="offline") for number in range(3))
    found = replace(WELL, nodes=(NODE, *gone))
    rows = fitting(replace(found, problems=tuple(troubles(found))), ["here"], 80)
    lines = [line.plain for line in Facts(rows).lines(80)]
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= 80
    assert "machine-0, machine-1, machine-2" in "".join(lines)
    assert ("here", "here") in rows


@pytest.mark.parametrize(
    ("coordinator", "problems", "code"),
    [("online", (), 0), ("online", ("x",), 1), ("offline", ("x",), 4), ("", ("x",), 4)],
)
def test_the_exit_code_says_how_bad_it_is(
    coordinator: str, problems: tuple[str, ...], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def examine(settings: object) -> Health:
        return replace(WELL, coordinator=coordinator, problems=problems)

    monkeypatch.setattr(health, "examine", examine)
    done = CliRunner().invoke(app, ["status"])
    assert done.exit_code == code, done.output
    assert ("all is well" in done.output) is not bool(problems)
