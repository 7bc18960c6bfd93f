"""Daemons as systemd starts them: the status that they report, and how they end when they or their broker fail.

All start in a folder whose files have the names of our packages: none of these files may be imported.
"""

from __future__ import annotations

import signal
import socket
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from support.brokers import BrokerKind, TestBroker, mosquitto_or_skip
from support.eventually import eventually
from support.node_lab import NodeProcess
from support.processes import still_running

CLUSTER = "service"
QUICK = {"POTLUCK_BUS__RECONNECT_MIN_SECONDS": "0.05", "POTLUCK_BUS__RECONNECT_MAX_SECONDS": "0.2"}


class Unit(NodeProcess):
    """A daemon with a socket for its messages to systemd. `said` has all of them, `status` is the last STATUS."""

    def __init__(self, folder: Path, daemon: str, *arguments: str, systemds: bool = False) -> None:
        """`systemds`: the socket is a file, as systemd's is."""
        elsewhere = folder / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        for name in ("node", "coordinator", "potluck"):
            (elsewhere / f"{name}.py").write_text("raise SystemExit('imported from the current folder')\n")
        state = folder / f"{daemon}-state"
        super().__init__(
            folder,
            [
                "env", "-C", str(elsewhere), str(Path(sys.executable).with_name(f"potluck-{daemon}")),
                "--cluster", CLUSTER, "--no-discovery", "--state-dir", str(state), *arguments,
            ],
        )  # fmt: skip
        self._address = str(folder / "notify") if systemds else f"@potluck-test-{uuid.uuid4().hex}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self._address.replace("@", "\0"))
        self._socket.setblocking(False)
        self._said: list[str] = []

    async def start(self, **environment: str) -> None:
        unit = {"NOTIFY_SOCKET": self._address, "WATCHDOG_USEC": "5000000"}
        await super().start(**unit, **QUICK, **environment)

    @property
    def said(self) -> list[str]:
        while True:
            try:
                self._said += self._socket.recv(65536).decode().splitlines()
            except BlockingIOError:
                return self._said

    @property
    def status(self) -> str:
        return next((line.removeprefix("STATUS=") for line in reversed(self.said) if line.startswith("STATUS=")), "")

    async def says(self, words: str, seconds: float = 15) -> str:
        try:
            return await eventually(lambda: self.status if words in self.status else "", seconds)
        except AssertionError:
            raise AssertionError(f"no {words!r} but {self.status!r}; the log:\n{self.log()[-2000:]}") from None

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
async def units() -> AsyncIterator[list[Unit]]:
    made: list[Unit] = []
    yield made
    for unit in made:
        if unit.process is not None and unit.process.returncode is None:
            await unit.stop(signal.SIGKILL)
        unit.close()


async def test_the_status_for_systemd_is_true(tmp_path: Path, units: list[Unit]) -> None:
    broker = TestBroker("mosquitto", tmp_path)
    await broker.start()
    seed = ("--seed", f"127.0.0.1:{broker.port}")
    node, coordinator = Unit(tmp_path, "node", *seed), Unit(tmp_path, "coordinator", *seed)
    units += [node, coordinator]
    await broker.kill()
    await node.start()
    await node.says(" looks for cluster service (since 20")
    await eventually(lambda: node.said.count("EXTEND_TIMEOUT_USEC=8000000") > 1)
    assert "READY=1" not in node.said, "what comes after this unit may want to use the cluster"
    await broker.start()
    await eventually(lambda: "READY=1" in node.said)
    await node.says(" is in cluster service, which has no coordinator (since 20")
    await coordinator.start()
    assert (await node.says(" is in cluster service (since 20")).endswith(")")
    assert (await coordinator.says("cluster service is served (since 20")).endswith(": 1 node")
    assert "READY=1" in coordinator.said
    extended = node.said.count("EXTEND_TIMEOUT_USEC=8000000")
    for unit in units:
        beats = unit.said.count("WATCHDOG=1")
        await eventually(lambda unit=unit, beats=beats: unit.said.count("WATCHDOG=1") > beats + 1)  # type: ignore[misc]

    await broker.kill()
    since = await node.says(" has no connection to the broker of cluster service, trying again (since 20")
    await coordinator.says("cluster service is not served (since 20")
    for unit in units:
        beats = unit.said.count("WATCHDOG=1")
        await eventually(lambda unit=unit, beats=beats: unit.said.count("WATCHDOG=1") > beats + 1)  # type: ignore[misc]
    assert node.status == since, "the time since when stays the same"
    await broker.start()
    await node.says(" is in cluster service (since 20")
    assert await coordinator.stop() == 0
    await node.says(" is in cluster service, which has no coordinator (since 20")
    await eventually(lambda: "speed known" in node.log(), 60)
    assert "speed not measured" not in node.log()
    assert await node.stop() == 0
    assert [unit.said.count("STOPPING=1") for unit in units] == [1, 1]
    assert [unit.said.count("READY=1") for unit in units] == [1, 1]
    assert node.said.count("EXTEND_TIMEOUT_USEC=8000000") == extended
    await broker.stop()


@pytest.mark.parametrize("older", [True, False])
async def test_in_a_unit_of_before_a_node_is_ready_without_a_bus(
    tmp_path: Path, units: list[Unit], older: bool
) -> None:
    """Such a unit has no RuntimeDirectory, and the machine's start waits for it."""
    node = Unit(tmp_path, "node", "--seed", "127.0.0.1:1", systemds=True)
    units.append(node)
    await node.start(**({} if older else {"RUNTIME_DIRECTORY": str(tmp_path)}))
    await node.says(" looks for cluster service (since 20")
    assert ("READY=1" in node.said) == older
    assert await node.stop() == 0
    assert not (tmp_path / "starts").exists(), "a stop is no crash"


@pytest.mark.parametrize("kind", ["mosquitto", "embedded"])
async def test_a_broker_that_hangs_is_ended_with_its_coordinator(
    tmp_path: Path, units: list[Unit], kind: BrokerKind
) -> None:
    if kind == "mosquitto":
        mosquitto_or_skip()
    coordinator = Unit(tmp_path, "coordinator", "--broker", kind, "--broker-port", "0")
    units.append(coordinator)
    await coordinator.start(POTLUCK_BUS__KEEPALIVE_SECONDS="2", POTLUCK_BUS__CONNECT_TIMEOUT_SECONDS="0.5")
    await coordinator.says("is served")
    (broker,) = psutil.Process(coordinator.pid).children()
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC"} & set(broker.environ()), "only the daemon speaks to systemd"
    broker.send_signal(signal.SIGSTOP)
    await coordinator.says("is not served")
    assert await coordinator.ended(20) == 4
    assert "the broker process does not answer" in coordinator.status
    assert coordinator.log().splitlines()[-1] == f"potluck-coordinator: {coordinator.status}"
    assert not still_running([broker])


@pytest.mark.parametrize(
    ("daemon", "arguments", "code", "words"),
    [
        ("node", ("--log-level", "loud"), 2, "log_level"),
        ("coordinator", ("--listen", "192.0.2.1", "--insecure"), 5, "192.0.2.1"),
    ],
)
async def test_lasting_and_passing_errors_have_different_exit_codes(
    tmp_path: Path, units: list[Unit], daemon: str, arguments: tuple[str, ...], code: int, words: str
) -> None:
    unit = Unit(tmp_path, daemon, *arguments)
    units.append(unit)
    await unit.start()
    assert await unit.ended(20) == code
    assert words in unit.status
