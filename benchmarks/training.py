"""Training over real links: machines are network namespaces with shaped links, each node held to (a part of) a core.

`--only NAME` runs what one check needs (see CHECKS). Needs root and Linux; every check is a ratio of one run on one machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from hosts import Hosts, available
from report import OtherLoad, Report

SIZE = 128


class Lab:
    """Data and models of all parts, made once; `quick` makes all of it small."""

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder = folder
        self.quick = quick
        self._clusters = 0

    def digits(self, images: int) -> Path:
        """Handwritten digits (scikit-learn), each moved by a few pixels, as PNG files in class folders."""
        from PIL import Image
        from support.digits import digits

        folder = self.folder / f"digits-{images}"
        if not folder.exists():
            x, y = digits()
            rng = np.random.default_rng(0)
            for number in range(images):
                row, label = x[number % len(x)].reshape(8, 8), y[number % len(x)]
                moved = np.roll(np.pad(row, 2), tuple(rng.integers(-1, 2, 2)), (0, 1)) if number >= len(x) else np.pad(row, 2)
                path = folder / str(label) / f"{number:05}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((moved * 255).astype(np.uint8)).resize((SIZE, SIZE)).save(path)
        return folder

    def cnn(self, size: int = SIZE) -> Path:
        """The founding example's network: 12.9 million weights at 128 x 128."""
        path = self.folder / f"cnn-{size}.keras"
        if not path.exists():
            import keras

            keras.utils.set_random_seed(0)
            model = keras.Sequential([keras.Input((size, size, 3))])
            for filters in (32, 64, 128):
                model.add(keras.layers.Conv2D(filters, 3, activation="relu"))
                model.add(keras.layers.MaxPooling2D(2))
            model.add(keras.layers.Flatten())
            model.add(keras.layers.Dense(512, activation="relu"))
            model.add(keras.layers.Dense(10, activation="softmax"))
            model.compile("adam", "categorical_crossentropy", metrics=["accuracy"])
            model.save(path)
        return path

    def hosts(self, stack: ExitStack, shares: Sequence[float], megabits: float | None) -> Hosts:
        self._clusters += 1
        name = f"bench-{self._clusters}"
        return stack.enter_context(Hosts(self.folder / name, name, shares, megabits))


def train(hosts: Hosts, model: Path, data: Path, epochs: int, *options: str) -> dict[str, Any]:
    """A training job by the command line on the coordinator's host; what `--json` prints of it."""
    command = hosts.inside(
        0, sys.executable, "-m", "potluck.cli.main", "--seed", hosts.address, "--cluster", hosts.cluster,
        "train", str(model), str(data), "--epochs", str(epochs), "--json", *options,
    )  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    if done.returncode:
        raise RuntimeError(f"training failed: {done.stderr[-2000:]}\n{hosts.coordinator.log_tail()}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def steady(ended: dict[str, Any]) -> dict[str, float]:
    """Figures of all epochs but the first, which also starts engines and measures speeds."""
    first, rest = ended["history"][0], ended["history"][1:]
    seconds = sum(epoch["seconds"] for epoch in rest)
    return {
        "samples_per_second": (rest[-1]["samples"] - first["samples"]) / seconds,
        "computing": sum(epoch["computing"] * epoch["seconds"] for epoch in rest) / seconds,
        "rounds": sum(epoch["rounds"] for epoch in rest),
        "exchanged_mb": sum(epoch["exchanged_bytes"] for epoch in rest) / 1e6,
        "loss": rest[-1]["metrics"]["loss"],
    }


def two_nodes(lab: Lab, report: Report) -> None:
    """Two nodes with a core each against one of them, in turns, on links of 1 Gbit/s."""
    data, model = lab.digits(600 if lab.quick else 3000), lab.cnn(64 if lab.quick else SIZE)
    turns = 1 if lab.quick else 2
    found: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    with ExitStack() as stack:
        clusters = {nodes: lab.hosts(stack, [1.0] * nodes, 1000) for nodes in (1, 2)}
        others = OtherLoad()
        for _ in range(turns):
            for nodes, hosts in clusters.items():
                found[nodes].append(steady(train(hosts, model, data, 3)))
        busy = others.cores()
    for nodes, runs in found.items():
        rate = statistics.median(run["samples_per_second"] for run in runs)
        computing = statistics.median(run["computing"] for run in runs)
        report.rows.append((f"{nodes} node(s), a core each, 1 Gbit/s", f"{rate:.1f} images/s", f"{computing:.1%} computing"))
    report.rows.append((f"cores that other programs kept busy meanwhile: {busy:.2f}", "", ""))
    report.figures["two_nodes"] = {str(nodes): runs for nodes, runs in found.items()}
    ratio = statistics.median(
        two["samples_per_second"] / one["samples_per_second"] for one, two in zip(found[1], found[2], strict=True)
    )
    report.check("two_nodes_speed", ratio, at_least=1.85)
    report.check("utilisation_1g", statistics.median(run["computing"] for run in found[2]), at_least=0.9)


def slow_link(lab: Lab, report: Report) -> None:
    """Two nodes on links of 100 Mbit/s."""
    data, model = lab.digits(600 if lab.quick else 6000), lab.cnn(64 if lab.quick else SIZE)
    with ExitStack() as stack:
        hosts = lab.hosts(stack, [1.0, 1.0], 100)
        before = hosts.bytes_on_wire()
        found = steady(train(hosts, model, data, 2 if lab.quick else 3))
        found["wire_mb"] = (hosts.bytes_on_wire() - before) / 1e6
    shown = f"{found['samples_per_second']:.1f} images/s", f"{found['computing']:.1%} computing"
    report.rows.append(("2 nodes, a core each, 100 Mbit/s", *shown))
    report.figures["slow_link"] = found
    report.check("utilisation_100m", found["computing"], at_least=0.8)


def unequal(lab: Lab, report: Report) -> None:
    """Four nodes with 1/8, 1/4, 1/2 and all of a core (two cores in all), against what each does alone."""
    data, model = lab.digits(600 if lab.quick else 3000), lab.cnn(64)
    shares = [1.0, 0.5, 0.25, 0.125]
    alone: list[float] = []
    with ExitStack() as stack:
        together = lab.hosts(stack, shares, 1000)
        found = steady(train(together, model, data, 3))
    for share in shares:
        with ExitStack() as stack:
            hosts = lab.hosts(stack, [share], 1000)
            part = lab.digits(max(200, int(len(list(data.glob("*/*"))) * share)))
            alone.append(steady(train(hosts, model, part, 2))["samples_per_second"])
    rates = " + ".join(f"{rate:.1f}" for rate in alone)
    report.rows.append((f"4 nodes at 8:4:2:1 of a core; alone {rates}", f"{found['samples_per_second']:.1f} images/s", ""))
    report.figures["unequal"] = {"alone": alone, "together": found}
    report.check("unequal_nodes", found["samples_per_second"] / sum(alone), at_least=0.9)


PARTS: dict[Callable[[Lab, Report], None], tuple[str, ...]] = {
    two_nodes: ("two_nodes_speed", "utilisation_1g"),
    slow_link: ("utilisation_100m",),
    unequal: ("unequal_nodes",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short run, to see that it works")
    names = [name for checks in PARTS.values() for name in checks]
    parser.add_argument("--only", choices=names, help="run only what this check needs")
    arguments = parser.parse_args()
    if reason := available():
        sys.exit(f"training benchmark: {reason}")
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    report = Report("training", columns=("local training", "speed", ""))
    with tempfile.TemporaryDirectory(prefix="potluck-bench-") as folder:
        lab = Lab(Path(folder), arguments.quick)
        for part, checks in PARTS.items():
            if arguments.only is None or arguments.only in checks:
                part(lab, report)
    report.show()


if __name__ == "__main__":
    main()
