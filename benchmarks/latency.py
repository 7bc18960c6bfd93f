"""One inference of a small model over MQTT, against a raw MQTT echo through the same broker in the same run.

The echo: client, broker, echo process, broker, client, with aiomqtt at both ends, TCP_NODELAY, and a message as large as
the inference. The inference: client, broker, coordinator, broker, node, engine, and all the way back. Both at QoS 0
unless the row says otherwise, one at a time, in turns, so that a slow minute of the machine affects both.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import aiomqtt
import numpy as np
from echo import NODELAY
from report import Report, percentiles

from potluck.client import AsyncClient
from potluck.lifecycle import die_with_parent
from potluck.local_cluster import LocalCluster

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

    def __init__(self, host: str, port: int, qos: int, payload: bytes) -> None:
        self._address = (host, port)
        self._qos = qos
        self._payload = payload

    async def __aenter__(self) -> Echo:
        host, port = self._address
        script = str(Path(__file__).with_name("echo.py"))
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, script, host, str(port), str(self._qos), preexec_fn=die_with_parent()
        )
        self._client = aiomqtt.Client(host, port, socket_options=NODELAY)
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


async def measure(cluster: LocalCluster, plain_one: LocalCluster, model: Path, turns: int, report: Report) -> None:
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
            asks: dict[str, Callable[[], Awaitable[Any]]] = {
                "echo": echo.ask,
                "infer": lambda: client.infer("mlp", row),
                "plain": lambda: slow.infer("mlp", row),
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
    }
    for name, label in labels.items():
        found = percentiles(seconds[name])
        report.figures[name] = found
        report.rows.append((label, *(f"{value:.3f}" for value in found.values())))
    report.figures["infer_per_second_16_clients"] = round(rate, 1)
    report.rows.append((f"inferences a second, 16 at a time: {rate:.0f}", "", "", ""))
    ratio = statistics.median(seconds["infer"]) / statistics.median(seconds["echo"])
    report.check("infer_over_echo", ratio, at_most=4.0)
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
        ):
            asyncio.run(measure(cluster, plain_one, model, 4 if arguments.quick else 40, report))
    report.show()


if __name__ == "__main__":
    main()
