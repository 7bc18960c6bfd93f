"""The engine as a process: it dies, freezes, does not start, or is stopped, and nobody is left waiting."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from node.engine import process
from node.engine.process import Engine
from node.engine.watch import Limits
from potluck.errors import EngineFailed
from potluck.wire.tensors import from_numpy
from support import allowing
from support.engine_lab import training
from support.eventually import eventually
from support.models import Files, blobs, dense
from support.processes import still_running


def fake_python(folder: Path, script: str) -> str:
    """A program in place of Python, for engines that do not even reach TensorFlow."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


async def test_an_engine_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", fake_python(tmp_path, "echo no such library >&2; exit 3"))
    engine = Engine(tmp_path / "scratch", threads=1, limits=Limits(20, 5))
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
    engine = Engine(tmp_path / "scratch", threads=1, limits=Limits(20, 5), quick_kernels=quick)
    with pytest.raises(EngineFailed, match=f"oneDNN {told}"):
        await engine.start()


async def test_an_engine_that_nobody_watches_can_be_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    monkeypatch.setattr(sys, "executable", fake_python(tmp_path, "exec sleep 100"))
    monkeypatch.setattr(process, "_resident_bytes", lambda pid: looks.append(pid) or 0)
    engine = Engine(tmp_path / "scratch", threads=1, limits=Limits(20, 5))
    assert engine.unwatched_seconds == 0.0
    starting = asyncio.create_task(engine.start())
    await eventually(lambda: len(looks) > 2)
    assert engine.unwatched_seconds < 1.5
    monkeypatch.setattr(process, "_resident_bytes", lambda pid: 1 // 0)
    await eventually(lambda: engine.unwatched_seconds > 1.5)
    await engine.stop(grace_seconds=0)
    assert engine.unwatched_seconds == 0.0
    with pytest.raises(EngineFailed):
        await starting


async def test_an_engine_that_hangs_at_its_start_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", fake_python(tmp_path, "exec sleep 100"))
    engine = Engine(tmp_path / "scratch", threads=1, limits=Limits(0.3, 5))
    with pytest.raises(EngineFailed, match=r"it got no further for 0\.3 s"):
        await engine.start()
    assert engine.pid is not None
    assert not psutil.pid_exists(engine.pid)


@pytest.mark.parametrize("module", ["sitecustomize", "keras"])
async def test_an_engine_that_hangs_in_an_import_is_ended(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its first sign of life, and also while it sends one every second."""
    (tmp_path / f"{module}.py").write_text("import time\ntime.sleep(1e6)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path.cwd()}")
    engine = Engine(tmp_path / "scratch", threads=1, limits=Limits(2, 5))
    with pytest.raises(EngineFailed, match="it got no further for 2 s and was killed"):
        await asyncio.wait_for(engine.start(), 20)


async def test_an_engine_that_is_slow_in_an_import_is_not_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It uses a tenth of a core, for three times as long as an engine without progress may take."""
    script = (
        "import time\nend = time.time() + 6\nwhile time.time() < end:\n    begun = time.process_time()\n"
        "    while time.process_time() < begun + 0.02: pass\n    time.sleep(0.2)\nraise SystemExit('came to its end')\n"
    )
    (tmp_path / "keras.py").write_text(script)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path.cwd()}")
    engine = Engine(tmp_path / "scratch", threads=1, limits=Limits(2, 5))
    with pytest.raises(EngineFailed, match="came to its end"):
        await engine.start()


async def test_an_engine_that_is_to_stop_has_more_time_while_it_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {}
    for script in ("exec sleep 100", "while :; do :; done"):
        monkeypatch.setattr(sys, "executable", fake_python(tmp_path, script))
        engine = Engine(tmp_path / "scratch", threads=1, limits=Limits(30, 5))
        starting = asyncio.create_task(engine.start())
        await eventually(lambda engine=engine: engine.pid is not None)  # type: ignore[misc]
        begun = time.monotonic()
        await engine.stuck(limit_seconds=0.5, bound_seconds=3.0)
        seconds[script] = time.monotonic() - begun
        await engine.stop(grace_seconds=0)
        with pytest.raises(EngineFailed):
            await starting
    assert 0.5 < seconds["exec sleep 100"] < 2.5
    assert 3.0 <= seconds["while :; do :; done"] < 6.0


async def test_a_program_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    engine = Engine(tmp_path / "scratch", threads=1, limits=Limits(5, 5))
    with pytest.raises(EngineFailed, match="did not start"):
        await engine.start()
    await engine.stop()


async def test_an_engine_that_sends_nonsense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "executable", fake_python(tmp_path, r'eval "printf \"\377\377\377\377\" >&$4"; exec sleep 100')
    )
    engine = Engine(tmp_path / "scratch", threads=1, limits=Limits(1, 5))
    with pytest.raises(EngineFailed, match="did not start"):
        await engine.start()


@pytest.mark.tensorflow
async def test_killed_in_a_task(tmp_path: Path) -> None:
    engine, running = await _in_a_task(tmp_path, silence_seconds=20)
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(EngineFailed, match="was ended by SIGKILL, as Linux does when memory runs out") as died:
        await asyncio.wait_for(running, 10)
    assert "last words" not in died.value.message  # the lines that TensorFlow always prints are left out
    assert (await engine.wait_dead()).retryable
    assert not engine.alive
    with pytest.raises(EngineFailed):
        await engine.infer("r", [(from_numpy("x", np.zeros((1, 8), np.float32)),)])
    await engine.stop()


@pytest.mark.tensorflow
async def test_frozen_in_a_task(tmp_path: Path) -> None:
    """A short freeze does no harm. A long one ends it."""
    told: list[int] = []
    engine, running = await _in_a_task(tmp_path, silence_seconds=4, told=told)
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGSTOP)
    await asyncio.sleep(2.5)
    before = len(told)
    os.kill(engine.pid, signal.SIGCONT)
    await eventually(lambda: len(told) > before)
    await asyncio.sleep(2)
    assert engine.alive
    os.kill(engine.pid, signal.SIGSTOP)
    with pytest.raises(EngineFailed, match="was silent for 4 s and was killed"):
        await asyncio.wait_for(running, 15)
    assert not psutil.pid_exists(engine.pid)
    await engine.stop()


@pytest.mark.tensorflow
async def test_a_model_that_hangs_when_it_is_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with allowing.own_code() as own:
        files = Files(tmp_path / "blobs")
        task = training(files.model(allowing.dense(own.Sleeper())), files.arrays(1, x=allowing.X, y=allowing.Y))
        monkeypatch.setenv("OWN_CODE_SLEEPS", "1")
        engine = Engine(tmp_path / "scratch", threads=1, limits=Limits(8, 20), allow_code=["own_code"])
        await engine.start()
        with pytest.raises(EngineFailed, match="got no further for 8 s and was killed"):
            await asyncio.wait_for(engine.run_task("job", task, files.paths, lambda done, metrics: None), 60)
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
        "from node.engine.watch import Limits\n"
        "async def main():\n"
        f"    engine = Engine(Path({str(tmp_path)!r}), threads=1, limits=Limits(60, 20))\n"
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


async def _in_a_task(
    folder: Path, *, silence_seconds: float, told: list[int] | None = None
) -> tuple[Engine, asyncio.Task[object]]:
    """An engine with a training task that does not end by itself; `told` gets its progress."""
    files = Files(folder / "blobs")
    x, y = blobs(64)
    task = training(files.model(dense()), files.arrays(1, x=x, y=y), samples=10**9, seconds=1000)
    engine = Engine(folder / "scratch", threads=1, limits=Limits(60, silence_seconds))
    await engine.start()
    progress: list[int] = [] if told is None else told
    running: asyncio.Task[object] = asyncio.create_task(
        engine.run_task("job", task, files.paths, lambda done, metrics: progress.append(done)), name="training"
    )
    await eventually(lambda: progress, 60)
    return engine, running
