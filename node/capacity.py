"""What this machine has: cores, memory, GPUs, runtimes, and how fast it was measured to be."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import os
import platform
import socket
import sys
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from potluck.lifecycle import die_with_parent
from potluck.logs import fields
from potluck.messages import Capacity, Gpu, NodeTelemetry

log = logging.getLogger(__name__)

MEASURE_SECONDS = 30.0
RUNTIMES = {"tensorflow": ("tensorflow", "tensorflow-cpu", "tensorflow_cpu"), "keras": ("keras",)}


def read(gflops: float = 0.0) -> Capacity:
    """This machine's capacity, as far as this process may use it (affinity and cgroup limits)."""
    return Capacity(
        hostname=socket.gethostname(),
        system=f"{platform.system()} {platform.machine()}",
        cores=cores(),
        memory_bytes=memory_bytes(),
        gpus=_gpus(),
        runtimes=_runtimes(),
        gflops=gflops,
    )


def cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may run on: affinity, and the CPU quota of its cgroup (v2 or v1), rounded up; one at least."""
    count = len(os.sched_getaffinity(0))
    quota = _cgroup_quota(cgroup)
    return max(1, min(count, -(-quota[0] // quota[1])) if quota else count)


def memory_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory of the machine, or the limit of the cgroup when that is lower."""
    total = int(psutil.virtual_memory().total)
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        text = _text(cgroup / name)
        if text.isdigit():
            total = min(total, int(text))
    return total


async def measure(kept_in: Path) -> float:
    """GFLOP/s, measured in a short-lived process so that numpy stays out of this one; kept in the file `kept_in` for this machine.

    0 when it cannot be measured: then placement takes this node for an average one.
    """
    key = f"{platform.processor() or platform.machine()} {cores()}"
    kept = _text(kept_in).split("\t")
    if len(kept) == 2 and kept[0] == key:
        return float(kept[1])
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "node.benchmark", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": str(cores()), "OPENBLAS_NUM_THREADS": str(cores())},
        preexec_fn=die_with_parent(),
    )  # fmt: skip
    try:
        async with asyncio.timeout(MEASURE_SECONDS):
            out, err = await process.communicate()
        gflops = float(out)
    except (TimeoutError, ValueError) as error:
        if process.returncode is None:
            process.kill()
            await process.wait()
            err = b""
        log.warning("speed not measured %s", fields(reason=err.decode(errors="replace")[-200:] or error))
        return 0.0
    await asyncio.to_thread(kept_in.write_text, f"{key}\t{gflops}")
    return gflops


class Telemetry:
    """Readings of this machine; the first CPU reading is of the time since this object was made."""

    def __init__(self) -> None:
        psutil.cpu_percent()
        self._nvml = _nvml()

    def read(self, node_id: str, session: str, attempts: tuple[str, ...], replicas: tuple[str, ...]) -> NodeTelemetry:
        memory = psutil.virtual_memory()
        return NodeTelemetry(
            node_id=node_id,
            session=session,
            cpu_percent=psutil.cpu_percent(),
            memory_used_bytes=memory.used,
            memory_available_bytes=memory.available,
            attempts=attempts,
            replicas=replicas,
            gpu_percent=self._gpu_percent(),
        )

    def _gpu_percent(self) -> tuple[float, ...]:
        if self._nvml is None:
            return ()
        handles = map(self._nvml.nvmlDeviceGetHandleByIndex, range(self._nvml.nvmlDeviceGetCount()))
        return tuple(float(self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu) for handle in handles)


def _gpus() -> tuple[Gpu, ...]:
    nvml = _nvml()
    if nvml is None:
        return ()
    found = []
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        name = nvml.nvmlDeviceGetName(handle)
        text = name.decode() if isinstance(name, bytes) else str(name)
        found.append(Gpu(name=text, memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total)))
    return tuple(found)


@cache
def _nvml() -> Any:
    """NVIDIA's management library when it, its Python package and a GPU are there; else None."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        return None
    except pynvml.NVMLError as error:
        log.debug("no NVIDIA driver %s", fields(reason=error))
        return None
    return pynvml


def _runtimes() -> dict[str, str]:
    """Versions of what is installed, without importing it."""
    found = {}
    for runtime, names in RUNTIMES.items():
        for name in names:
            try:
                found[runtime] = importlib.metadata.version(name)
                break
            except importlib.metadata.PackageNotFoundError:
                continue
    return found


def _cgroup_quota(cgroup: Path) -> tuple[int, int] | None:
    v2 = _text(cgroup / "cpu.max").split()
    if len(v2) == 2 and v2[0].isdigit():
        return int(v2[0]), int(v2[1])
    quota, period = _text(cgroup / "cpu/cpu.cfs_quota_us"), _text(cgroup / "cpu/cpu.cfs_period_us")
    if quota.isdigit() and period.isdigit() and int(quota) > 0:
        return int(quota), int(period)
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
