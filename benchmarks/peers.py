"""Other model servers, each in its own environment below `.cache/`, made when first needed (about 2 GB each).

Each is set up as its documentation advises for throughput on one machine: MLServer in its own process with adaptive batching
(its parallel workers do not start with the current uvloop), Ray Serve with `serve.batch` and its throughput settings, LitServe
with batching and its fast queue, BentoML with an adaptive batch. One process of each computes, like one node of ours.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from potluck.errors import TimedOut, Unavailable
from potluck.lifecycle import die_with_parent

TENSORFLOW = ("tensorflow-cpu==2.21.0", "keras==3.15.1")
PACKAGES = {
    "mlserver": ("mlserver==1.7.1", *TENSORFLOW),
    "ray": ("ray[serve]==2.60.0", *TENSORFLOW),
    "litserve": ("litserve==0.2.19", "uvloop", *TENSORFLOW),
    "bentoml": ("bentoml==1.4.40", *TENSORFLOW),
    "dask": ("distributed==2026.8.0",),
}
"""Packages of each environment; they cannot be installed together."""
FOLDER = Path(__file__).parents[1] / ".cache" / "peers"
APPS = Path(__file__).with_name("peer_apps")
READY_SECONDS = 120.0


def install(*names: str) -> None:
    """Make the environments for these, if they are missing. Raises CalledProcessError."""
    for name in names:
        packages = PACKAGES[name]
        folder, stamp = FOLDER / name, FOLDER / name / "installed"
        if stamp.is_file() and stamp.read_text().split() == list(packages):
            continue
        print(f"installing {', '.join(packages)} below {folder} (once)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *packages], check=True)
        stamp.write_text("\n".join(packages))


class Peer(ABC):
    """A server of the model at `path`, between `__enter__` and `__exit__`; it takes requests at `url`."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.port = _free_port()
        self.url = ""

    def __enter__(self) -> Peer:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    @abstractmethod
    def _start(self) -> None:
        """Run it, and return when it answers."""

    def _stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        with suppress(ProcessLookupError):  # children that it did not end: LitServe leaves its workers
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _run(self, command: list[str], environment: Mapping[str, str]) -> None:
        with (self.folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=self.folder, stdout=log, stderr=log, stdin=subprocess.PIPE, start_new_session=True,
                env=_environment() | dict(environment), preexec_fn=die_with_parent(),
            )  # fmt: skip

    def _wait(self, body: bytes) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + READY_SECONDS
        while True:
            try:
                ask(self.url, body)
            except OSError:
                if self._process.poll() is not None:
                    raise Unavailable(f"{self.name} ended; its log ends:\n{self.log_tail()}") from None
                if time.monotonic() > deadline:
                    raise TimedOut(f"{self.name} was not ready in {READY_SECONDS:.0f} s:\n{self.log_tail()}") from None
                time.sleep(0.2)
            else:
                return

    def log_tail(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-3000:]


class MLServer(Peer):
    """`batch_seconds` None: without adaptive batching."""

    def __init__(self, name: str, folder: Path, model: Path, body: bytes, batch_seconds: float | None) -> None:
        super().__init__(name, folder)
        self._model = model
        self._body = body
        self._batch_seconds = batch_seconds
        self.url = f"http://127.0.0.1:{self.port}/v2/models/mlp/infer"

    def _start(self) -> None:
        settings = {
            "host": "127.0.0.1", "http_port": self.port, "grpc_port": _free_port(), "metrics_port": _free_port(),
            "parallel_workers": 0, "debug": False,
        }  # fmt: skip
        model = {
            "name": "mlp",
            "implementation": "mlserver_runtime.KerasModel",
            "parameters": {"uri": str(self._model)},
        }
        if self._batch_seconds is not None:
            model |= {"max_batch_size": 32, "max_batch_time": self._batch_seconds}
        (self.folder / "settings.json").write_text(json.dumps(settings))
        (self.folder / "model-settings.json").write_text(json.dumps(model))
        shutil.copy(APPS / "mlserver_runtime.py", self.folder)
        self._run(
            [str(FOLDER / "mlserver" / "bin" / "mlserver"), "start", str(self.folder)], {"PYTHONPATH": str(self.folder)}
        )
        self._wait(self._body)


class RayServe(Peer):
    def __init__(self, name: str, folder: Path, model: Path, body: bytes, batch_seconds: float) -> None:
        super().__init__(name, folder)
        self._model = model
        self._body = body
        self._batch_seconds = batch_seconds
        self.url = f"http://127.0.0.1:{self.port}/"

    def _start(self) -> None:
        python, script = str(FOLDER / "ray" / "bin" / "python"), str(APPS / "ray_app.py")
        command = [python, script, str(self._model), str(self.port), str(self._batch_seconds)]
        self._run(command, {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_USAGE_STATS_ENABLED": "0"})
        self._wait(self._body)

    def _stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # asks it to stop what it started
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            super()._stop()


class LitServe(Peer):
    def __init__(self, name: str, folder: Path, model: Path, body: bytes, batch_seconds: float) -> None:
        super().__init__(name, folder)
        self._model = model
        self._body = body
        self._batch_seconds = batch_seconds
        self.url = f"http://127.0.0.1:{self.port}/predict"

    def _start(self) -> None:
        python, script = str(FOLDER / "litserve" / "bin" / "python"), str(APPS / "lit_app.py")
        self._run([python, script, str(self._model), str(self.port), str(self._batch_seconds)], {})
        self._wait(self._body)


class BentoML(Peer):
    """`body` is its form of JSON: `{"inputs": rows}`."""

    def __init__(self, name: str, folder: Path, model: Path, body: bytes) -> None:
        super().__init__(name, folder)
        self._model = model
        self._body = body
        self.url = f"http://127.0.0.1:{self.port}/predict"

    def _start(self) -> None:
        shutil.copy(APPS / "bento_app.py", self.folder)
        command = [
            str(FOLDER / "bentoml" / "bin" / "bentoml"),
            "serve",
            "bento_app:Mlp",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
        ]
        self._run(
            command, {"MODEL": str(self._model), "PYTHONPATH": str(self.folder), "BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": str(self.folder)}
        )  # fmt: skip
        self._wait(self._body)


def ask(url: str, body: bytes) -> dict[str, object]:
    """Send one request. Raises OSError."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        found: dict[str, object] = json.load(answer)
        return found


def _environment() -> dict[str, str]:
    """Our environment, without variables that would lead their Python to our packages."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "POTLUCK_", "VIRTUAL_"))} | {
        "TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_BACKEND": "tensorflow",
    }  # fmt: skip


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
