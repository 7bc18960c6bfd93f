"""Served models: against MLServer, Ray Serve, LitServe and BentoML, against bare TensorFlow, and while a version is replaced.

1, 8 and 32 closed-loop clients ask the small model (64-128-10), in one process beside the server (see clients.py). Servers
and clients share all cores, and run in turn. Over HTTP, all servers get the same JSON. Over MQTT, the clients are tasks of
one `AsyncClient`; another row has as many connections. How soon a single client has its answer is measured separately, one
second at each server in turn, so that a slow minute of the machine affects all. `--only NAME` runs what one check needs.
`--quick` runs only our own server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import load
import numpy as np
import peers
from clients import Tally, ask_in_turn, over_http, over_mqtt, tally
from latency import Echo, small_model
from report import OtherLoad, Report, percentiles

from potluck.client import AsyncClient, Client
from potluck.lifecycle import die_with_parent
from potluck.local_cluster import LocalCluster

CLIENTS = (1, 8, 32)
BATCH = 32
BATCH_SECONDS = 0.001
"""How long the other servers' batches wait for more requests."""
TURN_SECONDS = 1.0
SIZE = 128


class Lab:
    """The models of all parts, and how long to measure; `quick` makes all of it short."""

    def __init__(self, folder: Path, quick: bool, turns: int = 2) -> None:
        self.folder = folder
        self.quick = quick
        self.seconds = 1.5 if quick else 5.0
        self.turns = 1 if quick else turns
        self.rivals: tuple[str, ...] = ("mlserver", "ray", "litserve", "bentoml")
        """The servers that `throughput` measures beside ours."""
        self.row = np.random.default_rng(0).random((1, 64), np.float32)
        self.body = folder / "body.json"
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, 64], "data": self.row.ravel().tolist()}
        self.body.write_text(json.dumps({"inputs": [tensor]}))
        self.rows = folder / "rows.json"
        """The same body for a server that takes arrays by the name of an argument."""
        self.rows.write_text(json.dumps({"inputs": self.row.tolist()}))

    def mlp(self, version: int = 1) -> Path:
        """A small model; it gets other weights each time."""
        path = self.folder / f"mlp-{version}.keras"
        return path if path.exists() else small_model(path)

    def cnn(self) -> Path:
        """The demo's network: 12.9 million weights at 128 x 128."""
        import keras

        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((SIZE, SIZE, 3))])
        for filters in (32, 64, 128):
            model.add(keras.layers.Conv2D(filters, 3, activation="relu"))
            model.add(keras.layers.MaxPooling2D(2))
        model.add(keras.layers.Flatten())
        model.add(keras.layers.Dense(512, activation="relu"))
        model.add(keras.layers.Dense(10, activation="softmax"))
        model.save(path := self.folder / "cnn.keras")
        return path

    def clients(self, *arguments: object) -> dict[str, Any]:
        """The measurements of clients in their own process."""
        command = [sys.executable, str(Path(__file__).with_name("clients.py")), *map(str, arguments)]
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, timeout=300, preexec_fn=die_with_parent()
        )
        found: dict[str, Any] = json.loads(done.stdout)
        if found["failures"]:
            raise RuntimeError(f"{found['failures']} requests failed: {found['failure']}")
        return found


Measured = dict[int, dict[str, Any]]
"""Measurements by number of clients."""


def throughput(lab: Lab, report: Report) -> None:
    """The small model on every server, in turns."""
    found: dict[str, list[Measured]] = {}
    for turn in range(lab.turns):
        for name, measured in _ours(lab, turn).items():
            found.setdefault(name, []).append(measured)
        if not lab.quick:
            for name, measured in _others(lab, turn).items():
                found.setdefault(name, []).append(measured)
    median: dict[str, dict[int, dict[str, float]]] = {}
    for name, turns in found.items():
        for clients in turns[0]:
            figures = ("per_second", "p50_ms", "p99_ms")
            middle = {key: statistics.median(turn[clients][key] for turn in turns) for key in figures}
            median.setdefault(name, {})[clients] = {key: round(value, 3) for key, value in middle.items()}
            label = f"{name}, {clients} client{'s' if clients > 1 else ''}"
            report.rows.append(
                (label, f"{middle['per_second']:.0f}/s", f"{middle['p50_ms']:.2f}", f"{middle['p99_ms']:.2f}")
            )
    report.figures["throughput"] = median
    if lab.quick:
        report.rows.append(("the others are left out of a short run", "", "", ""))
        return
    rates = {name: figures[32]["per_second"] for name, figures in median.items() if 32 in figures}
    mqtt, http = rates["ours, MQTT"], rates["ours, HTTP"]
    bounds = {
        "mqtt_over_mlserver": ("MLServer", mqtt, 1.5),
        "mqtt_over_ray": ("Ray Serve", mqtt, 5.0),
        "http_over_mlserver": ("MLServer", http, 1.0),
        "over_litserve": ("LitServe", min(mqtt, http), 1.5),
        "over_bentoml": ("BentoML", min(mqtt, http), 1.5),
    }
    for check, (name, rate, bound) in bounds.items():
        if name in rates:
            report.check(check, rate / rates[name], at_least=bound)


def alone(lab: Lab, report: Report) -> None:
    """One client of the small model, one second at each server in turn.

    The check is against MLServer set up for many clients, as in `throughput`. A second ratio is against MLServer without batching,
    which answers one client sooner and many clients later.
    """
    body, model, folder = lab.body.read_bytes(), lab.mlp(), lab.folder / "alone"
    with ExitStack() as stack:
        cluster = stack.enter_context(LocalCluster(folder, cluster="alone", nodes=1, discovery=False))
        broker = f"{cluster.broker_host}:{cluster.broker_port}"
        with Client(broker, cluster=cluster.cluster) as client:
            client.register(model, "mlp")
            client.deploy("mlp", replicas=1).wait(timeout=120)
        url = f"{cluster.http_url}/v2/models/mlp/infer"
        asked: dict[str, Callable[[], Coroutine[Any, Any, Tally]]] = {
            "ours, MQTT": lambda: over_mqtt(broker, cluster.cluster, "mlp", 1, TURN_SECONDS, 1),
            "ours, HTTP": lambda: over_http(url, body, 1, TURN_SECONDS),
        }
        if not lab.quick:
            for name, seconds in (("MLServer", BATCH_SECONDS), ("MLServer, not batching", None)):
                peer = stack.enter_context(peers.MLServer(name, folder / name, model, body, seconds))
                asked[name] = lambda peer=peer: over_http(peer.url, body, 1, TURN_SECONDS)  # type: ignore[misc]
        found: dict[str, list[float]] = {name: [] for name in asked}
        for _ in range(2 if lab.quick else 6 * lab.turns):
            for name, ask in asked.items():
                into = asyncio.run(ask())
                if into.failures:
                    raise RuntimeError(f"{name}: {len(into.failures)} requests failed: {into.failures[0]}")
                found[name] += into.seconds
    figures = report.figures["alone"] = {name: percentiles(seconds) for name, seconds in found.items()}
    for name, figure in figures.items():
        report.rows.append((f"{name}, alone", "", f"{figure['p50_ms']:.2f}", f"{figure['p99_ms']:.2f}"))
    if not lab.quick:
        ours, batching, plain = (
            figures[name]["p50_ms"] for name in ("ours, MQTT", "MLServer", "MLServer, not batching")
        )
        report.figures["latency_over_mlserver_not_batching"] = round(ours / plain, 3)
        report.check("latency_over_mlserver", ours / batching, at_most=1.0)


def _ours(lab: Lab, turn: int) -> dict[str, Measured]:
    with LocalCluster(lab.folder / f"ours-{turn}", cluster="serving", nodes=1, discovery=False) as cluster:
        broker = f"{cluster.broker_host}:{cluster.broker_port}"
        with Client(broker, cluster=cluster.cluster) as client:
            client.register(lab.mlp(), "mlp")
            client.deploy("mlp", replicas=1).wait(timeout=120)
            expected = client.infer("mlp", lab.row)
        url = f"{cluster.http_url}/v2/models/mlp/infer"
        answer: Any = peers.ask(url, lab.body.read_bytes())
        np.testing.assert_allclose(answer["outputs"][0]["data"], np.ravel(expected), rtol=1e-5)
        over_mqtt = ("mqtt", broker, cluster.cluster, "mlp")
        found = {
            "ours, MQTT": {n: lab.clients(*over_mqtt, n, lab.seconds) for n in CLIENTS},
            "ours, HTTP": {n: lab.clients("http", url, lab.body, n, lab.seconds) for n in CLIENTS},
            "ours, MQTT, as many connections": {32: lab.clients(*over_mqtt, 32, lab.seconds, 32)},
        }
        found["raw MQTT echo"] = {1: asyncio.run(_echo(cluster, lab))}
        return found


async def _echo(cluster: LocalCluster, lab: Lab) -> dict[str, Any]:
    async with Echo(cluster.broker_host, cluster.broker_port, 0, lab.row.tobytes() + b"x" * 150) as echo:
        into = tally(lab.seconds)
        await ask_in_turn(echo.ask, into)
    return into.told()


def _others(lab: Lab, turn: int) -> dict[str, Measured]:
    found: dict[str, Measured] = {}
    body, model, folder = lab.body.read_bytes(), lab.mlp(), lab.folder / f"others-{turn}"
    servers: dict[str, list[tuple[peers.Peer, tuple[int, ...]]]] = {
        "mlserver": [
            (peers.MLServer("MLServer", folder / "mlserver", model, body, BATCH_SECONDS), CLIENTS),
            (peers.MLServer("MLServer, not batching", folder / "mlserver-plain", model, body, None), (1, 32)),
        ],
        "ray": [(peers.RayServe("Ray Serve", folder / "ray", model, body, BATCH_SECONDS), CLIENTS)],
        "litserve": [(peers.LitServe("LitServe", folder / "litserve", model, body, BATCH_SECONDS), CLIENTS)],
        "bentoml": [(peers.BentoML("BentoML", folder / "bentoml", model, lab.rows.read_bytes()), CLIENTS)],
    }
    for peer, clients in (one for name in lab.rivals for one in servers[name]):
        asked = lab.rows if isinstance(peer, peers.BentoML) else lab.body
        with peer:
            found[peer.name] = {n: lab.clients("http", peer.url, asked, n, lab.seconds) for n in clients}
    return found


def cnn(lab: Lab, report: Report) -> None:
    """The demo's network on two nodes, one core each, and in two bare processes on the same cores, in turns.

    Clients are tasks of one `AsyncClient`, three for each node, and ask for 32 images at a time: an array, as `infer` takes it.
    """
    model = lab.cnn()
    cores = sorted(os.sched_getaffinity(0))[:2]
    rates: dict[str, list[float]] = {"served": [], "bare": []}
    with LocalCluster(
        lab.folder / "cnn", cluster="cnn", nodes=2, discovery=False, cores=cores, environment={"POTLUCK_THREADS": "1"}
    ) as cluster:
        with Client(f"{cluster.broker_host}:{cluster.broker_port}", cluster=cluster.cluster) as client:
            client.register(model, "cnn")
            client.deploy("cnn", replicas=2).wait(timeout=120)
        others = OtherLoad()
        for _ in range(1 if lab.quick else 3 * lab.turns + 1):
            rates["served"].append(asyncio.run(_batches(cluster, lab)))
            rates["bare"].append(_bare(model, cores, lab.seconds))
        with_onednn = _bare(model, cores, lab.seconds, TF_ENABLE_ONEDNN_OPTS="1")
        busy_elsewhere = others.cores()
    for name, label in (("served", "2 nodes, a core each"), ("bare", "2 bare TensorFlow processes, a core each")):
        turns = " ".join(f"{rate:.0f}" for rate in rates[name])
        report.rows.append(
            (f"network at 128x128, {label}", f"{statistics.median(rates[name]):.0f} images/s", turns, "")
        )
    report.figures["cnn_images_per_second"] = {
        name: round(statistics.median(found), 1) for name, found in rates.items()
    }
    report.figures["cnn_busy_elsewhere_cores"] = round(busy_elsewhere, 2)
    ratio = statistics.median(ours / bare for ours, bare in zip(rates["served"], rates["bare"], strict=True))
    report.check("cnn_over_bare", ratio, at_least=0.95)
    report.figures["cnn_over_bare_with_onednn"] = round(rates["served"][-1] / with_onednn, 3)


async def _batches(cluster: LocalCluster, lab: Lab) -> float:
    """Images per second."""
    rng = np.random.default_rng(1)
    async with AsyncClient(f"{cluster.broker_host}:{cluster.broker_port}", cluster=cluster.cluster) as client:
        into = tally(lab.seconds)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(6):
                images = rng.random((BATCH, SIZE, SIZE, 3), np.float32)

                def ask(images: Any = images) -> Any:
                    images[0, 0, 0, 0] = rng.random()  # never the same twice: a store does not send again what it knows
                    return client.infer("cnn", images)

                tasks.create_task(ask_in_turn(ask, into))
    if into.failures:
        raise RuntimeError(f"{len(into.failures)} requests failed: {into.failures[0]}")
    return BATCH * len(into.seconds) / (into.end - into.begin)


def _bare(model: Path, cores: list[int], seconds: float, **environment: str) -> float:
    """Images per second of two processes together: TensorFlow by default, or set up by `environment`."""
    script = str(Path(__file__).with_name("bare.py"))
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, script, str(model), str(core), str(BATCH), str(seconds)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, preexec_fn=die_with_parent(),
                    env=os.environ | environment,
                )
            )
            for core in cores
        ]  # fmt: skip
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
        return sum(float(process.stdout.readline()) for process in processes if process.stdout is not None)


def swap(lab: Lab, report: Report) -> None:
    """A new version replaces the old one while eight clients ask."""
    with LocalCluster(lab.folder / "swap", cluster="swap", nodes=2, discovery=False) as cluster:
        asyncio.run(_swap(cluster, lab, report))


async def _swap(cluster: LocalCluster, lab: Lab, report: Report) -> None:
    address = f"{cluster.broker_host}:{cluster.broker_port}"
    async with (
        AsyncClient(address, cluster=cluster.cluster) as client,
        AsyncClient(address, cluster=cluster.cluster) as other,
    ):
        await client.register(lab.mlp(), "mlp")
        await (await client.deploy("mlp", replicas=2)).wait(timeout=120)
        into = tally(600.0)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(8):
                tasks.create_task(ask_in_turn(lambda: client.infer("mlp", lab.row), into))
            await asyncio.sleep(1.0 + lab.seconds)
            began = time.perf_counter()
            await other.register(lab.mlp(2), "mlp")
            await (await other.deploy("mlp", replicas=2)).wait(timeout=120)
            swapped = time.perf_counter()
            await asyncio.sleep(lab.seconds)
            if not lab.quick:
                await eventually_alone(other)
            into.end = time.perf_counter()
    recovery, late_again = recovery_seconds(into, began, swapped)
    report.rows.append(
        (
            f"a version replaced under load: {len(into.seconds)} requests",
            f"{len(into.failures)} failed",
            f"ready after {swapped - began:.1f} s",
            f"p99 back after {recovery:.1f} s, late again in {late_again} windows of {WINDOW_SECONDS:g} s",
        )
    )
    report.figures["swap"] = {
        "requests": len(into.seconds),
        "failures": into.failures[:3],
        "recovery_seconds": recovery,
        "late_again": late_again,
    }
    report.check("swap_failures", len(into.failures), at_most=0)
    report.check("swap_recovery_seconds", recovery, at_most=2.0)


async def eventually_alone(client: AsyncClient) -> None:
    """Wait until the old version, which is kept for half a minute, is gone."""
    async with asyncio.timeout(60):
        while len(await client.deployments()) > 1:  # noqa: ASYNC110 - asked for over the bus
            await asyncio.sleep(1.0)


WINDOW_SECONDS = 0.5
STEADY_WINDOWS = 4


def recovery_seconds(into: Tally, before: float, after: float) -> tuple[float, int]:
    """(How long after `after` the p99 was back for at least two seconds, how many later windows were slow again).

    It is back when it is below twice the highest p99 before `before`. A window has half a second. Later windows may be slow because
    of the machine or of other work.
    """
    usual = max(_percentiles_99(into, into.begin, before).values())
    late = [p99 > 2 * usual for _, p99 in sorted(_percentiles_99(into, after, into.end).items())]
    back = next((at for at in range(len(late)) if not any(late[at : at + STEADY_WINDOWS])), len(late))
    return back * WINDOW_SECONDS, sum(late[back:])


def _percentiles_99(into: Tally, start: float, stop: float) -> dict[float, float]:
    """The 99th percentiles by the end of each window."""
    windows: dict[float, list[float]] = {}
    for finished, seconds in zip(into.finished, into.seconds, strict=True):
        if start <= finished < stop:
            end = start + WINDOW_SECONDS * (1 + int((finished - start) / WINDOW_SECONDS))
            windows.setdefault(end, []).append(seconds)
    return {end: sorted(found)[len(found) * 99 // 100] for end, found in windows.items()}


def under_load(part: Callable[[bool, Report], None]) -> Callable[[Lab, Report], None]:
    """A part of load.py, which has its own model and clusters."""
    return lambda lab, report: part(lab.quick, report)


PARTS: dict[Callable[[Lab, Report], None], tuple[str, ...]] = {
    alone: ("latency_over_mlserver",),
    throughput: ("mqtt_over_mlserver", "mqtt_over_ray", "http_over_mlserver", "over_litserve", "over_bentoml"),
    cnn: ("cnn_over_bare",),
    swap: ("swap_failures", "swap_recovery_seconds"),
    **{under_load(part): checks for part, checks in load.PARTS.items()},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short run of only our own server, to see that it works")
    names = [name for checks in PARTS.values() for name in checks]
    parser.add_argument("--only", choices=names, help="run only what this check needs")
    parser.add_argument("--turns", type=int, default=2, help="how often everybody is measured")
    arguments = parser.parse_args()
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    parts = [part for part, checks in PARTS.items() if arguments.only is None or arguments.only in checks]
    report = Report("serving", columns=("", "rate", "p50 ms", "p99 ms"))
    with tempfile.TemporaryDirectory(prefix="potluck-bench-") as folder:
        lab = Lab(Path(folder), arguments.quick, arguments.turns)
        if throughput in parts and arguments.only is not None:
            lab.rivals = tuple(name for name in lab.rivals if arguments.only.endswith(name))
        if throughput in parts and not arguments.quick:
            peers.install(*lab.rivals)
        if alone in parts and not arguments.quick:
            peers.install("mlserver")
        for part in parts:
            part(lab, report)
    report.show()


if __name__ == "__main__":
    main()
