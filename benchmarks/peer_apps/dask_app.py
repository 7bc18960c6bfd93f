"""Dask's scheduler as it comes, with workers that only seem to compute: each says at once that a task is done.

    python dask_app.py scheduler PORT                   the scheduler alone, so that its CPU time can be read
    python dask_app.py workers ADDRESS COUNT            the streams of COUNT workers in one process (distributed's own protocol)
    python dask_app.py client ADDRESS TASKS SECONDS     asks for batches of TASKS tasks for SECONDS; prints how many were done

A task holds a pickled function of no arguments, and its result stays with its worker.
"""

from __future__ import annotations

import asyncio
import sys
import time

from distributed import Client, Scheduler, wait
from distributed.comm import connect
from distributed.versions import get_versions

AT_ONCE = 50
"""Workers that join at the same time."""


def nothing(number: int) -> int:
    return number


async def scheduler(port: int) -> None:
    async with Scheduler(host="127.0.0.1", port=port, dashboard=False, dashboard_address="127.0.0.1:0") as one:
        print(one.address, flush=True)
        await one.finished()


class Worker:
    """One worker's stream to the scheduler."""

    def __init__(self, number: int) -> None:
        self.address = f"tcp://127.0.0.1:{20_000 + number}"
        self.name = f"sim-{number:05}"

    async def join(self, address: str, versions: dict) -> None:
        self.comm = await connect(address)
        await self.comm.write(
            {
                "op": "register-worker", "reply": False, "address": self.address, "status": "running", "nthreads": 2,
                "name": self.name, "now": time.time(), "resources": {}, "memory_limit": 2**30, "local_directory": "/tmp",
                "services": {}, "nanny": "", "pid": 1, "versions": versions, "extra": {}, "server_id": self.name,
                "stimulus_id": f"join-{self.name}",
                "metrics": {
                    "task_counts": {}, "bandwidth": {"total": 1e8, "workers": {}, "types": {}}, "digests_total_since_heartbeat": {},
                    "managed_bytes": 0, "spilled_bytes": {"memory": 0, "disk": 0}, "transfer": {"incoming_bytes": 0, "incoming_count": 0,
                    "incoming_count_total": 0, "outgoing_bytes": 0, "outgoing_count": 0, "outgoing_count_total": 0},
                    "event_loop_interval": 0.02, "cpu": 0.0, "memory": 2**28, "time": time.time(), "host_net_io": {}, "num_fds": 1,
                },
            },
            serializers=["msgpack"],
        )  # fmt: skip
        answer = await self.comm.read(deserializers=["msgpack"])
        if answer["status"] != "OK":
            raise RuntimeError(answer["message"])

    async def serve(self) -> None:
        while True:
            answers = []
            for message in await self.comm.read():
                if message.get("op") == "compute-task":
                    now = time.time()
                    answers.append(
                        {
                            "op": "task-finished", "status": "OK", "key": message["key"], "run_id": message["run_id"],
                            "nbytes": 28, "type": b"", "typename": "int", "metadata": {}, "thread": 1,
                            "startstops": ({"action": "compute", "start": now, "stop": now + 1e-6},), "stimulus_id": "done",
                        }
                    )  # fmt: skip
            if answers:
                await self.comm.write(answers)


async def workers(address: str, count: int) -> None:
    versions = get_versions()
    found = [Worker(number) for number in range(count)]
    slots = asyncio.Semaphore(AT_ONCE)

    async def join(worker: Worker) -> None:
        async with slots:
            await worker.join(address, versions)

    await asyncio.gather(*map(join, found))
    print("joined", flush=True)
    await asyncio.gather(*(worker.serve() for worker in found))


async def client(address: str, tasks: int, seconds: float) -> None:
    async with Client(address, asynchronous=True) as one:
        await wait(one.map(nothing, range(100), pure=False))
        print("ready", flush=True)
        sys.stdin.readline()
        done, began = 0, time.monotonic()
        while time.monotonic() - began < seconds:
            futures = one.map(nothing, range(tasks), pure=False, batch_size=1000)
            await wait(futures)
            done += len(futures)
        print(done, flush=True)
        sys.stdin.readline()


def main() -> None:
    what, *given = sys.argv[1:]
    if what == "scheduler":
        asyncio.run(scheduler(int(given[0])))
    elif what == "workers":
        asyncio.run(workers(given[0], int(given[1])))
    else:
        asyncio.run(client(given[0], int(given[1]), float(given[2])))


if __name__ == "__main__":
    main()
