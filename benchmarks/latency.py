"""One inference of a small model over MQTT, against a raw MQTT echo through the same broker in the same run.

The echo: client, broker, echo process, broker, client, with aiomqtt at both ends, TCP_NODELAY, and a message as large as
the inference. The inference: client, broker, coordinator, broker, node, engine, and all the way back. Both at QoS 0
unless the row says otherwise, one at a time, in turns, so that a slow minute of the machine affects both.

The same again in a closed cluster: TLS 1.3 with certificates on both sides, rules, and commands that are signed. Its echo goes through
a broker of its own with the same protection. `tls_over_tls_echo` says how much more the protection costs an inference than an echo.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from echo import client as echo_client
from report import Report, percentiles

from potluck.client import AsyncClient
from potluck.lifecycle import die_with_parent
from potluck.local_cluster import LocalCluster
from potluck.net import broker_rules
from potluck.net.broker import start_closed_broker
from potluck.settings import BrokerSettings
from potluck.wire.topics import Topics

PLAIN = "POTLUCK_BUS__PLAIN"
WARM_UP = 50
TURN = 50


def small_model(path: Path) -> Path:
    """A 64-128-10 MLP, written as a `.keras` file."""
    import keras

    model = keras.Sequential(
        [
            keras.Input((64,), name="x"),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(loss="sparse_categorical_crossentropy")
    model.save(path)
    return path


class Echo:
    """An echo process, and the client that asks it."""

    def __init__(
        self, host: str, port: int, qos: int, payload: bytes, members: tuple[Path, Path] | None = None
    ) -> None:
        """`members`: the folders with the credentials of both ends, for a broker with TLS."""
        self._address = (host, port)
        self._asker: Path | None = None if members is None else members[0]
        self._echo: Path | None = None if members is None else members[1]
        self._qos = qos
        self._payload = payload

    async def __aenter__(self) -> Echo:
        host, port = self._address
        script = str(Path(__file__).with_name("echo.py"))
        more = [] if self._echo is None else [str(self._echo)]
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, script, host, str(port), str(self._qos), *more, preexec_fn=die_with_parent()
        )
        self._client = echo_client(host, port, self._asker)
        await self._client.__aenter__()
        await self._client.subscribe("bench/ready", qos=1)
        self._messages = aiter(self._client.messages)
        async with asyncio.timeout(20):
            await anext(self._messages)
        await self._client.publish("bench/ready", b"", qos=1, retain=True)
        await self._client.unsubscribe("bench/ready")
        await self._client.subscribe("bench/answer", qos=self._qos)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.__aexit__(None, None, None)
        self._process.terminate()
        async with asyncio.timeout(10):
            await self._process.wait()

    async def ask(self) -> None:
        await self._client.publish("bench/ask", self._payload, qos=self._qos)
        async with asyncio.timeout(10):
            while (await anext(self._messages)).topic.value != "bench/answer":
                pass


@asynccontextmanager
async def closed_echo(cluster: LocalCluster, payload: bytes) -> AsyncIterator[Echo]:
    """An echo through a broker that is protected as that of a closed cluster, by the same CA, with rules for the echo."""
    folder = cluster.folder / "echo"
    members = folder / "asker", folder / "answerer"
    for member in members:
        await asyncio.to_thread(cluster.join, member.name, member, "user")
    ours = folder / "broker"
    ours.mkdir()
    for name in (broker_rules.CERTIFICATE, broker_rules.CA):
        shutil.copyfile(cluster.folder / "coordinator" / "broker" / name, ours / name)
    broker = await start_closed_broker(BrokerSettings(), "127.0.0.1", (0, 0), ours, Topics("bench"), ())
    try:
        rules = "".join(f"user client:{member.name}\ntopic readwrite bench/#\n" for member in members)
        (ours / broker_rules.CLIENT_RULES).write_text(rules)
        await broker.reload()
        async with Echo(broker.host, broker.client_port, 0, payload, members) as echo:
            yield echo
    finally:
        await broker.stop()


async def timed(ask: Callable[[], Awaitable[Any]], count: int, into: list[float]) -> None:
    for _ in range(count):
        started = time.perf_counter()
        await ask()
        into.append(time.perf_counter() - started)


@contextmanager
def plain() -> Iterator[None]:
    """Clients made in this block use only public names of the MQTT library."""
    os.environ[PLAIN] = "true"
    try:
        yield
    finally:
        del os.environ[PLAIN]


async def measure(
    cluster: LocalCluster, plain_one: LocalCluster, closed: LocalCluster, model: Path, turns: int, report: Report
) -> None:
    row = np.random.default_rng(0).random((1, 64), np.float32)
    async with AsyncClient(f"{cluster.broker_host}:{cluster.broker_port}", cluster=cluster.cluster) as client:
        await client.register(model, "mlp")
        await (await client.deploy("mlp", replicas=1)).wait(timeout=120)
        async with (
            Echo(cluster.broker_host, cluster.broker_port, 0, row.tobytes() + b"x" * 150) as echo,
            AsyncClient(f"{cluster.broker_host}:{cluster.broker_port}", cluster=cluster.cluster) as other,
            AsyncExitStack() as stack,
        ):
            with plain():
                there = AsyncClient(f"{plain_one.broker_host}:{plain_one.broker_port}", cluster=plain_one.cluster)
                slow = await stack.enter_async_context(there)
            await slow.register(model, "mlp")
            await (await slow.deploy("mlp", replicas=1)).wait(timeout=120)
            member = await stack.enter_async_context(
                AsyncClient(cluster=closed.cluster, credentials=closed.credentials)
            )
            await member.register(model, "mlp")
            await (await member.deploy("mlp", replicas=1)).wait(timeout=120)
            tls_echo = await stack.enter_async_context(closed_echo(closed, row.tobytes() + b"x" * 150))
            asks: dict[str, Callable[[], Awaitable[Any]]] = {
                "echo": echo.ask,
                "infer": lambda: client.infer("mlp", row),
                "plain": lambda: slow.infer("mlp", row),
                "tls_echo": tls_echo.ask,
                "tls_infer": lambda: member.infer("mlp", row),
            }
            seconds: dict[str, list[float]] = {name: [] for name in asks}
            for ask in asks.values():
                await timed(ask, WARM_UP, [])
            for _ in range(turns):
                for name, ask in asks.items():
                    await timed(ask, TURN, seconds[name])
            started = time.perf_counter()
            both = [asyncio.create_task(timed(lambda c=c: c.infer("mlp", row), TURN, [])) for c in (client, other) * 8]  # type: ignore[misc]
            await asyncio.gather(*both)
            rate = len(both) * TURN / (time.perf_counter() - started)
    report.columns = ("over MQTT, QoS 0", "p50 ms", "p95 ms", "p99 ms")
    labels = {
        "echo": "raw echo (2 hops there and back)",
        "infer": "inference of a 64-128-10 MLP",
        "plain": "the same on plain connections (bus.plain)",
        "tls_echo": "raw echo with TLS and certificates",
        "tls_infer": "inference in a closed cluster",
    }
    for name, label in labels.items():
        found = percentiles(seconds[name])
        report.figures[name] = found
        report.rows.append((label, *(f"{value:.3f}" for value in found.values())))
    report.figures["infer_per_second_16_clients"] = round(rate, 1)
    report.rows.append((f"inferences a second, 16 at a time: {rate:.0f}", "", "", ""))
    ratio = statistics.median(seconds["infer"]) / statistics.median(seconds["echo"])
    report.check("infer_over_echo", ratio, at_most=4.0)
    tls_ratio = statistics.median(seconds["tls_infer"]) / statistics.median(seconds["tls_echo"])
    report.check("tls_over_tls_echo", tls_ratio / ratio, at_most=1.15)
    report.figures["plain_over_quick"] = round(
        statistics.median(seconds["plain"]) / statistics.median(seconds["infer"]), 3
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short run, to see that it works")
    arguments = parser.parse_args()
    report = Report("latency")
    with tempfile.TemporaryDirectory(prefix="potluck-bench-") as folder:
        model = small_model(Path(folder) / "mlp.keras")
        with (
            LocalCluster(Path(folder) / "cluster", cluster="bench", nodes=1, discovery=False) as cluster,
            LocalCluster(
                Path(folder) / "plain", cluster="plain", nodes=1, discovery=False, environment={PLAIN: "true"}
            ) as plain_one,
            LocalCluster(Path(folder) / "closed", cluster="closed", nodes=1, discovery=False, closed=True) as closed,
        ):
            asyncio.run(measure(cluster, plain_one, closed, model, 4 if arguments.quick else 40, report))
    report.show()


if __name__ == "__main__":
    main()
