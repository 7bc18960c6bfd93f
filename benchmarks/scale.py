"""One coordinator and very many nodes: shards per second of its CPU time, at rest, when all join at once, and against Dask's scheduler.

The nodes are simulated (`simulated.py`: real MQTT, no TensorFlow, instant results); the coordinator, its journal and mosquitto are
real. The simulator needs CPU too, so both the coordinator's CPU time and wall time are measured. A job evaluates made-up items, one
batch per shard. A shard counts when the coordinator has acknowledged its result: then the result is in its journal.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable
from contextlib import AsyncExitStack
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import peers
import psutil
from report import OtherLoad, Report

from coordinator.copies.locations import Holders
from coordinator.dispatch.leases import Leases
from coordinator.membership import Membership
from coordinator.plans.decisions import Lease
from coordinator.plans.events import AttemptFinished, AttemptLeased, JobSubmitted
from coordinator.plans.job import Job
from coordinator.plans.strategies import strategy_for
from potluck.bus.mqtt import MqttBus, in_turn
from potluck.credentials import Credentials
from potluck.lifecycle import die_with_parent
from potluck.local_cluster import LocalCluster
from potluck.settings import CoordinatorSettings
from potluck.wire import codec
from potluck.wire.births import NodeCapacity, NodeStatus
from potluck.wire.jobs import Evaluate
from potluck.wire.questions import AddDataset, CancelJob, JobAccepted, ListNodes, NodesListed, RegisterModel, SubmitJob
from potluck.wire.tasks import EvaluateResult, EvaluateTask
from potluck.wire.topics import Topics
from potluck.wire.values import BlobRef, Capacity, DataFormat, Dataset, DataShard, Message

BATCH = 32
SHARDS = 10
ITEMS = 100_000_000
"""Items of the data set: more than any job here reaches."""
FILES = 16_384
"""Files that this process and its children may open."""
JOIN_SECONDS = 120.0


class Cluster:
    """A coordinator with a broker and `count` simulated nodes; `settings` go to the coordinator's environment."""

    def __init__(self, folder: Path, count: int, *, wait: bool = True) -> None:
        self.name = f"scale-{uuid.uuid4().hex[:6]}"
        self.count = count
        self._wait = wait
        self._folder = folder
        self._stack = AsyncExitStack()
        self.topics = Topics(self.name)

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _start(self) -> None:
        cluster = self._stack.enter_context(
            LocalCluster(self._folder / self.name, cluster=self.name, nodes=0, discovery=False)
        )
        self.cluster = cluster
        self.process = psutil.Process(cluster.coordinator.pid)
        self.bus = MqttBus(
            in_turn([("127.0.0.1", cluster.broker_port)]), self.topics, Credentials(), client_id=f"bench-{self.name}"
        )
        running = asyncio.create_task(self.bus.run())
        self._stack.push_async_callback(_end, running)
        await self.bus.connected(10.0)
        model = await self._put(b"no model")
        await self.ask(RegisterModel(name="model", model=model))
        shards = [DataShard(blob=await self._put(b"shard %d" % n), count=ITEMS // SHARDS) for n in range(SHARDS)]
        dataset = Dataset(
            name="data", format=DataFormat(kind="arrays", inputs=("x",), target="y"), count=ITEMS, shards=tuple(shards)
        )
        await self.ask(AddDataset(name="data", manifest=await self._put(codec.pack(dataset))))
        self.idle_cpu = self.cpu()
        self.joining_at = time.monotonic()
        if self.count:
            await self._simulate()

    async def _simulate(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("simulated.py")), f"127.0.0.1:{self.cluster.broker_port}", self.name, str(self.count)]  # fmt: skip
        self.simulator = await asyncio.create_subprocess_exec(
            *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=die_with_parent()
        )
        self._stack.push_async_callback(_stop, self.simulator)
        assert self.simulator.stdout is not None
        async with asyncio.timeout(JOIN_SECONDS):
            line = await self.simulator.stdout.readline()
        assert line.startswith(b"joined"), line
        self.connected_seconds = float(line.split()[1])
        while self._wait and await self.online() < self.count:
            if time.monotonic() - self.joining_at > JOIN_SECONDS:
                raise TimeoutError(f"{await self.online()} of {self.count} nodes are online after {JOIN_SECONDS:.0f} s")
            await asyncio.sleep(0.2)

    async def online(self) -> int:
        """Nodes that the coordinator lists as online, page by page."""
        found, after = 0, ""
        while True:
            answer = await self.ask(ListNodes(after=after))
            assert isinstance(answer, NodesListed)
            found += sum(node.state == "online" for node in answer.nodes)
            if not answer.more:
                return found
            after = answer.nodes[-1].node_id

    async def ask(self, question: Message, topic: str = "") -> Message:
        return await self.bus.request(topic or self.topics.coordinator_inbox, question, timeout_seconds=60.0)

    async def submit(self) -> str:
        answer = await self.ask(
            SubmitJob(job=Evaluate(model="model:1", dataset="data", batch_size=BATCH)), self.topics.jobs_submit
        )
        assert isinstance(answer, JobAccepted)
        return answer.job_id

    async def cancel(self, job_id: str) -> None:
        await self.ask(CancelJob(job_id=job_id))

    async def counts(self) -> dict[str, float]:
        """Counts of what the simulated nodes have done."""
        assert self.simulator.stdin is not None
        assert self.simulator.stdout is not None
        self.simulator.stdin.write(b"\n")
        found: dict[str, float] = json.loads(await self.simulator.stdout.readline())
        return found

    def cpu(self) -> float:
        """CPU seconds that the coordinator has used, without its broker."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    async def measure(self, seconds: float) -> dict[str, float]:
        """Shards done in this time, and the coordinator's CPU seconds."""
        before, cpu, at = await self.counts(), self.cpu(), time.monotonic()
        broker = _broker_cpu(self.process)
        await asyncio.sleep(seconds)
        after = await self.counts()
        took = time.monotonic() - at
        shards = after["acknowledged"] - before["acknowledged"]
        used = self.cpu() - cpu
        return {
            "shards": shards,
            "seconds": took,
            "cpu_seconds": used,
            "broker_cpu_seconds": _broker_cpu(self.process) - broker,
            "per_second": shards / took,
            "per_cpu_second": shards / used if used else 0.0,
            "refused": after["refused"] - before["refused"],
        }

    async def _put(self, data: bytes) -> BlobRef:
        name = sha256(data).hexdigest()
        request = urllib.request.Request(f"{self.cluster.http_url}/blobs/{name}", data, method="PUT")
        await asyncio.to_thread(lambda: urllib.request.urlopen(request, timeout=10).close())
        return BlobRef(sha256=name, size=len(data))


def _broker_cpu(coordinator: psutil.Process) -> float:
    return float(sum(sum(child.cpu_times()[:2]) for child in coordinator.children()))


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


async def _stop(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        await asyncio.wait_for(process.wait(), 20)
    except TimeoutError:
        process.kill()
        await process.wait()


async def shards(folder: Path, report: Report, nodes: int, jobs: int, seconds: float) -> dict[str, float]:
    """`jobs` jobs on this many nodes."""
    async with Cluster(folder, nodes) as cluster:
        submitted = [await cluster.submit() for _ in range(jobs)]
        await asyncio.sleep(min(3.0, seconds))
        found = await cluster.measure(seconds)
        for job_id in submitted:
            await cluster.cancel(job_id)
    report.rows.append(
        (
            f"{nodes} nodes, {jobs} jobs" if jobs > 1 else f"{nodes} nodes, one job",
            f"{found['per_second']:.0f}",
            f"{found['per_cpu_second']:.0f}",
            f"{found['cpu_seconds'] / found['seconds']:.2f}",
            f"{found['broker_cpu_seconds'] / found['seconds']:.2f}",
        )
    )
    return found


async def rest(folder: Path, report: Report, nodes: int, seconds: float) -> dict[str, float]:
    """Idle nodes; and how long it took until all were listed."""
    async with Cluster(folder, nodes) as cluster:
        joined = time.monotonic() - cluster.joining_at
        joining_cpu = cluster.cpu() - cluster.idle_cpu
        await asyncio.sleep(min(3.0, seconds))
        found = await cluster.measure(seconds)
        found |= {
            "joined_seconds": joined,
            "joining_cpu_seconds": joining_cpu,
            "connected_seconds": cluster.connected_seconds,
        }
        found["listed"] = await cluster.online()
    found["cores"] = found["cpu_seconds"] / found["seconds"]
    report.rows.append(
        (
            f"{nodes} nodes at rest",
            "",
            "",
            f"{found['cores']:.3f}",
            f"{found['broker_cpu_seconds'] / found['seconds']:.2f}",
        )
    )
    report.rows.append((f"{nodes} nodes join, all listed after", f"{joined:.1f} s", "", f"{joining_cpu:.2f} s", ""))
    return found


def deciding_seconds(nodes: int, turns: int) -> float:
    """Seconds of one decision (a lease) with free slots on a tenth of the nodes: their view, and one job's plan, in memory."""
    membership, topics = Membership(timeout_seconds=1e9), Topics("plan")
    outbox: Any = SimpleNamespace(publish=lambda *_, **__: None)
    leases = Leases(
        topics=topics, outbox=outbox, membership=membership, settings=CoordinatorSettings(), epoch=1,
        holders=Holders(membership, lambda: ()),
    )  # fmt: skip
    for number in range(nodes):
        node_id = f"n{number:05}"
        capacity = Capacity(
            hostname="h", system="s", cores=1, memory_bytes=1, runtimes={"tensorflow": "2"}, gflops=10.0
        )
        membership.on_capacity(NodeCapacity(node_id=node_id, capacity=capacity), 0.0)
        membership.on_status(NodeStatus(node_id=node_id, session="1", state="online"), 0.0)
    blob = BlobRef(sha256="0" * 64, size=1)
    shards = tuple(DataShard(blob=blob, count=ITEMS // SHARDS) for _ in range(SHARDS))
    data = Dataset(name="d", format=DataFormat(kind="arrays", inputs=("x",), target="y"), count=ITEMS, shards=shards)
    submitted = JobSubmitted(
        at=0.0, job_id="j", request_id="", spec=Evaluate(model="m", dataset="d", batch_size=BATCH), model=blob
    )
    job = Job(submitted=submitted, strategy=strategy_for(submitted, data, None), dataset=data)
    chance, spent, decided, number = random.Random(0), 0.0, 0, 0
    for turn in range(-3, turns):
        began = time.perf_counter()
        decisions = job.plan(leases.view(0.0))
        took = time.perf_counter() - began
        if turn >= 0:
            spent, decided = spent + took, decided + len(decisions)
        for decision in decisions:
            assert isinstance(decision, Lease)
            number += 1
            job.apply(
                AttemptLeased(
                    at=0.0, attempt_id=str(number), shard_id=decision.shard_id, node_id=decision.node_id, task=decision.task
                )
            )  # fmt: skip
            leases.hold(job, job.attempts[str(number)], 0.0)
        for attempt in chance.sample(list(job.attempts.values()), max(1, nodes // 10)):
            task = attempt.task
            assert isinstance(task, EvaluateTask)
            count = sum(one.stop - one.start for one in task.slices)
            result = EvaluateResult(count=count, sums={"loss": 1.0}, seconds=3.0 * count / BATCH)
            job.apply(AttemptFinished(at=0.0, attempt_id=attempt.attempt_id, result=result))
            leases.drop(attempt.attempt_id)
    return spent / decided


async def dask(report: Report, workers: int, tasks: int, seconds: float) -> dict[str, float]:
    """CPU time of Dask's scheduler per task, with this many simulated workers and `tasks` tasks at a time."""
    peers.install("dask")
    python, script = str(peers.FOLDER / "dask" / "bin" / "python"), str(peers.APPS / "dask_app.py")
    async with AsyncExitStack() as stack:

        async def start(*arguments: str) -> asyncio.subprocess.Process:
            process = await asyncio.create_subprocess_exec(
                python, script, *arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                preexec_fn=die_with_parent(),
            )  # fmt: skip
            stack.push_async_callback(_kill, process)
            return process

        async def said(process: asyncio.subprocess.Process) -> str:
            assert process.stdout is not None
            async with asyncio.timeout(JOIN_SECONDS + seconds):
                return (await process.stdout.readline()).decode().strip()

        scheduler = await start("scheduler", "0")
        address = await said(scheduler)
        assert await said(await start("workers", address, str(workers))) == "joined"
        client = await start("client", address, str(tasks), str(seconds))
        assert await said(client) == "ready"
        used, at = psutil.Process(scheduler.pid).cpu_times(), time.monotonic()
        assert client.stdin is not None
        client.stdin.write(b"\n")
        done = int(await said(client))
        after, took = psutil.Process(scheduler.pid).cpu_times(), time.monotonic() - at
    cpu = after.user + after.system - used.user - used.system
    found = {
        "tasks": done,
        "seconds": took,
        "cpu_seconds": cpu,
        "per_second": done / took,
        "per_cpu_second": done / cpu,
    }
    report.rows.append((f"Dask, {workers} workers", f"{done / took:.0f}", f"{done / cpu:.0f}", f"{cpu / took:.2f}", ""))
    return found


async def _kill(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()


CHECKS = (
    "shards_per_cpu_second_100",
    "shards_per_cpu_second_1000",
    "shards_per_cpu_second_200_jobs",
    "plan_growth",
    "thousand_nodes_cores",
    "five_thousand_nodes",
)


async def run(folder: Path, report: Report, only: Callable[[str], bool], *, quick: bool) -> None:
    seconds = 2.0 if quick else 10.0
    size = 100 if quick else 1000
    if only("shards_per_cpu_second_100"):
        found = report.figures["shards_100"] = await shards(folder, report, 20 if quick else 100, 1, seconds)
        report.check("shards_per_cpu_second_100", found["per_cpu_second"], at_least=3000)
    if only("shards_per_cpu_second_1000"):
        found = report.figures["shards_1000"] = await shards(folder, report, size, 1, seconds)
        report.check("shards_per_cpu_second_1000", found["per_cpu_second"], at_least=3000)
        report.check("shards_per_second_1000", found["per_second"], at_least=1000)
        rival = report.figures["dask_1000"] = await dask(report, size, 1000 if quick else 20_000, seconds)
        report.check("tasks_over_dask", found["per_cpu_second"] / rival["per_cpu_second"], at_least=0.7)
    if only("shards_per_cpu_second_200_jobs"):
        jobs = 20 if quick else 200
        found = report.figures["shards_200_jobs"] = await shards(folder, report, 20 if quick else 100, jobs, seconds)
        report.check("shards_per_cpu_second_200_jobs", found["per_cpu_second"], at_least=2500)
    if only("plan_growth"):
        few, many = (deciding_seconds(count, 5 if quick else 50) for count in (100, 1000))
        report.figures["deciding_seconds"] = {"100": few, "1000": many}
        report.rows.append(("one decision, 100 and 1,000 nodes", "", "", f"{few * 1e6:.0f}, {many * 1e6:.0f} us", ""))
        report.check("plan_growth", many / few, at_most=3)
    if only("thousand_nodes_cores"):
        found = report.figures["rest_1000"] = await rest(folder, report, size, seconds)
        report.check("thousand_nodes_cores", found["cores"], at_most=0.15)
        report.check("join_storm_seconds", found["joined_seconds"], at_most=10)
    if only("five_thousand_nodes"):
        size = 200 if quick else 5000
        found = report.figures["rest_5000"] = await rest(folder, report, size, seconds)
        report.check("five_thousand_nodes", found["listed"] / size, at_least=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few nodes, for a short time: to see that it works")
    parser.add_argument("--only", choices=CHECKS, action="append", help="only these checks")
    given = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(FILES, hard)), hard))
    report = Report("scale", columns=("", "shards/s", "shards/CPU s", "coordinator's cores", "broker's"))
    others = OtherLoad()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(Path(folder), report, lambda name: not given.only or name in given.only, quick=given.quick))
    report.figures["cores_used_by_others"] = round(others.cores(), 2)
    report.show()


if __name__ == "__main__":
    main()
