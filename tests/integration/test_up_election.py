"""`potluck up` on several "machines" at once, real processes and mDNS on loopback: exactly one starts a coordinator."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import psutil
import pytest

from support.eventually import eventually

STAND_IN = """
import asyncio, signal, sys
from pathlib import Path
from potluck.net.discovery import Discovery, Service

async def main():
    cluster = sys.argv[sys.argv.index("--cluster") + 1]
    with Path("started").open("a") as file:
        file.write("%s\\n")
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with Discovery(cluster) as discovery:
        if %r == "coordinator":
            await asyncio.sleep(1.0)  # as long as a real one takes until it can be seen
            await discovery.advertise(Service("c", cluster, "coordinator", "127.0.0.1", 1, 1883))
        await stop.wait()
    with Path("stopped").open("a") as file:
        file.write("%s\\n")

asyncio.run(main())
"""
RUN = """
from potluck.cli import joining, main

joining.LAUNCHER = ("-P", "-m")  # not by way of `potluck.daemons`, which refuses stand-ins
main.main()
"""
Up = Callable[[str], Awaitable[asyncio.subprocess.Process]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder where stand-ins of the daemons note their start and end. Other files of these names would note theirs, too."""
    for daemon in ("coordinator", "node"):
        (tmp_path / f"{daemon}.py").write_text(STAND_IN % ("by-chance", "by-chance", "by-chance"))
        (tmp_path / "installed").mkdir(exist_ok=True)
        (tmp_path / "installed" / f"{daemon}.py").write_text(STAND_IN % (daemon, daemon, daemon))
    return tmp_path


def lines(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


@asynccontextmanager
async def started(folder: Path, cluster: str, *options: str) -> AsyncIterator[asyncio.subprocess.Process]:
    command = [sys.executable, "-P", "-c", RUN, "up", "--loopback", "--cluster", cluster, *options]
    with (folder / "log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *command, cwd=folder, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": str(folder / "installed")}
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.parametrize("seconds_apart", [0.0, 0.7])
async def test_of_several_machines_one_starts_the_coordinator(folder: Path, seconds_apart: float) -> None:
    cluster = f"t{uuid.uuid4().hex[:8]}"
    async with AsyncExitStack() as stack:
        machines = []
        for number in range(3):
            state = ("--state-dir", str(folder / f"state-{number}"))
            machines.append(await stack.enter_async_context(started(folder, cluster, *state)))
            await asyncio.sleep(seconds_apart)  # people do not type at once: the decisions spread over the window
        await eventually(lambda: lines(folder / "started").count("node") == 3, 40)
        assert lines(folder / "started").count("coordinator") == 1, (folder / "log").read_text()
        for machine in machines:
            machine.send_signal(signal.SIGTERM)
        assert [await asyncio.wait_for(machine.wait(), 20) for machine in machines] == [0, 0, 0]
    said = (folder / "log").read_text()
    assert said.count("only this machine is served. To share") == 3
    assert f"on the other machines:\n    potluck up --insecure --cluster {cluster}\n" in said
    assert sorted(lines(folder / "stopped")) == ["coordinator", "node", "node", "node"], "each ended properly"


async def test_a_daemon_that_dies_is_started_again_and_all_die_with_their_parent(folder: Path) -> None:
    state = ("--state-dir", str(folder / "state"))
    async with started(folder, "unused", "--seed", "127.0.0.1:1", *state) as machine:
        await eventually(lambda: lines(folder / "started") == ["node"], 20)
        (first,) = psutil.Process(machine.pid).children()
        first.kill()
        await eventually(lambda: lines(folder / "started") == ["node", "node"], 20)
        (second,) = psutil.Process(machine.pid).children()
        os.kill(machine.pid, signal.SIGKILL)
        await eventually(lambda: not second.is_running(), 10)
