"""Simulated nodes, many in one process: real MQTT connections and real messages, but no TensorFlow.

Each does what a node does on the bus: publishes a birth with a will, and its capacity, hears the coordinator, sends telemetry every
few seconds, takes leases and returns results at once. Its computing time is made up, so that each chunk is one batch.

    python benchmarks/simulated.py 127.0.0.1:1883 scale 1000

prints `joined` when all have joined. For each line that it reads, it prints a line of JSON with what was done.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import socket
import sys
import time
import uuid

from potluck.bus import packets
from potluck.wire import codec
from potluck.wire.births import NodeCapacity, NodeStatus, NodeTelemetry
from potluck.wire.commands import AcknowledgeResult, LeaseShard, Rebirth
from potluck.wire.reports import BlobsStored, LeaseRefused, LeaseTaken, ShardFailed, ShardFinished
from potluck.wire.tasks import EvaluateResult, EvaluateTask
from potluck.wire.topics import Topics
from potluck.wire.values import Capacity, Message

CHUNK_SECONDS = 3.0
"""The made-up time of a batch: as long as the coordinator wants a chunk to be."""
TELEMETRY_SECONDS = 5.0
"""As in a node's settings."""
KEEPALIVE_SECONDS = 60
AT_ONCE = 100
"""Connections that are opened at the same time."""


class Counts:
    """Counts of what all nodes have done together."""

    def __init__(self) -> None:
        self.leased = self.acknowledged = self.refused = self.joined = 0


class Node(asyncio.Protocol):
    """One node's connection (MQTT 3.1.1)."""

    def __init__(self, node_id: str, topics: Topics, counts: Counts) -> None:
        self.node_id = node_id
        self._session = uuid.uuid4().hex
        self._topics = topics
        self._counts = counts
        self._inbox = topics.node(node_id, "inbox")
        self._outbox = topics.node(node_id, "outbox")
        self._splitter = packets.Splitter()
        self._ids = itertools.cycle(range(1, 0x10000))
        self._held: set[str] = set()
        self._blobs: set[str] = set()
        self._transport: asyncio.Transport | None = None
        self.joined = asyncio.get_running_loop().create_future()

    # --- MQTT ---------------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        will = codec.encode(NodeStatus(node_id=self.node_id, session=self._session, state="offline"))
        body = b"\0\4MQTT\4" + bytes((0b0010_1110,)) + KEEPALIVE_SECONDS.to_bytes(2, "big")  # a will, retained, QoS 1
        for part in (self.node_id.encode(), self._topics.node(self.node_id, "status").encode(), will):
            body += len(part).to_bytes(2, "big") + part
        transport.write(b"\x10" + packets.length(len(body)) + body)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.joined.done():
            self.joined.set_exception(error or ConnectionError("the broker closed the connection"))

    def data_received(self, data: bytes) -> None:
        for first, body in self._splitter.feed(data):
            kind = first & 0xF0
            if kind == packets.PUBLISH:
                message = packets.read_publish(first, body, v5=False)
                if message.qos:
                    self._write(packets.puback(message.packet_id))
                if message.topic == self._inbox:
                    self._on_command(codec.decode(message.payload)[0])
            elif kind == 0x20:  # CONNACK
                if body[1]:
                    raise ConnectionError(f"the broker refused {self.node_id}: {body[1]}")
                self._subscribe(self._inbox, self._topics.coordinator_status)
            elif kind == 0x90:  # SUBACK
                self._be_born()

    def _subscribe(self, *filters: str) -> None:
        body = next(self._ids).to_bytes(2, "big")
        for topic_filter in filters:
            body += len(topic_filter).to_bytes(2, "big") + topic_filter.encode() + b"\1"
        self._write(b"\x82" + packets.length(len(body)) + body)

    def _publish(self, topic: str, message: Message, *, qos: int = 1, retain: bool = False) -> None:
        payload, name = (
            codec.encode(message, "json" if isinstance(message, NodeTelemetry) else "msgpack"),
            topic.encode(),
        )
        head = len(name).to_bytes(2, "big") + name + (next(self._ids).to_bytes(2, "big") if qos else b"")
        first = packets.PUBLISH | qos << 1 | retain
        self._write(b"".join((bytes((first,)), packets.length(len(head) + len(payload)), head, payload)))

    def _write(self, data: bytes) -> None:
        assert self._transport is not None
        self._transport.write(data)

    # --- a node ---------------------------------------------------------------------------------------------------------

    def _be_born(self) -> None:
        status = NodeStatus(
            node_id=self.node_id, session=self._session, state="online", http=("http://127.0.0.1:9",), software={"potluck": "simulated"}
        )  # fmt: skip
        self._publish(self._topics.node(self.node_id, "status"), status, retain=True)
        capacity = Capacity(
            hostname=self.node_id, system="simulated", cores=1, memory_bytes=2**30, runtimes={"tensorflow": "2"}, gflops=10.0
        )  # fmt: skip
        self._publish(
            self._topics.node(self.node_id, "capacity"),
            NodeCapacity(node_id=self.node_id, capacity=capacity),
            retain=True,
        )
        self.tell()
        if not self.joined.done():
            self.joined.set_result(None)

    def tell(self) -> None:
        telemetry = NodeTelemetry(
            node_id=self.node_id, session=self._session, cpu_percent=1.0, memory_used_bytes=2**29, memory_available_bytes=2**29,
            attempts=tuple(self._held), sent_at=time.time(),
        )  # fmt: skip
        self._publish(self._topics.node(self.node_id, "telemetry"), telemetry, qos=0)

    def _on_command(self, message: Message) -> None:
        match message:
            case LeaseShard(task=EvaluateTask() as task) if not task.states:
                if message.attempt_id in self._held:
                    return  # its result is on the way
                self._counts.leased += 1
                self._held.add(message.attempt_id)
                blobs = {ref.sha256 for ref in (task.model, *(one.blob for one in task.slices))} - self._blobs
                if blobs:  # as if it had fetched them
                    self._blobs |= blobs
                    self._publish(self._outbox, BlobsStored(blobs=tuple(sorted(blobs))))
                count = sum(one.stop - one.start for one in task.slices)
                result = EvaluateResult(
                    count=count, sums={"loss": 1.0 * count}, seconds=CHUNK_SECONDS * count / task.batch_size
                )
                self._publish(self._outbox, LeaseTaken(attempt_id=message.attempt_id))
                self._publish(self._outbox, ShardFinished(attempt_id=message.attempt_id, result=result))
            case AcknowledgeResult():
                if message.attempt_id in self._held:
                    self._held.discard(message.attempt_id)
                    self._counts.acknowledged += 1
            case LeaseShard() | ShardFailed() | LeaseRefused():
                self._counts.refused += 1
            case Rebirth():
                self._be_born()
            case _:
                pass


async def simulate(host: str, port: int, cluster: str, count: int) -> None:
    """Run until standard input ends."""
    loop = asyncio.get_running_loop()
    topics, counts = Topics(cluster), Counts()
    slots = asyncio.Semaphore(AT_ONCE)

    async def join(number: int) -> Node:
        async with slots:
            _, node = await loop.create_connection(lambda: Node(f"sim-{number:05}", topics, counts), host, port)
            sock = node._transport.get_extra_info("socket") if node._transport is not None else None
            if sock is not None:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await node.joined
        return node

    started = time.monotonic()
    nodes = await asyncio.gather(*map(join, range(count)))
    print(f"joined {time.monotonic() - started:.3f}", flush=True)

    async def tell() -> None:
        pause = TELEMETRY_SECONDS / count
        due = loop.time()
        for node in itertools.cycle(nodes):
            due += pause
            if (early := due - loop.time()) > 0.005:
                await asyncio.sleep(early)
            node.tell()

    telling = asyncio.create_task(tell())
    asked = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(asked), sys.stdin)
    while await asked.readline():
        print(json.dumps(vars(counts) | {"at": time.time()}), flush=True)
    telling.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("broker", help="host:port")
    parser.add_argument("cluster")
    parser.add_argument("nodes", type=int)
    given = parser.parse_args()
    host, _, port = given.broker.rpartition(":")
    asyncio.run(simulate(host, int(port), given.cluster, given.nodes))


if __name__ == "__main__":
    main()
