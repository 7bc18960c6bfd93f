"""Our own brokers: which one is chosen, and that it starts, stops, and dies with its parent."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from potluck import lifecycle
from potluck.errors import InvalidSettings, Unavailable
from potluck.net import broker
from potluck.net.broker import find_mosquitto, start_broker
from potluck.settings import BrokerSettings, Listen
from support.brokers import mosquitto_or_skip
from support.eventually import eventually
from support.processes import still_running

KINDS = ["mosquitto", "embedded"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Any:
    if request.param == "mosquitto":
        mosquitto_or_skip()
    return request.param


def accepts(host: str, port: int) -> bool:
    with socket.socket() as sock:
        sock.settimeout(1)
        return sock.connect_ex((host, port)) == 0


def folder_is_empty(folder: Path) -> bool:
    return not any(folder.iterdir())


async def test_a_broker_listens_when_it_is_started_and_not_after_it_was_stopped(kind: Any, tmp_path: Path) -> None:
    started = await start_broker(BrokerSettings(mode=kind, port=0), Listen(), tmp_path)
    assert (started.kind, started.host) == (kind, "127.0.0.1")
    assert accepts("127.0.0.1", started.port)
    await started.stop()
    await started.stop()
    assert not accepts("127.0.0.1", started.port)
    assert not psutil.pid_exists(started.pid)
    assert folder_is_empty(tmp_path), "nothing is left in the state folder"


@pytest.mark.skipif(sys.platform != "linux", reason="limits of another process are Linux's")
async def test_it_may_have_as_many_connections_as_the_daemon_allows_itself_files(kind: Any, tmp_path: Path) -> None:
    """mosquitto never raises its own limit, which is 1,024 on most systems; 5,000 nodes can still connect."""
    allowed = lifecycle.raise_file_limit()
    started = await start_broker(BrokerSettings(mode=kind, port=0), Listen(), tmp_path)
    limits = (Path("/proc") / str(started.pid) / "limits").read_text()
    await started.stop()
    soft, hard = (int(value) for value in re.findall(r"^Max open files\s+(\d+)\s+(\d+)", limits, re.MULTILINE)[0])
    assert soft == allowed
    assert soft > 5000 or hard <= 5000


async def test_wait_returns_when_the_broker_dies(kind: Any, tmp_path: Path) -> None:
    started = await start_broker(BrokerSettings(mode=kind, port=0), Listen(), tmp_path)
    waiting = asyncio.create_task(started.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    os.kill(started.pid, signal.SIGKILL)
    await asyncio.wait_for(waiting, 5)
    await started.stop()


async def test_two_brokers_live_side_by_side(kind: Any, tmp_path: Path) -> None:
    one, two = await asyncio.gather(
        *(start_broker(BrokerSettings(mode=kind, port=0), Listen(), tmp_path) for _ in range(2))
    )
    assert one.port != two.port
    await asyncio.gather(one.stop(), two.stop())


async def test_a_frozen_broker_is_killed(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker, "_STOP_SECONDS", 0.2)
    started = await start_broker(BrokerSettings(mode=kind, port=0), Listen(), tmp_path)
    os.kill(started.pid, signal.SIGSTOP)
    await asyncio.wait_for(started.stop(), 5)
    assert not psutil.pid_exists(started.pid)


async def test_it_dies_with_its_parent(kind: Any, tmp_path: Path) -> None:
    script = f"""
import asyncio, sys
from pathlib import Path
from potluck.net.broker import start_broker
from potluck.settings import BrokerSettings, Listen
async def main():
    started = await start_broker(BrokerSettings(mode={kind!r}, port=0), Listen(), Path({str(tmp_path)!r}))
    print(started.pid, started.port, flush=True)
    await started.wait()
asyncio.run(main())
"""
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
    assert parent.stdout is not None
    pid, port = map(int, (await asyncio.wait_for(parent.stdout.readline(), 20)).split())
    broker = psutil.Process(pid)
    assert accepts("127.0.0.1", port)
    parent.kill()
    await parent.wait()

    await eventually(lambda: not still_running([broker]))
    assert not accepts("127.0.0.1", port)


async def test_a_taken_port_is_an_error_or_in_auto_mode_a_free_one(tmp_path: Path) -> None:
    mosquitto_or_skip()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        for mode in KINDS:
            with pytest.raises(InvalidSettings, match=f"port {port} on 127.0.0.1 is taken"):
                await start_broker(BrokerSettings(mode=mode, port=port), Listen(), tmp_path)  # type: ignore[arg-type]
        started = await start_broker(BrokerSettings(mode="auto", port=port), Listen(), tmp_path)
        assert started.port != port
        await started.stop()


async def test_auto_prefers_mosquitto_then_the_embedded_one_then_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mosquitto_or_skip()
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_mosquitto() in ("/usr/sbin/mosquitto", "/usr/local/sbin/mosquitto")
    assert broker.choose("auto") == "mosquitto"
    monkeypatch.setattr(broker, "_SYSTEM_FOLDERS", ())
    caplog.set_level("INFO")
    assert broker.choose("auto") == "embedded"
    assert "embedded broker" in caplog.text
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for mode in ("auto", "embedded", "mosquitto"):
        with pytest.raises(Unavailable, match="apt install mosquitto"):
            await start_broker(BrokerSettings(mode=mode, port=0), Listen(), tmp_path)
    with pytest.raises(InvalidSettings, match="external"):
        await start_broker(BrokerSettings(mode="external"), Listen(), tmp_path)


async def test_a_broker_that_dies_at_its_start_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mosquitto_or_skip()
    monkeypatch.setattr(broker, "_MOSQUITTO_CONF", "listener {port} {host}\nnonsense true\n")
    with pytest.raises(Unavailable, match="nonsense"):
        await start_broker(BrokerSettings(mode="mosquitto", port=0), Listen(), tmp_path)


async def test_an_address_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    for port in (0, 1883):
        with pytest.raises(InvalidSettings, match=r"cannot listen on 192\.0\.2\.1"):
            await start_broker(BrokerSettings(port=port), Listen(host="192.0.2.1"), tmp_path)


def test_a_file_that_only_lies_in_the_folder_is_given_to_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mosquitto's user may write there, and root gives away what lies there: a second link to one of root's files must not be among it."""
    where, ours = tmp_path / "broker", tmp_path / "shadow"
    where.mkdir()
    ours.touch()
    rules = where / "acl.nodes"
    rules.touch()
    os.link(ours, where / "hard")
    (where / "soft").symlink_to(ours)
    os.mkfifo(where / "pipe")
    given: list[int] = []
    monkeypatch.setattr(os, "fchown", lambda handle, user, group: given.append(os.fstat(handle).st_ino))
    monkeypatch.setattr(broker, "_reader", lambda: 1234)
    broker._give_away(where)
    assert sorted(given) == sorted((where.stat().st_ino, rules.stat().st_ino))
