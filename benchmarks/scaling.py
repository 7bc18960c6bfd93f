"""`predict` over two nodes, each pinned to a core of its own, against one such node on the same work in the same run.

The work: the founding example's CNN over many images of 64x64, packed once. One node works while the other is stopped
(SIGSTOP is not used: it would be an expired lease), so each measurement has a cluster of its own on the same two cores.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from report import Report

from potluck.client import Client
from potluck.local_cluster import LocalCluster

SIZE = 64


def cnn(path: Path) -> Path:
    """The founding example's network at SIZE x SIZE, as a `.keras` file."""
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


def measure(folder: Path, model: Path, nodes: int, items: int, cores: list[int]) -> tuple[float, np.ndarray]:
    """Items per second from the first result to the last, and the predictions."""
    images = np.random.default_rng(0).random((items, SIZE, SIZE, 3), np.float32)
    environment = {"POTLUCK_THREADS": "1"}
    with (
        LocalCluster(
            folder, cluster=f"scaling-{nodes}", nodes=nodes, discovery=False, cores=cores, environment=environment
        ) as cluster,
        Client(f"{cluster.broker_host}:{cluster.broker_port}", cluster=cluster.cluster) as client,
    ):
        data = client.add_data({"x": images}, "images")
        client.register(model, "cnn")
        # Engines are started, and the model loaded on each node, before the clock runs.
        client.predict("cnn", data.name).wait(timeout=600)
        started = time.perf_counter()
        found = client.predict("cnn", data.name).wait(timeout=600)
        seconds = time.perf_counter() - started
        return items / seconds, found.predictions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short run, to see that it works")
    arguments = parser.parse_args()
    items = 1500 if arguments.quick else 12_000
    cores = sorted(os.sched_getaffinity(0))[:2]
    report = Report("scaling")
    report.columns = ("predict, the CNN at 64x64", "images/s")
    with tempfile.TemporaryDirectory(prefix="potluck-bench-") as folder:
        model = cnn(Path(folder) / "cnn.keras")
        rates, outputs = {}, {}
        for nodes in (1, 2):
            rates[nodes], outputs[nodes] = measure(Path(folder) / str(nodes), model, nodes, items, cores * 2)
            report.rows.append((f"{nodes} node{'s' if nodes > 1 else ''}, a core each", f"{rates[nodes]:.0f}"))
    np.testing.assert_allclose(outputs[1], outputs[2], rtol=1e-4, atol=1e-6)
    report.figures = {"images_per_second": {str(nodes): round(rate, 1) for nodes, rate in rates.items()}}
    report.check("predict_two_nodes", rates[2] / rates[1], at_least=1.7)
    report.show()


if __name__ == "__main__":
    main()
