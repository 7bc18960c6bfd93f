"""`predict` on two nodes, each pinned to its own core, against one such node, on the same work in the same run.

The work: the demo's network over many images of 64x64, packed once. Each number of nodes has its own cluster on the
same cores. Both clusters stay up, and work in turns, so that a slow minute of the machine affects both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from report import OtherLoad, Report

from potluck.client import Client
from potluck.local_cluster import LocalCluster

SIZE = 64
NODES = (1, 2)


def cnn(path: Path) -> Path:
    """The demo's network at SIZE x SIZE, as a `.keras` file."""
    import keras

    model = keras.Sequential([keras.Input((SIZE, SIZE, 3))])
    for filters in (32, 64, 128):
        model.add(keras.layers.Conv2D(filters, 3, activation="relu"))
        model.add(keras.layers.MaxPooling2D(2))
    model.add(keras.layers.Flatten())
    model.add(keras.layers.Dense(512, activation="relu"))
    model.add(keras.layers.Dense(10, activation="softmax"))
    model.compile(loss="categorical_crossentropy")
    model.save(path)
    return path


class Rig:
    """A cluster of `nodes` nodes, one core each, with the images and the model; its engines are warm."""

    def __init__(self, stack: ExitStack, folder: Path, model: Path, images: np.ndarray, nodes: int) -> None:
        cores = sorted(os.sched_getaffinity(0))[:2]
        cluster = stack.enter_context(
            LocalCluster(
                folder,
                cluster=f"scaling-{nodes}",
                nodes=nodes,
                discovery=False,
                cores=[cores[number % len(cores)] for number in range(nodes)],
                environment={"POTLUCK_THREADS": "1"},
            )
        )
        address = f"{cluster.broker_host}:{cluster.broker_port}"
        self._client = stack.enter_context(Client(address, cluster=cluster.cluster))
        self._items = len(images)
        self._client.add_data({"x": images}, "images")
        self._client.register(model, "cnn")
        self.predict()

    def predict(self) -> tuple[float, np.ndarray]:
        """(items per second from the question to the answer, the answer)."""
        started = time.perf_counter()
        found = self._client.predict("cnn", "images").wait(timeout=600)
        return self._items / (time.perf_counter() - started), found.predictions


def measure(folder: Path, items: int, turns: int, report: Report) -> None:
    model = cnn(folder / "cnn.keras")
    images = np.random.default_rng(0).random((items, SIZE, SIZE, 3), np.float32)
    rates: dict[int, list[float]] = {nodes: [] for nodes in NODES}
    outputs: dict[int, np.ndarray] = {}
    with ExitStack() as stack:
        rigs = {nodes: Rig(stack, folder / str(nodes), model, images, nodes) for nodes in NODES}
        others = OtherLoad()
        for turn in range(turns):
            for nodes in NODES if turn % 2 == 0 else reversed(NODES):
                rate, outputs[nodes] = rigs[nodes].predict()
                rates[nodes].append(rate)
        busy_elsewhere = others.cores()
    np.testing.assert_allclose(outputs[1], outputs[2], rtol=1e-4, atol=1e-6)
    medians = {nodes: statistics.median(found) for nodes, found in rates.items()}
    report.columns = ("predict, the network at 64x64", "images/s", "in turns")
    for nodes in NODES:
        label = f"{nodes} node{'s' if nodes > 1 else ''}, a core each"
        report.rows.append((label, f"{medians[nodes]:.0f}", " ".join(f"{rate:.0f}" for rate in rates[nodes])))
    report.rows.append((f"cores that other programs kept busy meanwhile: {busy_elsewhere:.2f}", "", ""))
    report.figures = {
        "images_per_second": {str(nodes): round(rate, 1) for nodes, rate in medians.items()},
        "busy_elsewhere_cores": round(busy_elsewhere, 2),
    }
    ratio = statistics.median(two / one for one, two in zip(rates[1], rates[2], strict=True))
    report.check("predict_two_nodes", ratio, at_least=1.7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short run, to see that it works")
    arguments = parser.parse_args()
    report = Report("scaling")
    with tempfile.TemporaryDirectory(prefix="potluck-bench-") as folder:
        items, turns = (600, 1) if arguments.quick else (12_000, 3)
        measure(Path(folder), items, turns, report)
    report.show()


if __name__ == "__main__":
    main()
