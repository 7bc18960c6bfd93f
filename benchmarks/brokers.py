"""The brokers that potluck can start itself, side by side: speed, and memory under an hour of traffic.

The rival is mosquitto. `--other NAME=SCRIPT` adds a Python script, called with HOST and PORT, that prints a line ending
with `running` when it listens (docs/adr/0019-the-embedded-broker.md compares other embedded brokers in this way).

Speed: echoes of 100 bytes, one at a time and forty at a time, answered by `echo.py`. Memory: for `--minutes`, simulated nodes publish
as real ones do, and clients come, ask, get an answer of 20 KB, and leave. Resident memory is noted meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiomqtt
import psutil
from echo import NODELAY
from report import Report

from potluck.lifecycle import die_with_parent
from potluck.net.broker import start_broker
from potluck.settings import BrokerSettings, Listen

V311 = aiomqtt.ProtocolVersion.V311
NODES = 5
TELEMETRY_SECONDS = 0.5
ANSWER_BYTES = 20_000
ANSWER_SECONDS = 10
MEMORY_LOOKS = 60


@asynccontextmanager
async def started(name: str, script: str | None, folder: Path) -> AsyncIterator[tuple[int, psutil.Process]]:
    """(port, process) of a broker."""
    if script is None:
        mode: Any = name
        broker = await start_broker(BrokerSettings(mode=mode, port=0), Listen(), folder)
        try:
            yield broker.port, psutil.Process(broker.pid)
        finally:
            await broker.stop()
        return
    port = await free_port()
    process = await asyncio.create_subprocess_exec(
        sys.executable, script, "127.0.0.1", str(port), stderr=asyncio.subprocess.PIPE, preexec_fn=die_with_parent()
    )
    assert process.stderr is not None
    async with asyncio.timeout(20):
        while not (await process.stderr.readline()).rstrip().endswith(b"running"):
            if process.returncode is not None:
                raise RuntimeError(f"{name} did not start")
    reading = asyncio.create_task(process.stderr.read(), name="broker-log")
    try:
        yield port, psutil.Process(process.pid)
    finally:
        process.kill()
        await process.wait()
        await reading


async def free_port() -> int:
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port: int = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    return port


def client(port: int) -> aiomqtt.Client:
    return aiomqtt.Client(
        "127.0.0.1", port, protocol=V311, socket_options=NODELAY, identifier=uuid.uuid4().hex, timeout=30
    )


async def speed(port: int, seconds: float) -> tuple[float, float]:
    """(median milliseconds of one echo alone, echoes per second with forty at a time); QoS 0."""
    script = str(Path(__file__).with_name("echo.py"))
    echo = await asyncio.create_subprocess_exec(
        sys.executable, script, "127.0.0.1", str(port), "0", preexec_fn=die_with_parent()
    )
    try:
        async with client(port) as asking, asyncio.timeout(60 + 4 * seconds):
            await asking.subscribe("bench/ready", qos=1)
            messages = aiter(asking.messages)
            await anext(messages)
            await asking.subscribe("bench/answer")
            alone: list[float] = []
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                began = time.perf_counter()
                await asking.publish("bench/ask", bytes(100))
                while (await anext(messages)).topic.value != "bench/answer":
                    pass
                alone.append(time.perf_counter() - began)
            for _ in range(40):
                await asking.publish("bench/ask", bytes(100))
            count, began = 0, time.perf_counter()
            while time.perf_counter() - began < seconds:
                await anext(messages)
                await asking.publish("bench/ask", bytes(100))
                count += 1
            return statistics.median(alone) * 1000, count / (time.perf_counter() - began)
    finally:
        echo.kill()
        await echo.wait()


async def node(port: int, name: str, stop: asyncio.Event) -> int:
    """Publish a retained state with a will, telemetry, and small messages both ways; returns how many."""
    count = 0
    async with client(port) as bus:
        await bus.subscribe(f"nodes/{name}/inbox", qos=1)
        await bus.publish(f"nodes/{name}/status", b"online", qos=1, retain=True)
        while not stop.is_set():
            await bus.publish(f"nodes/{name}/telemetry", bytes(300))
            await bus.publish("coordinator/outbox", bytes(2000), qos=1)
            count += 2
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), TELEMETRY_SECONDS)
    return count


async def coordinator(port: int, stop: asyncio.Event) -> None:
    """Hear everything, and answer questions."""
    async with client(port) as bus:
        await bus.subscribe([("nodes/+/status", 1), ("nodes/+/telemetry", 0), ("coordinator/outbox", 1), ("ask", 1)])
        await bus.publish("coordinator/status", b"online", qos=1, retain=True)
        stopping = asyncio.create_task(stop.wait(), name="stop")
        messages = aiter(bus.messages)
        while not stop.is_set():
            following = asyncio.ensure_future(anext(messages))
            await asyncio.wait((following, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                following.cancel()
                break
            message = following.result()
            if message.topic.value == "ask":
                assert isinstance(message.payload, bytes)
                await bus.publish(message.payload.decode(), bytes(ANSWER_BYTES), qos=1)


async def clients(port: int, stop: asyncio.Event) -> tuple[int, int]:
    """Clients one after the other, each with its own inbox; returns (answered, not answered within ANSWER_SECONDS)."""
    answered = failed = 0
    while not stop.is_set():
        inbox = f"clients/{uuid.uuid4().hex}/inbox"
        try:
            async with asyncio.timeout(ANSWER_SECONDS), client(port) as asking:
                await asking.subscribe([("coordinator/status", 1), (inbox, 1)])
                await asking.publish("ask", inbox.encode(), qos=1)
                async for message in asking.messages:
                    if message.topic.value == inbox:
                        break
            answered += 1
        except (TimeoutError, aiomqtt.MqttError):
            failed += 1
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), 0.1)
    return answered, failed


async def memory(port: int, process: psutil.Process, minutes: float) -> dict[str, Any]:
    """Make traffic for this long; returns resident MiB at times (first after a tenth, when all buffers have been used)."""
    stop = asyncio.Event()
    looks: list[float] = []
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(coordinator(port, stop), name="coordinator")
        nodes = [tasks.create_task(node(port, f"n{number}", stop), name="node") for number in range(NODES)]
        asking = tasks.create_task(clients(port, stop), name="clients")
        busy = process.cpu_times()
        for _ in range(MEMORY_LOOKS):
            await asyncio.sleep(minutes * 60 / MEMORY_LOOKS)  # waiting is the purpose here
            looks.append(round(process.memory_info().rss / 2**20, 1))
        stop.set()
    used = process.cpu_times()
    answered, failed = asking.result()
    return {
        "minutes": minutes,
        "clients": answered,
        "unanswered": failed,
        "messages": sum(task.result() for task in nodes) + 2 * answered,
        "resident_mib": looks[MEMORY_LOOKS // 10 :: MEMORY_LOOKS // 10],
        "growth": round(looks[-1] / looks[MEMORY_LOOKS // 10], 3),
        "cores": round((used.user + used.system - busy.user - busy.system) / (minutes * 60), 4),
    }


async def measure(arguments: argparse.Namespace, report: Report) -> None:
    others = dict(text.split("=", 1) for text in arguments.other)
    scripts: dict[str, str | None] = {"mosquitto": None, "embedded": None, **others}
    only = arguments.only or list(scripts)
    minutes = 0.05 if arguments.quick else arguments.minutes
    report.columns = (
        "broker",
        "echo ms",
        "echoes/s",
        "minutes",
        "messages",
        "clients",
        "unanswered",
        "MiB after 1/10",
        "MiB at end",
    )

    async def one(name: str) -> None:
        with tempfile.TemporaryDirectory(prefix="potluck-bench-") as folder:
            async with started(name, scripts[name], Path(folder)) as (port, process):
                figures[name] |= await memory(port, process, minutes)

    figures: dict[str, dict[str, Any]] = {}
    for name in only:
        with tempfile.TemporaryDirectory(prefix="potluck-bench-") as folder:
            async with started(name, scripts[name], Path(folder)) as (port, _):
                alone, rate = await speed(port, 0.5 if arguments.quick else 5.0)
                figures[name] = {"echo_ms": round(alone, 3), "echoes_per_second": round(rate)}
    async with asyncio.TaskGroup() as tasks:  # all brokers share the same hour
        for name in only:
            tasks.create_task(one(name), name=name)
    for name, found in figures.items():
        resident = found["resident_mib"]
        report.rows.append((
            name, f"{found['echo_ms']:.2f}", str(found["echoes_per_second"]), f"{found['minutes']:g}", str(found["messages"]),
            str(found["clients"]), str(found["unanswered"]), f"{resident[0]:.0f}", f"{resident[-1]:.0f}",
        ))  # fmt: skip
    report.figures = figures
    if "embedded" in figures:
        found = figures["embedded"]
        report.check(
            "embedded_unanswered", found["unanswered"] / (found["clients"] + found["unanswered"]), at_most=0.0001
        )
        report.check("embedded_memory_growth", figures["embedded"]["growth"], at_most=1.1)
    if {"embedded", "mosquitto"} <= figures.keys():
        ratio = figures["embedded"]["echoes_per_second"] / figures["mosquitto"]["echoes_per_second"]
        report.check("embedded_over_mosquitto", ratio, at_least=0.25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short run, to see that it works")
    parser.add_argument("--minutes", type=float, default=60, help="how long the traffic lasts (default: 60)")
    parser.add_argument("--other", action="append", default=[], metavar="NAME=SCRIPT", help="one more broker")
    parser.add_argument("--only", action="append", metavar="NAME", help="only these")
    arguments = parser.parse_args()
    report = Report("brokers")
    asyncio.run(measure(arguments, report))
    report.show()


if __name__ == "__main__":
    main()
