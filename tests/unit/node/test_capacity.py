"""What a node reports that it has: as much as this process may use, without importing TensorFlow."""

from __future__ import annotations

import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from node import capacity
from node.cgroup import Cgroup
from potluck.wire.values import Gpu


def tree(root: Path, membership: str, files: dict[str, str]) -> Cgroup:
    """A control group file system with these files."""
    for name, text in files.items():
        path = root / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    (root / "membership").write_text(membership + "\n")
    return Cgroup(root / "cgroup", root / "membership")


SLICE = "0::/system.slice/potluck-node.service"


@pytest.mark.parametrize(
    ("membership", "files", "cpus"),
    [
        ("0::/", {}, math.inf),
        ("0::/", {"cpu.max": "max 100000"}, math.inf),
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        (SLICE, {"system.slice/potluck-node.service/cpu.max": "50000 100000"}, 0.5),
        # the lowest of all limits above us
        (SLICE, {"system.slice/cpu.max": "20000 10000", "system.slice/potluck-node.service/cpu.max": "max 100000"}, 2),
        # a container whose /proc names a folder of the host
        ("0::/docker/0123", {"cpu.max": "400000 100000"}, 4),
        # v1
        ("4:cpu,cpuacct:/\n0::/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
        ("4:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/cpu.cfs_period_us": "100000"}, 3),
        # hybrid
        ("1:name=systemd:/x\n0::/x", {"unified/x/cpu.max": "100000 100000"}, 1),
        ("what is this", {"cpu.max": "nonsense"}, math.inf),
    ],
)
def test_cpu_quota(tmp_path: Path, membership: str, files: dict[str, str], cpus: float) -> None:
    assert tree(tmp_path, membership, files).cpus() == cpus


@pytest.mark.parametrize(
    ("membership", "files", "limit"),
    [
        ("0::/", {}, math.inf),
        ("0::/", {"memory.max": "max"}, math.inf),
        (SLICE, {"system.slice/potluck-node.service/memory.max": "1048576", "memory.max": "4194304"}, 2**20),
        (SLICE, {"system.slice/potluck-node.service/memory.high": "1048576", "memory.max": "4194304"}, 2**20),
        ("9:memory:/job/1", {"memory/job/memory.limit_in_bytes": "2097152"}, 2**21),
    ],
)
def test_memory_limit(tmp_path: Path, membership: str, files: dict[str, str], limit: float) -> None:
    assert tree(tmp_path, membership, files).memory_bytes() == limit


def test_cores_are_those_that_may_be_used(tmp_path: Path) -> None:
    allowed = len(os.sched_getaffinity(0))
    assert capacity.cores(tree(tmp_path, "0::/", {})) == allowed
    # A tenth of a core still counts as one.
    assert capacity.cores(tree(tmp_path, "0::/", {"cpu.max": "10000 100000"})) == 1
    assert capacity.cores(tree(tmp_path, "0::/", {"cpu.max": "99900000 100000"})) == allowed
    pinned = [sys.executable, "-c", "from node import capacity; print(capacity.cores())"]
    core = min(os.sched_getaffinity(0))
    out = subprocess.run(
        pinned, capture_output=True, text=True, check=True, preexec_fn=lambda: os.sched_setaffinity(0, {core})
    )
    assert out.stdout.strip() == "1"


@pytest.mark.parametrize(
    ("membership", "files", "left"),
    [
        ("0::/", {}, math.inf),
        ("0::/", {"memory.max": "max", "memory.current": "5"}, math.inf),
        ("0::/", {"memory.max": "9000", "memory.high": "700", "memory.current": "600"}, 100),
        (
            SLICE,
            {
                "system.slice/potluck-node.service/memory.max": "1000",
                "system.slice/potluck-node.service/memory.current": "900",
                "system.slice/potluck-node.service/memory.stat": "anon 500\ninactive_file 300\nactive_file 100",
                "memory.max": "5000",
                "memory.current": "4000",
            },
            400,
        ),
        (
            "9:memory:/job/1",
            {
                "memory/job/memory.limit_in_bytes": "1000",
                "memory/job/memory.usage_in_bytes": "1200",
                "memory/job/memory.stat": "inactive_file 7\ntotal_inactive_file 50",
            },
            0,
        ),
    ],
)
def test_memory_left(tmp_path: Path, membership: str, files: dict[str, str], left: float) -> None:
    assert tree(tmp_path, membership, files).memory_left() == left


def test_an_engine_gets_what_is_left_but_for_a_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total = psutil.virtual_memory().total
    free = capacity.memory_for_an_engine(tree(tmp_path, "0::/", {}))
    assert 0 < free <= max(capacity.ENGINE_LEAST_BYTES, total - capacity.RESERVE_SHARE * total)
    monkeypatch.setattr(capacity, "ENGINE_LEAST_BYTES", 2**20)
    group = {"memory.max": str(2**30), "memory.current": str(2**29)}
    assert capacity.memory_for_an_engine(tree(tmp_path, "0::/", group)) == 2**28
    group["memory.current"] = str(2**30)
    assert capacity.memory_for_an_engine(tree(tmp_path, "0::/", group)) == 2**20


def test_memory_is_the_machines_or_less(tmp_path: Path) -> None:
    total = psutil.virtual_memory().total
    assert capacity.memory_bytes(tree(tmp_path, "0::/", {})) == total
    assert capacity.memory_bytes(tree(tmp_path, "0::/", {"memory.max": "1000000"})) == 1_000_000
    assert capacity.memory_bytes(tree(tmp_path, "0::/", {"memory.max": str(2 * total)})) == total


def test_runtimes_are_told_without_importing_them() -> None:
    script = (
        "import sys; from node import capacity; found = capacity.read();"
        "heavy = {'tensorflow', 'keras', 'ai_edge_litert', 'numpy', 'PIL', 'pandas'} & set(sys.modules);"
        "print(sorted(found.runtimes.keys() - {'litert'}), sorted(heavy), found.cores > 0, found.memory_bytes > 0, bool(found.hostname))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "['keras', 'tensorflow'] [] True True True"


class NVMLError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """NVIDIA's library with two GPUs; the second fails when `broken` is set."""
    library = SimpleNamespace(NVMLError=NVMLError, broken=False, nvmlInit=lambda: None, nvmlDeviceGetCount=lambda: 2)

    def handle(index: int) -> int:
        if index and library.broken:
            raise NVMLError("GPU is lost")
        return index

    library.nvmlDeviceGetHandleByIndex = handle
    library.nvmlDeviceGetName = lambda index: [b"Tesla", "H100"][index]
    library.nvmlDeviceGetMemoryInfo = lambda index: SimpleNamespace(total=(index + 1) * 2**30)
    library.nvmlDeviceGetUtilizationRates = lambda index: SimpleNamespace(gpu=10 * index)
    monkeypatch.setitem(sys.modules, "pynvml", library)
    capacity._nvml.cache_clear()
    yield library
    capacity._nvml.cache_clear()


def test_gpus_are_found(nvml: SimpleNamespace) -> None:
    assert capacity.read().gpus == (Gpu(name="Tesla", memory_bytes=2**30), Gpu(name="H100", memory_bytes=2**31))
    assert capacity.Telemetry().read("n", "s", (), ()).gpu_percent == (0.0, 10.0)


def test_a_gpu_that_fails_does_no_harm(nvml: SimpleNamespace) -> None:
    telemetry = capacity.Telemetry()
    nvml.broken = True
    assert [gpu.name for gpu in capacity.read().gpus] == ["Tesla"]
    assert telemetry.read("n", "s", (), ()).gpu_percent == ()


def test_without_a_driver_there_is_no_gpu(nvml: SimpleNamespace) -> None:
    def fails() -> None:
        raise NVMLError("driver not loaded")

    nvml.nvmlInit = fails
    assert capacity.read().gpus == ()


@pytest.mark.parametrize("driver", [True, False])
def test_gpus_that_cannot_be_asked_are_told_of(
    driver: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if driver:
        (tmp_path / "gpus/0000:01:00.0").mkdir(parents=True)
    monkeypatch.setattr(capacity, "DRIVER", tmp_path)
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as if it was not installed
    capacity._nvml.cache_clear()
    with caplog.at_level("WARNING"):
        assert capacity.read().gpus == ()
    capacity._nvml.cache_clear()
    assert ("nvidia-ml-py is not installed" in caplog.text) is driver


def test_telemetry_tells_of_work() -> None:
    reading = capacity.Telemetry().read("n", "s", ("a",), ("r",))
    assert (reading.node_id, reading.session, reading.attempts, reading.replicas) == ("n", "s", ("a",), ("r",))
    assert 0 <= reading.cpu_percent <= 100
    assert reading.memory_used_bytes + reading.memory_available_bytes <= 1.1 * psutil.virtual_memory().total


def test_telemetry_goes_on_when_files_run_short(caplog: pytest.LogCaptureFixture) -> None:
    telemetry = capacity.Telemetry()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        first = os.dup(0)
        stack.callback(os.close, first)
        resource.setrlimit(resource.RLIMIT_NOFILE, (first + 1, hard))  # the lowest free number is the last one
        reading = telemetry.read("n", "s", ("a",), ())
    assert reading.attempts == ("a",)
    assert reading.memory_available_bytes > 0
    assert "Too many open files" in caplog.text


async def test_speed_is_measured_once_and_kept(tmp_path: Path) -> None:
    kept = tmp_path / "speed"
    first = await capacity.measure(kept)
    assert first > 0.1
    started = time.monotonic()
    assert await capacity.measure(kept) == first
    assert time.monotonic() - started < 0.05
    before = kept.read_text()
    await capacity.measure(kept, threads=1)  # another number of threads has another speed
    assert kept.read_text() != before


@pytest.mark.parametrize("text", ["", "rubbish", "\t", "x86_64 {} threads\tnan", "x86_64 {} threads\t-1", "\0\xff"])
async def test_a_kept_speed_that_cannot_be_read_is_measured_again(tmp_path: Path, text: str) -> None:
    kept = tmp_path / "speed"
    kept.write_bytes(text.format(capacity.cores()).encode("latin-1"))
    assert await capacity.measure(kept) > 0.1


async def test_a_speed_that_cannot_be_kept_is_told_all_the_same(tmp_path: Path) -> None:
    assert await capacity.measure(tmp_path / "no such folder" / "speed") > 0.1


async def test_what_cannot_be_measured_is_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no numpy here >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    assert await capacity.measure(tmp_path / "speed") == 0
    assert "no numpy here" in caplog.text
    broken.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(capacity, "MEASURE_SECONDS", 0.2)
    assert await capacity.measure(tmp_path / "speed") == 0
    assert "more than 0.2 s" in caplog.text
    broken.unlink()
    assert await capacity.measure(tmp_path / "speed") == 0
    assert "No such file" in caplog.text
