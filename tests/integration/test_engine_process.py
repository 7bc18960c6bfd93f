"""The engine as a process: it dies, freezes, does not start, or is stopped, and nobody is left waiting."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from node.engine.process import Engine
from potluck.errors import EngineFailed
from potluck.tensors import from_numpy
from support.engine_lab import training
from support.eventually import eventually
from support.models import Files, blobs, dense
from support.processes import still_running


def fake_python(folder: Path, script: str) -> str:
    """A program that stands in for Python: what an engine may do that does not even get as far as TensorFlow."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


async def test_one_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", fake_python(tmp_path, "echo no such library >&2; exit 3"))
    engine = Engine(tmp_path / "scratch", threads=1, start_seconds=20, silence_seconds=5)
    with pytest.raises(EngineFailed, match=r"did not start: it ended.*no such library"):
        await engine.start()
    assert not engine.alive
    assert "status 3" in (await engine.wait_dead()).message


@pytest.mark.parametrize(("quick", "told"), [(False, "none"), (True, "1")])
async def test_quick_kernels_are_asked_of_tensorflow(
    quick: bool, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TF_ENABLE_ONEDNN_OPTS", raising=False)
    program = fake_python(tmp_path, "echo oneDNN ${TF_ENABLE_ONEDNN_OPTS:-none} >&2; exit 3")
    monkeypatch.setattr(sys, "executable", program)
    engine = Engine(tmp_path / "scratch", threads=1, start_seconds=20, silence_seconds=5, quick_kernels=quick)
    with pytest.raises(EngineFailed, match=f"oneDNN {told}"):
        await engine.start()


async def test_one_that_hangs_at_its_start_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", fake_python(tmp_path, "exec sleep 100"))
    engine = Engine(tmp_path / "scratch", threads=1, start_seconds=0.3, silence_seconds=5)
    with pytest.raises(EngineFailed, match=r"not ready within 0\.3 s"):
        await engine.start()
    assert engine.pid is not None
    assert not psutil.pid_exists(engine.pid)


async def test_a_program_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    engine = Engine(tmp_path / "scratch", threads=1, start_seconds=5, silence_seconds=5)
    with pytest.raises(EngineFailed, match="did not start"):
        await engine.start()
    await engine.stop()


async def test_one_that_talks_nonsense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "executable", fake_python(tmp_path, r'eval "printf \"\377\377\377\377\" >&$4"; exec sleep 100')
    )
    engine = Engine(tmp_path / "scratch", threads=1, start_seconds=1, silence_seconds=5)
    with pytest.raises(EngineFailed, match="did not start"):
        await engine.start()


@pytest.mark.tensorflow
async def test_killed_in_a_task(tmp_path: Path) -> None:
    engine, running = await _in_a_task(tmp_path, silence_seconds=20)
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(EngineFailed, match="was ended by SIGKILL, as Linux does when memory runs out") as died:
        await asyncio.wait_for(running, 10)
    assert "last words" not in died.value.message  # of what TensorFlow says at each start, nothing
    assert (await engine.wait_dead()).retryable
    assert not engine.alive
    with pytest.raises(EngineFailed):
        await engine.infer("r", [(from_numpy("x", np.zeros((1, 8), np.float32)),)])
    await engine.stop()


@pytest.mark.tensorflow
async def test_frozen_in_a_task(tmp_path: Path) -> None:
    engine, running = await _in_a_task(tmp_path, silence_seconds=2)
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGSTOP)
    with pytest.raises(EngineFailed, match="was silent for 2 s and was killed"):
        await asyncio.wait_for(running, 10)
    assert not psutil.pid_exists(engine.pid)
    await engine.stop()


@pytest.mark.tensorflow
async def test_stopped_in_a_task(tmp_path: Path) -> None:
    engine, running = await _in_a_task(tmp_path, silence_seconds=20)
    await engine.stop(grace_seconds=0)
    with pytest.raises(EngineFailed):
        await asyncio.wait_for(running, 1)
    await engine.stop()  # twice is once


@pytest.mark.tensorflow
async def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    script = (
        "import asyncio, sys\nfrom pathlib import Path\nfrom node.engine.process import Engine\n"
        "async def main():\n"
        f"    engine = Engine(Path({str(tmp_path)!r}), threads=1, start_seconds=60, silence_seconds=20)\n"
        "    await engine.start()\n    print(engine.pid, flush=True)\n    await asyncio.sleep(100)\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = psutil.Process(int(await asyncio.wait_for(parent.stdout.readline(), 60)))
    assert child.is_running()
    parent.kill()
    await parent.wait()
    await eventually(lambda: not still_running([child]))


async def _in_a_task(folder: Path, *, silence_seconds: float) -> tuple[Engine, asyncio.Task[object]]:
    """An engine that trains and would not end by itself."""
    files = Files(folder / "blobs")
    x, y = blobs(64)
    task = training(files.model(dense()), files.arrays(1, x=x, y=y), samples=10**9, seconds=1000)
    engine = Engine(folder / "scratch", threads=1, start_seconds=60, silence_seconds=silence_seconds)
    await engine.start()
    told = asyncio.Event()
    running: asyncio.Task[object] = asyncio.create_task(
        engine.run_task("job", task, files.paths, lambda done, metrics: told.set()), name="training"
    )
    await asyncio.wait_for(told.wait(), 60)
    return engine, running
