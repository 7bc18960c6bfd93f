"""Real node processes on a real broker; the test plays their coordinator."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from msgspec.structs import replace

from potluck.blobs import server
from potluck.blobs.download import Downloader
from potluck.blobs.rights import OPEN
from potluck.blobs.store import BlobStore
from potluck.bus.mqtt import Envelope, MqttBus
from potluck.credentials import Credentials
from potluck.lifecycle import die_with_parent
from potluck.net.addresses import bind
from potluck.net.http import serve_http
from potluck.settings import BusTimings, Listen
from potluck.wire.births import CoordinatorStatus, NodeStatus
from potluck.wire.commands import AcknowledgeResult, LeaseShard, LoadModel, RunInference
from potluck.wire.reports import ShardFailed, ShardFinished
from potluck.wire.tasks import ExportTask
from potluck.wire.topics import Topics
from potluck.wire.values import BlobRef, Message, Tensor
from support.brokers import BrokerKind, TestBroker, some_kind
from support.eventually import eventually

CLUSTER = "lab"
TOPICS = Topics(CLUSTER)
M = TypeVar("M", bound=Message)
FAKE = [str(Path(__file__).with_name("fake_engine_node.py"))]
REAL = ["-m", "node"]


class NodeProcess:
    """A node daemon. `log()` is its output."""

    def __init__(self, folder: Path, command: list[str]) -> None:
        self.command = command
        self._path = folder / f"log-{uuid.uuid4().hex[:6]}"
        self.process: asyncio.subprocess.Process | None = None
        self.started_at = 0.0

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    async def start(self, **environment: str) -> None:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("POTLUCK_")}
        with self._path.open("ab") as log:
            self.started_at = time.time()
            self.process = await asyncio.create_subprocess_exec(
                *self.command, stdout=log, stderr=log, env=clean | environment, preexec_fn=die_with_parent()
            )

    async def ended(self, seconds: float = 10) -> int:
        """Its exit status."""
        assert self.process is not None
        async with asyncio.timeout(seconds):
            return await self.process.wait()

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(number)
        return await self.ended()

    def log(self) -> str:
        return self._path.read_text()


class Lab:
    """A broker, and the coordinator that the test plays. `said` has what the node published, in order."""

    def __init__(self, folder: Path, broker: TestBroker, bus: MqttBus) -> None:
        self.folder = folder
        self.broker = broker
        self.bus = bus
        self.store = BlobStore(folder / "coordinator-blobs", 1 << 30)
        self.urls: tuple[str, ...] = ()
        self.said: list[Message] = []
        self.retained: dict[str, Message] = {}
        self.acknowledging = True
        self.downloader: Downloader | None = None
        self._nodes: list[NodeProcess] = []
        self._reported: asyncio.Queue[str] = asyncio.Queue()

    # --- nodes

    async def node(
        self, *arguments: str, fake: bool = True, join: bool = True, python: str = sys.executable, **environment: str
    ) -> NodeProcess:
        """Start a node (named n1), and wait until it has joined."""
        command = [python, *(FAKE if fake else REAL), "--cluster", CLUSTER, "--node-id", "n1"]
        if "--state-dir" not in arguments:
            command += ["--state-dir", str(self.folder / "state")]
        if join:
            command += ["--seed", f"127.0.0.1:{self.broker.port}", "--no-discovery"]
        made = NodeProcess(self.folder, [*command, *arguments])
        self._nodes.append(made)
        births = len(self.all(NodeStatus))
        quick = {"POTLUCK_RESEND_SECONDS": "0.2", "POTLUCK_RENEW_SECONDS": "0.2", "POTLUCK_TELEMETRY_SECONDS": "0.5"}
        await made.start(**((quick if fake else {}) | environment))
        if join:
            await self.heard(NodeStatus, lambda one: one.state == "online", after=births)
        return made

    async def put_down(self) -> None:
        for made in self._nodes:
            if made.process is not None and made.process.returncode is None:
                await made.stop()

    # --- what was said

    def all(self, kind: type[M]) -> list[M]:
        return [message for message in self.said if isinstance(message, kind)]

    async def heard(
        self, kind: type[M], fits: Callable[[M], bool] = lambda message: True, *, after: int = 0, seconds: float = 10
    ) -> M:
        """The first message of this kind that fits; skips the first `after` messages of the kind."""

        def look() -> M | None:
            return next((message for message in self.all(kind)[after:] if fits(message)), None)

        try:
            found = await eventually(look, seconds)
        except AssertionError:
            logs = "\n".join(made.log()[-2000:] for made in self._nodes)
            raise AssertionError(
                f"no such {kind.__name__}; said: {[str(message)[:200] for message in self.said[-20:]]}\n{logs}"
            ) from None
        assert found is not None
        return found

    # --- what the coordinator says

    async def online(self, epoch: int = 1, cluster_id: str = "") -> None:
        status = CoordinatorStatus(
            session=f"{cluster_id}s{epoch}", epoch=epoch, state="online", http=self.urls, cluster_id=cluster_id
        )
        await self.bus.publish(TOPICS.coordinator_status, status, retain=True)

    async def command(self, message: Message, *, qos: int = 1) -> None:
        await self.bus.publish(TOPICS.node("n1", "inbox"), message, qos=qos)

    async def lease(
        self, attempt_id: str, job_id: str, *, epoch: int = 1, task: Any = None, **changes: Any
    ) -> LeaseShard:
        """Lease a shard of `job_id`, a name that tells a fake engine what to do."""
        if task is None:
            task = ExportTask(model=self.blob(b"model"), weights=self.blob(b"weights"))
        lease = LeaseShard(
            epoch=epoch, job_id=job_id, shard_id="shard", attempt_id=attempt_id, lease_seconds=10, task=task
        )
        await self.command(replace(lease, **changes))
        return lease

    async def load(self, replica_id: str, model: bytes = b"model", epoch: int = 1, **changes: Any) -> None:
        message = LoadModel(epoch=epoch, replica_id=replica_id, name="m:1", model=self.blob(model))
        await self.command(replace(message, **changes))

    async def infer(self, batch_id: str, replica_id: str, *inputs: Tensor, **changes: Any) -> None:
        """A batch with one request."""
        message = RunInference(id=batch_id, replica_id=replica_id, requests=(inputs,))
        await self.command(replace(message, **changes), qos=0)

    def blob(self, data: bytes) -> BlobRef:
        return replace(self.store.put_bytes(data), holders=self.urls)

    async def fetch(self, ref: BlobRef) -> bytes:
        assert self.downloader is not None
        path = await self.downloader.fetch(ref)
        return path.read_bytes()

    def on_message(self, envelope: Envelope) -> None:
        message = envelope.message
        self.said.append(message)
        if envelope.retained:
            self.retained[envelope.topic] = message
        if isinstance(message, ShardFinished | ShardFailed) and self.acknowledging:
            self._reported.put_nowait(message.attempt_id)

    async def acknowledge(self) -> None:
        """Acknowledge results like a coordinator, while `acknowledging`; until cancelled."""
        while True:
            await self.command(AcknowledgeResult(attempt_id=await self._reported.get()))


@asynccontextmanager
async def node_lab(folder: Path, kind: BrokerKind | None = None) -> AsyncIterator[Lab]:
    """A broker, and a connection for the coordinator; stops remaining nodes at the end."""
    broker = TestBroker(kind or some_kind(), folder)
    await broker.start()
    timings = BusTimings(reconnect_min_seconds=0.05, reconnect_max_seconds=0.2)
    bus = MqttBus(broker.address, TOPICS, Credentials(), client_id=f"lab-{uuid.uuid4().hex[:6]}", timings=timings)
    lab = Lab(folder, broker, bus)
    for leaf in ("status", "capacity", "telemetry", "outbox"):
        bus.subscribe(TOPICS.node("+", leaf), lab.on_message)
    sock = bind(Listen())
    lab.urls = (f"http://127.0.0.1:{sock.getsockname()[1]}",)
    tasks: list[asyncio.Task[None]] = []
    try:
        async with (
            Downloader(BlobStore(folder / "fetched", 1 << 30), Credentials()) as lab.downloader,
            serve_http(sock, server.routes(lab.store, writable=False, max_bytes=0, rights=OPEN), Credentials()),
        ):
            tasks.append(asyncio.create_task(bus.run(), name="lab bus"))
            await bus.connected(5)
            tasks.append(asyncio.create_task(lab.acknowledge(), name="lab acknowledgements"))
            await lab.online()
            try:
                yield lab
            finally:
                await lab.put_down()
    finally:
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await broker.stop()
