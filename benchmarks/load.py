"""A deployment under load: the tail at 70 % of capacity, three times its capacity, a killed replica, and training on the same nodes.

Requests come at random times (Poisson), however slow the answers are, and each is timed from when it was due. The model takes
five to ten milliseconds for a row of three kilobytes (it enlarges its input before the convolutions), so that engines are the limit,
not the Python that asks. Its capacity is what 64 closed-loop clients get just before, in the same run. On a machine that shares its
processor, capacity changes from minute to minute. So the tail and the overload are taken in turns, each after its own capacity, and the
median of the turns counts. Nodes have one core each.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from report import Report, percentiles

from potluck.bus.mqtt import MqttBus
from potluck.client import AsyncClient, AsyncJob
from potluck.credentials import Credentials
from potluck.errors import PotluckError
from potluck.local_cluster import Daemon, LocalCluster
from potluck.wire.questions import Infer, Inferred
from potluck.wire.tensors import from_numpy
from potluck.wire.topics import Topics
from potluck.wire.values import Tensor

SIZE = 16
DEADLINE_SECONDS = 0.5
ANSWER_SECONDS = 20.0
"""A request without an answer by then counts as unanswered."""
CLOSED_LOOP_CLIENTS = 64
WINDOW_SECONDS = 0.5
FULL_SECONDS = 6.0
TURNS = 5


def network(path: Path) -> Path:
    """A small convolutional network over a small image that it enlarges, as a `.keras` file."""
    import keras

    model = keras.Sequential([keras.Input((SIZE, SIZE, 3)), keras.layers.UpSampling2D(16)])
    for filters in (16, 32, 64):
        model.add(keras.layers.Conv2D(filters, 3, activation="relu"))
        model.add(keras.layers.MaxPooling2D(2))
    model.add(keras.layers.Flatten())
    model.add(keras.layers.Dense(10, activation="softmax"))
    model.compile(loss="sparse_categorical_crossentropy")
    model.save(path)
    return path


@dataclass
class Answers:
    """Outcomes of requests that were due from `started` on: when each was due, how long it took, and its error."""

    started: float
    due: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    codes: list[str] = field(default_factory=list)

    def add(self, due: float, code: str) -> None:
        self.due.append(due - self.started)
        self.seconds.append(time.perf_counter() - due)
        self.codes.append(code)

    @property
    def good(self) -> list[float]:
        return [seconds for seconds, code in zip(self.seconds, self.codes, strict=True) if not code]

    def failures(self) -> dict[str, int]:
        return dict(Counter(code for code in self.codes if code))

    def p99_between(self, begin: float, end: float) -> float:
        """The p99 of requests that were due in this time; 0 for none."""
        found = sorted(s for s, due in zip(self.seconds, self.due, strict=True) if begin <= due < end)
        return found[min(len(found) - 1, int(0.99 * len(found)))] if found else 0.0


class Asker:
    """Asks one deployed model over MQTT, at QoS 0."""

    def __init__(self, bus: MqttBus, topics: Topics, model: str, tensor: Tensor) -> None:
        self._bus = bus
        self._topic = topics.infer(model)
        self._tensor = tensor

    async def ask(self, due: float, into: Answers, deadline_seconds: float) -> None:
        expires = time.time() + deadline_seconds - (time.perf_counter() - due) if deadline_seconds else 0.0
        code = ""
        try:
            message = Infer(inputs=(self._tensor,), expires=expires)
            answer = await self._bus.request(self._topic, message, timeout_seconds=ANSWER_SECONDS, qos=0)
            assert isinstance(answer, Inferred)
        except PotluckError as error:
            code = "unanswered" if "no answer to Infer" in error.message else error.code
        into.add(due, code)

    async def closed_loop(self, clients: int, seconds: float) -> float:
        """Answers per second for this many clients that each ask again after each answer, after a second of warm-up."""
        begin = time.perf_counter() + 1.0
        answers = Answers(begin)

        async def client() -> None:
            while (now := time.perf_counter()) < begin + seconds:
                await self.ask(now, answers, 0.0)

        await asyncio.gather(*(client() for _ in range(clients)))
        return sum(due >= 0.0 for due in answers.due) / seconds

    async def open_loop(self, per_second: float, seconds: float, deadline_seconds: float = 0.0) -> Answers:
        """Outcomes of requests that come at this rate, however they end."""
        rng = random.Random(0)
        due = time.perf_counter()
        answers, end = Answers(due), due + seconds
        async with asyncio.TaskGroup() as tasks:
            while (due := due + rng.expovariate(per_second)) < end:
                if (left := due - time.perf_counter()) > 0.0:
                    await asyncio.sleep(left)
                tasks.create_task(self.ask(due, answers, deadline_seconds), name="request")
        return answers


@dataclass
class Turn:
    """Half a minute of a deployment: its capacity (answers per second), latencies at 70 % of it, and answers at three times of it."""

    capacity: float
    steady: dict[str, float]
    flood: Answers
    seconds: float

    @property
    def tail(self) -> float:
        return self.steady["p99_ms"] / self.steady["p50_ms"]

    @property
    def goodput(self) -> float:
        """Answers per second that came in time."""
        return sum(seconds <= DEADLINE_SECONDS for seconds in self.flood.good) / self.seconds

    def told(self) -> dict[str, Any]:
        overload = {"asked": len(self.flood.due), **self.flood.failures(), **percentiles(self.flood.good)}
        figures = {"capacity_per_second": self.capacity, "tail": self.tail, "goodput_per_second": self.goodput}
        return {name: round(value, 2) for name, value in figures.items()} | {
            "at_70_percent": self.steady,
            "overload": overload,
        }


@asynccontextmanager
async def asker(cluster: LocalCluster, model: str, array: np.ndarray[Any, Any]) -> AsyncIterator[Asker]:
    topics = Topics(cluster.cluster)

    async def address() -> tuple[str, int]:
        return cluster.broker_host, cluster.broker_port

    bus = MqttBus(address, topics, Credentials(), client_id="load", highest_version=4)
    running = asyncio.create_task(bus.run(), name="load bus")
    try:
        await bus.connected(10)
        yield Asker(bus, topics, model, from_numpy("", array))
    finally:
        running.cancel()
        await asyncio.wait([running])


def resident_bytes(daemons: list[Daemon]) -> int:
    """Resident memory of these daemons and their children."""
    processes = [psutil.Process(daemon.pid) for daemon in daemons]
    processes += [child for process in processes for child in process.children(recursive=True)]
    return sum(process.memory_info().rss for process in processes)


def row_of(label: str, per_second: float, found: dict[str, float]) -> tuple[str, ...]:
    """A row of the report."""
    return label, f"{per_second:.0f}", f"{found['p50_ms']:.1f}", f"{found['p99_ms']:.1f}"


async def tail_and_overload(cluster: LocalCluster, model: Path, seconds: float, report: Report) -> None:
    """Checks `tail`, `overload_goodput`, `overload_unanswered` and `overload_memory`."""
    row = np.random.default_rng(0).random((1, SIZE, SIZE, 3), np.float32)
    async with AsyncClient(f"{cluster.broker_host}:{cluster.broker_port}", cluster=cluster.cluster) as client:
        await client.register(model, "net")
        await client.deploy("net", wait=True)
    turns: list[Turn] = []
    async with asker(cluster, "net", row) as load:
        daemons = [cluster.coordinator, *cluster.nodes]
        before = 0
        for _ in range(1 if seconds < FULL_SECONDS else TURNS):
            capacity = await load.closed_loop(CLOSED_LOOP_CLIENTS, seconds / 2)
            steady = await load.open_loop(0.7 * capacity, seconds)
            flood = await load.open_loop(3 * capacity, seconds, DEADLINE_SECONDS)
            turns.append(Turn(capacity, percentiles(steady.good), flood, seconds))
            before = before or resident_bytes(daemons)  # memory that a flood takes at first is kept
        grown = resident_bytes(daemons) / before
    report.figures["turns"] = [turn.told() for turn in turns]
    for at, turn in enumerate(turns, start=1):
        report.rows.append(row_of(f"70 % of capacity, turn {at}", 0.7 * turn.capacity, turn.steady))
        report.rows.append(row_of(f"3 times capacity, turn {at}: answered", turn.goodput, percentiles(turn.flood.good)))
    report.check("tail", statistics.median(turn.tail for turn in turns), at_most=5.0)
    report.check("overload_goodput", statistics.median(turn.goodput / turn.capacity for turn in turns), at_least=0.9)
    report.check("overload_unanswered", sum(turn.flood.failures().get("unanswered", 0) for turn in turns), at_most=0.0)
    report.check("overload_memory", grown, at_most=1.05)


async def kill(cluster: LocalCluster, model: Path, seconds: float, report: Report) -> None:
    """Checks `kill_failures` and `kill_p99_seconds`: one of two replicas gets SIGKILL, with its node, under load."""
    row = np.random.default_rng(0).random((1, SIZE, SIZE, 3), np.float32)
    async with AsyncClient(f"{cluster.broker_host}:{cluster.broker_port}", cluster=cluster.cluster) as client:
        await client.register(model, "pair")
        await client.deploy("pair", replicas=2, wait=True)
    async with asker(cluster, "pair", row) as load:
        capacity = await load.closed_loop(CLOSED_LOOP_CLIENTS, seconds)
        under_way = asyncio.create_task(load.open_loop(0.25 * capacity, 3 * seconds), name="load")
        await asyncio.sleep(seconds)
        killed_at = time.perf_counter()
        await asyncio.to_thread(cluster.nodes[-1].kill)
        answers = await under_way
    at = killed_at - answers.started
    usual = answers.p99_between(0.5, at)
    windows = [at + number * WINDOW_SECONDS for number in range(int((3 * seconds - at) / WINDOW_SECONDS))]
    slow = [begin for begin in windows if answers.p99_between(begin, begin + WINDOW_SECONDS) > 2 * usual]
    # The first of two windows in a row that are as fast as before: later windows may be slow by chance.
    back = next((begin for begin in windows if begin not in slow and begin + WINDOW_SECONDS not in slow), 3 * seconds)
    report.figures["kill"] = {
        "per_second": round(0.25 * capacity, 1), "asked": len(answers.due), "failures": answers.failures(),
        "p99_before_ms": round(1000 * usual, 1), "longest_ms": round(1000 * max(answers.seconds), 1),
    }  # fmt: skip
    report.rows.append(row_of("a replica is killed", 0.25 * capacity, percentiles(answers.good)))
    report.check("kill_failures", sum(answers.failures().values()), at_most=0.0)
    report.check("kill_p99_seconds", back - at, at_most=2.0)


async def trained(job: AsyncJob, samples: int) -> None:
    """Return when the job has trained on more samples than this. Raises TimeoutError."""
    async with asyncio.timeout(60):
        async for progress in job.progress():
            if progress.done > samples:
                return


async def beside_training(cluster: LocalCluster, model: Path, seconds: float, report: Report) -> None:
    """Checks `give_way_p99`: p99 with an objective over p99 without, both while a job trains on the same nodes."""
    rng = np.random.default_rng(0)
    row = rng.random((1, SIZE, SIZE, 3), np.float32)
    data = rng.random((256, SIZE, SIZE, 3), np.float32), rng.integers(0, 10, 256)
    found: dict[str, dict[str, float]] = {}
    async with AsyncClient(f"{cluster.broker_host}:{cluster.broker_port}", cluster=cluster.cluster) as client:
        await client.register(model, "beside")
        await client.deploy("beside", wait=True)
        async with asker(cluster, "beside", row) as load:
            capacity = await load.closed_loop(CLOSED_LOOP_CLIENTS, seconds / 2)
            rate = 0.3 * capacity
            found["no training"] = percentiles((await load.open_loop(rate, seconds)).good)
            # An undisturbed answer takes half of this.
            tight = 2 * found["no training"]["p50_ms"] / 1000
            job = await client.train(str(model), data, epochs=1_000, batch_size=64, strategy="local")
            await trained(job, 0)
            for kind, objective in (("training goes on", 0.0), ("training gives way", tight)):
                await client.deploy("beside", objective=objective, wait=True)
                await load.open_loop(rate, 2.0)
                found[kind] = percentiles((await load.open_loop(rate, 2 * seconds)).good)
            done = (await job.status()).progress.done
            await trained(job, done)  # training goes on when it is quiet
            await client.cancel(job.id)
    for kind, values in found.items():
        report.rows.append(row_of(f"beside training: {kind}", rate, values))
        report.figures[kind.replace(" ", "_")] = values
    report.check(
        "give_way_p99", found["training gives way"]["p99_ms"] / found["training goes on"]["p99_ms"], at_most=0.8
    )


def one_replica(quick: bool, report: Report) -> None:
    """One replica under load, and beside training."""
    with tempfile.TemporaryDirectory(prefix="potluck-bench-") as name:
        model = network(Path(name) / "net.keras")
        with LocalCluster(Path(name) / "one", cluster="load", nodes=1, discovery=False, cores=[1]) as cluster:
            asyncio.run(tail_and_overload(cluster, model, _seconds(quick), report))
            asyncio.run(beside_training(cluster, model, _seconds(quick), report))


def two_replicas(quick: bool, report: Report) -> None:
    """Two replicas, of which one is killed."""
    with tempfile.TemporaryDirectory(prefix="potluck-bench-") as name:
        model = network(Path(name) / "net.keras")
        with LocalCluster(Path(name) / "two", cluster="load", nodes=2, discovery=False, cores=[0, 1]) as cluster:
            asyncio.run(kill(cluster, model, _seconds(quick), report))


def _seconds(quick: bool) -> float:
    return 2.0 if quick else FULL_SECONDS


PARTS: dict[Callable[[bool, Report], None], tuple[str, ...]] = {
    one_replica: ("tail", "overload_goodput", "overload_unanswered", "overload_memory", "give_way_p99"),
    two_replicas: ("kill_failures", "kill_p99_seconds"),
}
"""The parts, and the checks that each makes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short run, to see that it works")
    arguments = parser.parse_args()
    report = Report("load", columns=("", "rate", "p50 ms", "p99 ms"))
    for part in PARTS:
        part(arguments.quick, report)
    report.show()


if __name__ == "__main__":
    main()
