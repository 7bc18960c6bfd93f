"""`potluck demo`: starts a broker, a coordinator and three nodes here; trains, kills a node, evaluates, deploys and asks a model."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from potluck import extras
from potluck.cli import output
from potluck.client import Client, Job
from potluck.errors import NotFound, PotluckError, TimedOut
from potluck.local_cluster import LocalCluster
from potluck.net.http_client import post_json
from potluck.wire.jobs import JobProgress
from potluck.wire.questions import NodeInfo
from potluck.wording import counted

if TYPE_CHECKING:
    import numpy as np

IMAGE_SIZE = 32
EPOCHS = 20
NODES = 3
BESIDE_COLUMNS = 62
"""Columns of a progress line for the bar, the share and the time."""
WANTED_ACCURACY = 0.97
ANSWER_SECONDS = 60.0

console = Console()


def demo(
    epochs: Annotated[int, typer.Option(min=1, help="Epochs to train.")] = EPOCHS,
    keep: Annotated[Path | None, typer.Option(help="Keep the data, the model and the logs in this folder.")] = None,
) -> None:
    """Try potluck on this machine: discover, train, survive a kill, evaluate, deploy, ask."""
    started = time.monotonic()
    with ExitStack() as stack, _terminated_as_interrupt():
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="potluck-demo-")))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            Demo(folder, epochs, stack).run()
        except KeyboardInterrupt:
            console.print("\n[yellow]Interrupted: stopping the cluster.[/]")
            raise typer.Exit(130) from None
        finally:
            with console.status("stopping the cluster"):
                stack.close()
    where = f"kept in {keep}" if keep else "removed"
    console.print(
        f"[bold green]Done[/] in {time.monotonic() - started:.0f} s: every process has ended, the folder is {where}."
    )


class Demo:
    """The steps in order; later steps use what earlier steps found out."""

    def __init__(self, folder: Path, epochs: int, stack: ExitStack) -> None:
        self.folder = folder
        self.epochs = epochs
        self.stack = stack

    def run(self) -> None:
        _require_packages()
        self._start()
        self._show_nodes()
        self._write_digits()
        self._train()
        self._evaluate()
        self._deploy()
        self._ask()

    def _start(self) -> None:
        _title(1, "Start a broker, a coordinator and three nodes; none is told an address")
        cluster = f"demo-{uuid.uuid4().hex[:8]}"
        with console.status("starting the processes, and looking for them by mDNS"):
            self.cluster = self.stack.enter_context(LocalCluster(self.folder / "cluster", cluster=cluster, nodes=NODES))
            self.client = self.stack.enter_context(Client(cluster=cluster))
            _wait(lambda: len(self._measured()) == NODES, 60, f"{NODES} nodes to join", self.cluster)

    def _measured(self) -> list[NodeInfo]:
        return [node for node in self.client.nodes() if node.state == "online" and node.capacity.gflops > 0]

    def _show_nodes(self) -> None:
        console.print(output.nodes_table(self.client.nodes()), crop=False)

    def _write_digits(self) -> None:
        _title(2, "Write 1,797 real handwritten digits as PNG files, one folder per class")
        self.train_folder, self.test_folder = write_digits(self.folder)
        for folder in (self.train_folder, self.test_folder):
            count = sum(1 for _ in folder.glob("*/*.png"))
            console.print(
                f"  {folder.name}/0 ... {folder.name}/9   {counted(count, 'image'):>12} of {IMAGE_SIZE}x{IMAGE_SIZE}"
            )

    def _train(self) -> None:
        _title(3, f"Train a CNN on all nodes for {counted(self.epochs, 'epoch')}, and kill one of them half-way")
        with console.status("building the model, and packing the images into content-addressed shards"):
            self.model = build_model(IMAGE_SIZE, 10)
            self.job = self.client.train(
                self.model,
                self.train_folder,
                validation=self.test_folder,
                epochs=self.epochs,
                batch_size=32,
                image=(IMAGE_SIZE, IMAGE_SIZE),
                name="digits",
                monitor=None,  # the last epoch's model: the line below shows that epoch's metrics
            )
        console.print(f"  model of {counted(self.model.count_params(), 'weight')}, job {self.job.id}")
        victim = self.cluster.nodes[-1]
        killed = False
        for progress in _shown(self.job):
            if not killed and progress.total and progress.done >= progress.total / 2:
                victim.kill()
                killed = True
                console.print(
                    f"  [bold red]SIGKILL[/] to node {victim.node_id} at epoch {progress.epoch}: the others go on"
                )
        self.job.wait(timeout=30)
        last = {name: values[-1] for name, values in self.job.history.items()}
        shown = "  ".join(f"{name} {value:.4f}" for name, value in last.items())
        console.print(
            f"  all {counted(self.epochs, 'epoch')} done{' without it' if killed else ''}: {shown}", soft_wrap=True
        )

    def _evaluate(self) -> None:
        _title(4, "Evaluate on the nodes that are left")
        job = self.client.evaluate("digits:1", self.test_folder, image=(IMAGE_SIZE, IMAGE_SIZE))
        for _ in _shown(job):
            pass
        job.wait(timeout=30)
        evaluation = job.evaluation
        console.print(output.evaluation_report(evaluation))
        accuracy = evaluation.metrics["accuracy"]
        if accuracy < WANTED_ACCURACY:
            raise PotluckError(
                f"the model reached an accuracy of {accuracy:.4f}; with {EPOCHS} epochs at least {WANTED_ACCURACY} is "
                f"expected: was it trained for fewer (--epochs {self.epochs})?"
            )

    def _deploy(self) -> None:
        _title(5, "Deploy digits:1 on two nodes")
        with console.status("loading the model on two nodes"):
            self.client.deploy("digits:1", replicas=2).wait(timeout=120)
        console.print(output.deployments_table(self.client.deployments()), crop=False)

    def _ask(self) -> None:
        _title(6, "Ask it in three ways")
        pictures, truth = _samples(self.test_folder)
        scores = self.client.infer("digits", pictures)
        assert not isinstance(scores, dict)
        _answers("Python client", "client.infer('digits', x)", scores.argmax(axis=1).tolist(), truth)

        one = pictures[:1]
        tensor = {"name": _input_name(self.client), "datatype": "FP32", "shape": list(one.shape)}
        request = {"inputs": [tensor | {"data": one.ravel().round(4).tolist()}]}
        command = [sys.executable, "-I", str(Path(__file__).with_name("plain_mqtt.py"))]
        address = [self.cluster.broker_host, str(self.cluster.broker_port), self.client.cluster, "digits"]
        asked = subprocess.run(
            [*command, *address], input=json.dumps(request), capture_output=True, text=True, timeout=60, check=False
        )
        if asked.returncode:
            raise PotluckError(f"asking by plain MQTT failed: {asked.stdout or asked.stderr}")
        _answers("MQTT, JSON", "publish models/digits/infer", [_best(json.loads(asked.stdout))], truth[:1])

        url = f"{self.cluster.http_url}/v2/models/digits/infer"
        answer = asyncio.run(post_json(url, request, self.client.credentials, ANSWER_SECONDS))
        _answers("HTTP", "POST /v2/models/digits/infer", [_best(answer)], truth[:1])


def build_model(size: int, classes: int) -> Any:
    """The demo's network, compiled: Conv 32, 64, 128 with max-pooling, Dense 512, softmax."""
    with _quiet_stderr():
        import keras  # here, not above: the command line must not wait for TensorFlow

    model = keras.Sequential([keras.Input((size, size, 3))])
    for filters in (32, 64, 128):
        model.add(keras.layers.Conv2D(filters, 3, activation="relu"))
        model.add(keras.layers.MaxPooling2D(2))
    model.add(keras.layers.Flatten())
    model.add(keras.layers.Dense(512, activation="relu"))
    model.add(keras.layers.Dense(classes, activation="softmax"))
    model.compile(optimizer="adam", loss="categorical_crossentropy", metrics=["accuracy"])
    return model


def write_digits(folder: Path) -> tuple[Path, Path]:
    """scikit-learn's `load_digits` (1,797 images of 8x8, 17 grey levels) as PNG files; every fifth one goes to `test`."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        target = folder / ("test" if number % 5 == 4 else "train") / str(label) / f"{number:04}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray((pixels * (255 / 16)).round().astype("uint8"))
        small.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).save(target)
    return folder / "train", folder / "test"


def _shown(job: Job) -> Iterator[JobProgress]:
    """Pass the job's progress on, and draw it as a live bar."""
    columns = (TextColumn("  {task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rest]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("waiting", total=None, rest="")
        for progress in job.progress():
            epoch = f"epoch {progress.epoch}/{progress.epochs}" if progress.epochs else "items"
            speed = (
                f"{progress.items_per_second:,.0f}/s on {counted(len(progress.nodes) + progress.nodes_more, 'node')}"
            )
            pairs = [f"{name} {value:.3f}" for name, value in progress.metrics.items()]
            described = f"{epoch}  {progress.message}"
            rest = _fitting([speed, *pairs], console.width - len(described) - BESIDE_COLUMNS)
            bar.update(task, completed=progress.done, total=progress.total or None, description=described, rest=rest)
            yield progress


def _fitting(parts: Sequence[str], room: int) -> str:
    """As many of the first parts as fit into `room`: a metric broken over two lines cannot be read."""
    texts = ["  ".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((text for text in texts if len(text) <= room), "")


def _samples(folder: Path) -> tuple[np.ndarray[Any, Any], list[int]]:
    """The first test image of each class as the model's input: float32 in 0..1."""
    import numpy as np
    from PIL import Image

    pictures, truth = [], []
    for label in range(10):
        file = sorted((folder / str(label)).iterdir())[0]
        pictures.append(np.asarray(Image.open(file).convert("RGB"), dtype=np.float32) / 255)
        truth.append(label)
    return np.stack(pictures), truth


def _answers(way: str, how: str, said: list[int], truth: list[int]) -> None:
    right = sum(a == b for a, b in zip(said, truth, strict=True))
    console.print(
        f"  {way:<14} [dim]{how:<29}[/] {''.join(map(str, said)):<10} {right} of {len(truth)} right", highlight=False
    )


def _best(answer: dict[str, Any]) -> int:
    data = answer["outputs"][0]["data"]
    return int(max(range(len(data)), key=data.__getitem__))


def _input_name(client: Client) -> str:
    for info in client.models():
        if info.name == "digits" and info.signature is not None:
            return info.signature.inputs[0].name
    raise NotFound("the model digits has no signature: was it deployed?")


def _title(number: int, text: str) -> None:
    console.print()
    console.print(Panel.fit(f"[bold]{number}[/]  {text}", border_style="cyan"))


def _wait(check: Callable[[], bool], seconds: float, what: str, cluster: LocalCluster) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        cluster.check()
        if time.monotonic() > deadline:
            raise TimedOut(f"waited {seconds:.0f} s for {what}; the logs end:\n{cluster.log_tails()}")
        time.sleep(0.1)


def _require_packages() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("tensorflow", "keras", "sklearn") if find_spec(name) is None]
    if missing:
        raise NotFound(f"the demo needs {', '.join(missing)}: {extras.install('engine', 'broker', 'demo')}")


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Hide TensorFlow's messages at import: C++ prints them before any log level takes effect."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def _terminated_as_interrupt() -> Iterator[None]:
    """SIGTERM ends the demo like Ctrl-C: in order."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
