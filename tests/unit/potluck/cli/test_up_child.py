"""A daemon that `potluck up` keeps running: restarted when it ends, given up when it never runs long."""

from __future__ import annotations

import asyncio
import sys
import uuid
from pathlib import Path

import pytest

from potluck.cli import joining
from potluck.cli.joining import TRIES, Child, Joining
from potluck.cli.plan import Plan
from potluck.errors import Conflict, GaveWay, Unavailable
from potluck.net.discovery import Discovery, Service
from potluck.settings import Listen, NetworkSettings
from support.eventually import eventually

SAY = "import pathlib, sys; file = pathlib.Path(sys.argv[1]); file.write_text(file.read_text() + '.');"


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with one dot for each start."""
    monkeypatch.setattr(joining, "BACKOFF_SECONDS", (0.01, 0.02))
    path = tmp_path / "told"
    path.write_text("")
    return path


def started(told: Path) -> int:
    return len(told.read_text())


@pytest.mark.parametrize(
    ("status", "starts", "said"), [(2, 1, "cannot run"), (1, TRIES, f"ended {TRIES} times in a row")]
)
async def test_what_never_runs_is_given_up(told: Path, status: int, starts: int, said: str) -> None:
    child = Child("node", [sys.executable, "-c", f"{SAY} sys.exit({status})", str(told)], print)
    async with asyncio.timeout(30):
        with pytest.raises(Unavailable, match=said):
            await child.run()
    assert started(told) == starts


async def test_a_coordinator_that_gave_way_is_not_started_again(told: Path) -> None:
    said: list[str] = []
    script = f"{SAY} sys.exit({GaveWay.exit_code})"
    child = Child("coordinator", [sys.executable, "-c", script, str(told)], said.append)
    async with asyncio.timeout(30):
        await child.run()
    assert started(told) == 1
    assert said == ["the coordinator gave way to another one that was there first: this machine joins its cluster"]


async def test_how_a_daemon_says_it_is_is_passed_on_once_it_stays_so(
    told: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "TOLD_SECONDS", 0.5)
    script = (
        "import sys; from potluck.lifecycle import notify\n"
        "for text in ('READY=1\\nSTATUS=connecting', 'STATUS=looking', 'STATUS=looking', 'WATCHDOG=1'): notify(text)\n"
        "import pathlib, time\n"
        "while not pathlib.Path(sys.argv[1]).read_text(): time.sleep(0.05)\n"
        "notify('STATUS=joined'); time.sleep(60)"
    )
    heard: list[str] = []
    child = Child("node", [sys.executable, "-c", script, str(told)], heard.append)
    running = asyncio.create_task(child.run())
    await eventually(lambda: heard == ["looking"], timeout_seconds=30)
    await asyncio.to_thread(told.write_text, "go on")
    await eventually(lambda: heard == ["looking", "joined"], timeout_seconds=30)
    await child.stop()
    running.cancel()
    await asyncio.wait([running])


async def test_what_has_run_is_started_again_however_often_it_ends(told: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "STEADY_SECONDS", 0.0)
    child = Child("node", [sys.executable, "-c", f"{SAY} sys.exit(1)", str(told)], print)
    running = asyncio.create_task(child.run())
    await eventually(lambda: started(told) > TRIES + 1, timeout_seconds=30)
    await child.stop()
    running.cancel()
    await asyncio.wait([running])


async def test_a_port_that_was_taken_is_warned_of_by_the_daemon_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    plan = Plan(NetworkSettings(), Listen(), tmp_path, None, "WARNING")
    joining_one = Joining(plan, said.append)

    async def service(*_: object) -> Service:
        return Service("c", "default", "coordinator", "127.0.0.1", 7815, 1883)

    monkeypatch.setattr(joining_one, "_coordinator_service", service)
    monkeypatch.setattr(joining_one, "_child", lambda name: Child(name, [sys.executable, "-c", ""], said.append))
    monkeypatch.setattr(Child, "run", service)
    async with asyncio.TaskGroup() as tasks:
        await joining_one._start_coordinator(tasks)
    assert said == ["started the broker 127.0.0.1:1883 and the gateway http://127.0.0.1:7815"]


async def test_beside_a_node_of_another_user_none_is_started_at_a_seed_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    cluster, started = f"t{uuid.uuid4().hex[:8]}", asyncio.Event()

    async def run(*_: object) -> None:
        started.set()

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    def up(state_dir: Path | None) -> Joining:
        network = NetworkSettings(cluster=cluster, seeds=("127.0.0.1:1",))
        return Joining(Plan(network, Listen(), state_dir, None, "WARNING"), print)

    monkeypatch.setattr(Child, "run", run)
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server, Discovery(cluster) as discovery:
        port = server.sockets[0].getsockname()[1]
        await discovery.advertise(Service("theirs", cluster, "node", "127.0.0.1", port))
        with pytest.raises(
            Conflict,
            match=rf"this machine already has the node theirs \(cluster '{cluster}'\) at http://127.0.0.1:{port}",
        ):
            await up(None).run(asyncio.Event())
        assert not started.is_set()
        await up(tmp_path / "another").run(asyncio.Event())
        assert started.is_set()
