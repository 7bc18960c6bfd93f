"""What this machine has: cores, memory, GPUs, runtimes, and its measured speed."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import math
import os
import platform
import socket
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from node.cgroup import Cgroup, read_text
from potluck.lifecycle import die_with_parent
from potluck.logs import fields
from potluck.wire.births import NodeTelemetry
from potluck.wire.values import Capacity, Gpu

log = logging.getLogger(__name__)

MEASURE_SECONDS = 30.0
RESERVE_BYTES = 256 * 2**20
RESERVE_SHARE = 0.05
"""The least memory that an engine leaves to others."""
ENGINE_LEAST_BYTES = 2**30
"""The least memory for an engine: with TensorFlow, it needs half of that at rest."""
DRIVER = Path("/proc/driver/nvidia")
"""Exists where NVIDIA's driver is loaded."""
RUNTIMES = {
    "tensorflow": ("tensorflow", "tensorflow-cpu", "tensorflow_cpu"),
    "keras": ("keras",),
    "litert": ("ai-edge-litert",),
}


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


def cores(cgroup: Cgroup = Cgroup()) -> int:  # noqa: B008 - frozen
    """Cores that this process may use: affinity, and the CPU quota of its cgroups, rounded up; at least one."""
    count = len(os.sched_getaffinity(0))
    return max(1, math.ceil(min(count, cgroup.cpus())))


def memory_bytes(cgroup: Cgroup = Cgroup()) -> int:  # noqa: B008 - frozen
    """The machine's memory, or the limit of the process's cgroups if that is lower."""
    return int(min(psutil.virtual_memory().total, cgroup.memory_bytes()))


def memory_for_an_engine(cgroup: Cgroup = Cgroup()) -> int:  # noqa: B008 - frozen
    """How much memory an engine that starts now may use: what the machine or cgroups have left, minus a reserve for others."""
    left = min(psutil.virtual_memory().available, cgroup.memory_left())
    return int(max(ENGINE_LEAST_BYTES, left - max(RESERVE_BYTES, RESERVE_SHARE * memory_bytes(cgroup))))


async def measure(kept_in: Path, threads: int = 0) -> float:
    """GFLOP/s on `threads` (0: all cores), measured in a short-lived process so that numpy stays out of this one.

    The result is kept in the file `kept_in`. 0 when it cannot be measured: placement then assumes an average node.
    """
    threads = threads or cores()
    kept = read_text(kept_in).rpartition("\t")
    if kept[0] == _measured_on(threads) and (known := _positive(kept[2])):
        return known
    if gflops := await benchmark(threads):
        await keep(kept_in, gflops, threads)
    return gflops


async def benchmark(threads: int = 0, *, gently: bool = False) -> float:
    """GFLOP/s, measured now; 0 when that fails. `gently`: after everything else that this machine does."""
    threads = threads or cores()
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "node.benchmark", *(["--gently"] if gently else []),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env=os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)),
            preexec_fn=die_with_parent(),
        )  # fmt: skip
    except OSError as error:  # no memory, or no more processes allowed
        log.warning("speed not measured %s", fields(reason=error))
        return 0.0
    out, err = b"", b""
    try:
        async with asyncio.timeout(MEASURE_SECONDS):
            out, err = await process.communicate()
    except TimeoutError:
        err = f"it took more than {MEASURE_SECONDS:g} s".encode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    gflops = _positive(out.decode(errors="replace"))
    if not gflops:
        log.warning("speed not measured %s", fields(reason=" ".join(err.decode(errors="replace").split())[-200:]))
    return gflops


async def keep(kept_in: Path, gflops: float, threads: int = 0) -> None:
    """Keep a speed for the next start."""
    try:
        await asyncio.to_thread(kept_in.write_text, f"{_measured_on(threads or cores())}\t{gflops}")
    except OSError as error:  # it is measured again at the next start
        log.warning("speed not kept %s", fields(reason=error))


def _measured_on(threads: int) -> str:
    return f"{platform.machine()} {threads} threads"


def processor_seconds() -> tuple[float, float]:
    """(busy, all) seconds of all processors of this machine since it started; `all` includes idle time."""
    times = psutil.cpu_times()
    whole = (
        times.user
        + times.system
        + times.idle
        + sum(getattr(times, name, 0.0) for name in ("nice", "iowait", "irq", "softirq", "steal"))
    )
    return whole - times.idle - getattr(times, "iowait", 0.0), whole


class Telemetry:
    """Readings of this machine. The first CPU reading is for the time since this object was made."""

    def __init__(self) -> None:
        self._cpu_percent = psutil.cpu_percent()
        self._memory = psutil.virtual_memory()
        self._nvml = _nvml()

    def read(
        self,
        node_id: str,
        session: str,
        attempts: tuple[str, ...],
        replicas: tuple[str, ...],
        *,
        serving: bool = False,
        gives_way: bool = False,
        coordinator_lost_at: float = 0.0,
        shortage: str = "",
    ) -> NodeTelemetry:
        """New readings; where they fail (too many open files), the ones from before."""
        try:
            self._memory = psutil.virtual_memory()
            self._cpu_percent = psutil.cpu_percent()
        except OSError as error:
            log.warning("no new readings of this machine %s", fields(reason=error))
        return NodeTelemetry(
            node_id=node_id,
            session=session,
            cpu_percent=self._cpu_percent,
            memory_used_bytes=self._memory.used,
            memory_available_bytes=self._memory.available,
            attempts=attempts,
            replicas=replicas,
            serving=serving,
            gives_way=gives_way,
            gpu_percent=self._gpu_percent(),
            sent_at=time.time(),
            coordinator_lost_at=coordinator_lost_at,
            shortage=shortage,
        )

    def _gpu_percent(self) -> tuple[float, ...]:
        if self._nvml is None:
            return ()
        try:
            handles = map(self._nvml.nvmlDeviceGetHandleByIndex, range(self._nvml.nvmlDeviceGetCount()))
            return tuple(float(self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu) for handle in handles)
        except self._nvml.NVMLError as error:  # a GPU that is cut into parts does not tell; a lost GPU raises here
            log.debug("no GPU readings %s", fields(reason=error))
            return ()


def _gpus() -> tuple[Gpu, ...]:
    nvml = _nvml()
    if nvml is None:
        return ()
    found = []
    try:
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            name = nvml.nvmlDeviceGetName(handle)
            text = name.decode() if isinstance(name, bytes) else str(name)
            found.append(Gpu(name=text, memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total)))
    except nvml.NVMLError as error:
        log.warning("not all GPUs could be asked %s", fields(found=len(found), reason=error))
    return tuple(found)


@cache
def _nvml() -> Any:
    """NVIDIA's management library, if the library, its Python package and a GPU exist; else None."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        if any(DRIVER.glob("gpus/*")):
            log.warning(
                "GPUs are not used %s",
                fields(reason="nvidia-ml-py is not installed: see the extra gpu (docs/install.md)"),
            )
        return None
    except pynvml.NVMLError as error:
        log.debug("no NVIDIA driver %s", fields(reason=error))
        return None
    return pynvml


def _runtimes() -> dict[str, str]:
    """Versions of the installed runtimes, without importing them."""
    found = {}
    for runtime, names in RUNTIMES.items():
        for name in names:
            try:
                found[runtime] = importlib.metadata.version(name)
                break
            except importlib.metadata.PackageNotFoundError:
                continue
    return found


def _positive(text: str) -> float:
    """The positive finite number in `text`; 0 for anything else."""
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if 0 < value < float("inf") else 0.0
