"""A whole cluster on this machine, as real processes: for the demo, the tests and the benchmarks."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from potluck import lifecycle
from potluck.errors import TimedOut, Unavailable

if TYPE_CHECKING:
    from potluck.wire.members import MemberRole
    from potluck.wire.values import Message

STOP_SECONDS = 15.0
READY_SECONDS = 30.0
ANSWER_SECONDS = 15.0


@dataclass
class Daemon:
    """One daemon's process. It writes to `log_path`."""

    name: str
    command: list[str]
    log_path: Path
    environment: dict[str, str]
    cores: frozenset[int] | None = None
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def node_id(self) -> str:
        return self.name

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start the daemon, or start it again, on its cores."""
        died_with_us = lifecycle.die_with_parent()
        cores = self.cores

        def prepare() -> None:
            if died_with_us is not None:
                died_with_us()
            if cores is not None:
                os.sched_setaffinity(0, cores)

        with self.log_path.open("ab") as log:
            # Its own session: Ctrl-C reaches only us, and we stop the daemons in order.
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self.environment,
                start_new_session=True, preexec_fn=prepare,
            )  # fmt: skip

    def kill(self) -> None:
        """Send SIGKILL, like a power cut."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def terminate(self) -> None:
        if self.running and self.process is not None:
            self.process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float) -> int | None:
        """Its exit status; None if it did not end in time and was killed."""
        if self.process is None:
            return None
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def log_tail(self, lines: int = 15) -> str:
        text = self.log_path.read_text(errors="replace") if self.log_path.exists() else ""
        return "\n".join(text.splitlines()[-lines:])


class LocalCluster:
    """A coordinator (with its broker) and `nodes` nodes below `folder`, on loopback with free ports; a context manager.

    The nodes find the coordinator by mDNS, as on a network; or, with `discovery=False`, by its address. `cores` pins
    node i to the CPU `cores[i]`. `broker="external"` uses the broker that runs at `broker_port`. With `closed=True` it is a closed
    cluster: the nodes join with tokens, as other machines do, and `credentials` is the folder of an operator. Raises TimedOut or
    Unavailable, with the ends of the logs, when the cluster does not start.
    """

    def __init__(
        self,
        folder: Path,
        *,
        cluster: str,
        nodes: int = 2,
        discovery: bool = True,
        cores: Sequence[int] | None = None,
        broker: str = "auto",
        broker_port: int = 0,
        environment: Mapping[str, str] | None = None,
        closed: bool = False,
    ) -> None:
        self.folder = folder
        self.closed = closed
        self.client_port = 0
        """The broker's port for clients of a closed cluster."""
        self.cluster = cluster
        self.broker_host = "127.0.0.1"
        self.broker_port = broker_port
        self.http_url = ""
        self._discovery = discovery
        self._cores = cores
        self._broker = broker
        clean = {key: value for key, value in os.environ.items() if not key.startswith("POTLUCK_")}
        share = max(1, len(os.sched_getaffinity(0)) // max(1, nodes))
        self._environment = clean | {"POTLUCK_THREADS": str(share), "PYTHONUNBUFFERED": "1"} | dict(environment or {})
        self._count = nodes
        self.nodes: list[Daemon] = []
        self.coordinator = self._daemon(
            "coordinator", "coordinator", "--port", "0", "--broker-port", str(broker_port), "--broker", broker,
            *([] if discovery else ["--no-discovery"]),
        )  # fmt: skip
        if closed:
            self.coordinator.environment = self._environment | {
                "POTLUCK_CLOSED": "true", "POTLUCK_BROKER__CLOSED_PORT": str(broker_port), "POTLUCK_BROKER__CLIENT_PORT": "0",
            }  # fmt: skip

    @property
    def credentials(self) -> Path:
        """The credentials of the coordinator's machine's operator, in a closed cluster."""
        return self.folder / "coordinator" / "operator"

    def ask(self, question: Message) -> Message:
        """What the coordinator of a closed cluster answers to its machine's operator. Raises the error that is the answer, Unavailable."""
        from http.client import HTTPException, HTTPSConnection

        from potluck.security import certificates, contexts
        from potluck.wire import codec
        from potluck.wire.failures import as_error
        from potluck.wire.questions import RequestFailed

        host, _, port = self.http_url.partition("//")[2].rpartition(":")
        context = contexts.client_context(self.credentials, "client", certificates.COORDINATOR)
        connection = HTTPSConnection(host, int(port), timeout=ANSWER_SECONDS, context=context)
        try:
            connection.request(
                "POST", "/v1/control", codec.encode(question), {"Content-Type": codec.CONTENT_TYPES["msgpack"]}
            )
            answer = connection.getresponse()
            said = answer.read()
        except (OSError, HTTPException) as error:
            raise Unavailable(f"the coordinator does not answer: {error}") from error
        finally:
            connection.close()
        if answer.status != 200:
            raise Unavailable(f"the coordinator answers {answer.status}: {said[:500].decode(errors='replace')}")
        message, _ = codec.decode(said)
        if isinstance(message, RequestFailed):
            raise as_error(message.error)
        return message

    def token(self, role: MemberRole = "node", uses: int = 1) -> str:
        """A new join token of a closed cluster."""
        from potluck.wire.members import CreateToken, TokenCreated

        made = self.ask(CreateToken(role=role, uses=uses))
        assert isinstance(made, TokenCreated)
        return made.token

    def join(self, name: str, where: Path, role: MemberRole = "node") -> None:
        """Make somebody a member of a closed cluster, with its credentials in the folder `where`."""
        from potluck.enrolment import enrol
        from potluck.wire import tokens

        token = tokens.parse(self.token(role))
        with ThreadPoolExecutor(1) as another:  # there may be a loop in this thread
            another.submit(lambda: asyncio.run(enrol(token, name)).save(where)).result()

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.coordinator.start()
            if self._discovery and not self.closed:
                for _ in range(self._count):
                    self.add_node()
            self._wait_ready()
            if not self._discovery or self.closed:
                for _ in range(self._count):
                    self.add_node()
            for node in self.nodes:
                self._wait_joined(node)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def add_node(self, *arguments: str) -> Daemon:
        """Start one more node."""
        number = len(self.nodes)
        name = f"node-{number + 1}"
        seeds = [] if self._discovery else ["--no-discovery"]
        if not self._discovery and not self.closed:
            seeds += ["--seed", f"{self.broker_host}:{self.broker_port}"]
        node = self._daemon(name, "node", "--node-id", name, *seeds, *arguments)
        if self.closed:  # it then knows where the broker is
            self.join(name, self.folder / name / "identity")
        if self._cores is not None:
            node.cores = frozenset({self._cores[number]})
        node.start()
        self.nodes.append(node)
        return node

    def restart_coordinator(self) -> None:
        """Start the coordinator again in the same place: same state, same broker port, in a closed cluster the same ports."""
        at = self.coordinator.command.index("--broker-port") + 1
        self.coordinator.command[at] = str(self.broker_port)
        if self.closed:
            # members know the coordinator by its ports
            ports = {"CLOSED_PORT": self.broker_port, "CLIENT_PORT": self.client_port}
            self.coordinator.environment |= {f"POTLUCK_BROKER__{name}": str(port) for name, port in ports.items()}
            self.coordinator.command[self.coordinator.command.index("--port") + 1] = self.http_url.rpartition(":")[2]
        self.coordinator.log_path.rename(self.coordinator.log_path.with_suffix(f".{time.monotonic_ns()}.log"))
        self.coordinator.start()
        self._wait_ready()

    def check(self) -> None:
        """Raises Unavailable when a daemon ended by itself."""
        if not self.coordinator.running:
            raise Unavailable(f"the coordinator ended; its log ends:\n{self.coordinator.log_tail()}")

    def log_tails(self) -> str:
        return "\n".join(f"--- {daemon.name}\n{daemon.log_tail()}" for daemon in (self.coordinator, *self.nodes))

    def stop(self) -> None:
        """Stop the nodes, then the coordinator; kill those that do not end in time."""
        for node in self.nodes:
            node.terminate()
        for node in self.nodes:
            node.wait(STOP_SECONDS)
        self.coordinator.terminate()
        self.coordinator.wait(STOP_SECONDS)

    def _daemon(self, name: str, module: str, *arguments: str) -> Daemon:
        state = self.folder / name
        command = [
            sys.executable,
            "-P",
            "-m",
            "potluck.daemons",
            module,
            "--cluster",
            self.cluster,
            "--state-dir",
            str(state),
            *arguments,
        ]
        return Daemon(name, command, self.folder / f"{name}.log", self._environment)

    def _wait_ready(self) -> None:
        """Wait until the coordinator's log says that it is ready, and read its addresses there."""
        said = self._wait_said(self.coordinator, "coordinator ready ")
        self.http_url = said["http"]
        if self._broker != "external":
            self.broker_port = int(said["broker"].rsplit(":", 1)[1])
        if self.closed:
            self.client_port = int(said["clients"].rsplit(":", 1)[1])

    def _wait_joined(self, node: Daemon) -> None:
        self._wait_said(node, "node joined ")

    def _wait_said(self, daemon: Daemon, words: str) -> dict[str, str]:
        """Wait for a line with these words in the daemon's log; returns the `key=value` fields of the first one."""
        deadline = time.monotonic() + READY_SECONDS
        while True:
            for line in daemon.log_path.read_text(errors="replace").splitlines():
                if words in line:
                    return dict(part.split("=", 1) for part in line.split() if "=" in part)
            if not daemon.running:
                raise Unavailable(f"{daemon.name} ended; its log ends:\n{daemon.log_tail()}")
            if time.monotonic() > deadline:
                raise TimedOut(f"{daemon.name} was not ready within {READY_SECONDS:.0f} s:\n{self.log_tails()}")
            time.sleep(0.05)
