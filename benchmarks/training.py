"""Training over real links: machines are network namespaces with shaped links, each node limited to (a part of) a core.

`--only NAME` runs what one check needs (see CHECKS). Needs root and Linux; every check is a ratio of one run on one machine.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
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
BATCH = 32


class Lab:
    """Data and models of all parts, made once; `quick` makes all of it small."""

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder = folder
        self.quick = quick
        self._clusters = 0

    def digits(self, images: int, *, held_out: bool = False) -> Path:
        """Handwritten digits (scikit-learn), moved by a few pixels, as PNG files in class folders; every fifth is held out."""
        from PIL import Image

        from support.digits import digits

        folder = self.folder / f"digits-{images}{'-held-out' if held_out else ''}"
        if not folder.exists():
            x, y = digits()
            pool = np.flatnonzero((np.arange(len(x)) % 5 == 4) == held_out)
            rng = np.random.default_rng(0)
            for number in range(images):
                row, label = x[pool[number % len(pool)]].reshape(8, 8), y[pool[number % len(pool)]]
                moved = np.roll(np.pad(row, 2), tuple(rng.integers(-1, 2, 2)), (0, 1))
                path = folder / str(label) / f"{number:05}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((moved * 255).astype(np.uint8)).resize((SIZE, SIZE)).save(path)
        return folder

    def cnn(self, size: int = SIZE) -> Path:
        """The demo's network: 12.9 million weights at 128 x 128."""
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


def potluck(hosts: Hosts, *arguments: str) -> dict[str, Any]:
    """Run the command line on the coordinator's host; returns its `--json` output."""
    command = hosts.inside(
        0, sys.executable, "-m", "potluck.cli.main", "--seed", hosts.address, "--cluster", hosts.cluster,
        *arguments, "--json",
    )  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    if done.returncode:
        raise RuntimeError(f"{arguments[0]} failed: {done.stderr[-2000:]}\n{hosts.coordinator.log_tail()}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def train(hosts: Hosts, model: Path, data: Path, epochs: int, *options: str) -> dict[str, Any]:
    """A training job."""
    return potluck(hosts, "train", str(model), str(data), "--epochs", str(epochs), "--batch-size", str(BATCH), *options)


def steady(ended: dict[str, Any]) -> dict[str, float]:
    """Measurements of all epochs except the first, which also starts engines and measures speeds."""
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
    """Two nodes with a core each against one of them, in turns, on links of 1 Gbit/s.

    It also runs bare TensorFlow in one process with a core, and in two independent processes: that shows what this machine's second
    core adds.
    """
    data, model = lab.digits(600 if lab.quick else 6000), lab.cnn(64 if lab.quick else SIZE)
    turns, epochs = (1, 3) if lab.quick else (2, 5)
    bare: dict[int, list[float]] = {1: [], 2: []}
    found: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    with ExitStack() as stack:
        clusters = {nodes: lab.hosts(stack, [1.0] * nodes, 1000) for nodes in (1, 2)}
        others = OtherLoad()
        for _ in range(turns):
            for nodes, hosts in clusters.items():
                ended = train(hosts, model, data, epochs)
                seconds = ended["ended_at"] - ended["started_at"]
                beginning = ended["history"][0]["seconds"]
                found[nodes].append(steady(ended) | {"seconds": seconds, "first_epoch_seconds": beginning})
                steps = 12 if lab.quick else 30
                runs = multiworker(lab, hosts, model, lab.digits(600), steps, BATCH, together=False)
                bare[nodes].append(sum(BATCH / statistics.median(run["seconds"][2:]) for run in runs))
        busy = others.cores()
    for nodes, runs in found.items():
        rate, computing, seconds, loss = (
            statistics.median(run[key] for run in runs)
            for key in ("samples_per_second", "computing", "seconds", "loss")
        )
        report.rows.append(
            (
                f"{nodes} node(s), a core each, 1 Gbit/s, {epochs} epochs",
                f"{rate:.1f} images/s",
                f"{computing:.1%} computing, {seconds:.0f} s, training loss {loss:.4f}",
            )
        )
    rates = {nodes: statistics.median(runs) for nodes, runs in bare.items()}
    report.rows.append(("bare TensorFlow in 1 and in 2 processes", f"{rates[1]:.1f}, {rates[2]:.1f} images/s", ""))
    report.rows.append((f"cores that other programs kept busy meanwhile: {busy:.2f}", "", ""))
    report.figures["two_nodes"] = {str(nodes): runs for nodes, runs in found.items()}
    report.figures["bare_two_over_one"] = rates[2] / rates[1]
    ratio = statistics.median(
        two["samples_per_second"] / one["samples_per_second"] for one, two in zip(found[1], found[2], strict=True)
    )
    report.check("two_nodes_speed", ratio, at_least=1.85)
    times = [two["seconds"] / one["seconds"] for one, two in zip(found[1], found[2], strict=True)]
    report.check("two_nodes_time", statistics.median(times), at_most=0.55)
    report.check("utilisation_1g", statistics.median(run["computing"] for run in found[2]), at_least=0.9)


def slow_link(lab: Lab, report: Report) -> None:
    """Two nodes on links of 100 Mbit/s, against MultiWorkerMirroredStrategy on the same links: the same epochs over the same images.

    The rival's steps all cost the same. So it takes some of them on the slow links, for seconds and bytes per step, and all
    of them on free links, for its final accuracy.
    """
    images, epochs = (600, 2) if lab.quick else (6000, 8)
    data, held_out, model = lab.digits(images), lab.digits(350, held_out=True), lab.cnn(64 if lab.quick else SIZE)
    rival_steps = epochs * images // (2 * BATCH)
    with ExitStack() as stack:
        hosts = lab.hosts(stack, [1.0, 1.0], 100)
        potluck(hosts, "data", "add", str(held_out), "--name", "held-out")
        before = hosts.bytes_on_wire()
        ended = train(hosts, model, data, epochs, "--name", "cnn")
        found = steady(ended)
        found["seconds"] = ended["ended_at"] - ended["started_at"]
        found["wire_mb"] = (hosts.bytes_on_wire() - before) / 1e6
        found["accuracy"] = potluck(hosts, "evaluate", "cnn", "held-out")["metrics"]["accuracy"]
        hosts.rest()
        before = hosts.bytes_on_wire()
        slow, *_ = multiworker(lab, hosts, model, data, 6 if lab.quick else 10, BATCH)
        step_mb = (hosts.bytes_on_wire() - before) / 1e6 / len(slow["seconds"])
        step_seconds = statistics.median(slow["seconds"][2:])
    with ExitStack() as stack:
        hosts = lab.hosts(stack, [1.0, 1.0], None)
        free, *_ = multiworker(lab, hosts, model, data, rival_steps, BATCH, "--accuracy", str(held_out))
    rival = {
        "step_seconds": step_seconds,
        "step_mb": step_mb,
        "steps": rival_steps,
        "seconds": rival_steps * step_seconds,
        "wire_mb": rival_steps * step_mb,
        "accuracy": free["accuracy"],
    }
    for name, run in (("potluck", found), ("MultiWorkerMirroredStrategy", rival)):
        speed = f"{run['seconds']:.0f} s, {run['wire_mb']:,.0f} MB"
        report.rows.append(
            (f"{epochs} epochs on 2 nodes, 100 Mbit/s: {name}", speed, f"accuracy {run['accuracy']:.3f}")
        )
    report.figures["slow_link"] = {"potluck": found, "multiworker": rival}
    report.check("utilisation_100m", found["computing"], at_least=0.8)
    report.check("slow_link_accuracy", rival["accuracy"] - found["accuracy"], at_most=0.005)
    report.check("slow_link_time", rival["seconds"] / found["seconds"], at_least=10)
    report.check("slow_link_bytes", rival["wire_mb"] / found["wire_mb"], at_least=100)


RIVAL_PORT = 23450


def multiworker(
    lab: Lab, hosts: Hosts, model: Path, data: Path, steps: int, batch: int, *options: str, together: bool = True
) -> list[dict[str, Any]]:
    """MultiWorkerMirroredStrategy on the hosts' nodes, whose own engines rest; returns each worker's output.

    Not `together`: each worker is alone in its own group, so it is plain TensorFlow.
    """
    numbers = range(1, len(hosts.shares) + 1)
    addresses = {number: f"{hosts.host_address(number)}:{RIVAL_PORT}" for number in numbers}
    cores = sorted(os.sched_getaffinity(0))
    script = str(Path(__file__).with_name("multiworker.py"))
    with ExitStack() as stack:
        workers: list[subprocess.Popen[str]] = []
        for number in numbers:
            command = hosts.inside(
                number, sys.executable, script, str(number - 1 if together else 0),
                ",".join(addresses.values()) if together else addresses[number],
                str(model), str(data), str(steps), str(batch), *options,
            )  # fmt: skip
            core = {cores[(number - 1) % len(cores)]}
            log = stack.enter_context((lab.folder / f"rival-{number}.log").open("w"))
            worker = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                preexec_fn=lambda core=core: os.sched_setaffinity(0, core),
            )
            stack.callback(_end, worker)
            workers.append(worker)
        shown = [worker.communicate(timeout=3000)[0] for worker in workers]
        if any(worker.returncode for worker in workers):
            raise RuntimeError(f"the rival failed: {(lab.folder / 'rival-1.log').read_text()[-2000:]}")
    return [json.loads(printed.strip().splitlines()[-1]) for printed in shown]


def _end(worker: subprocess.Popen[str]) -> None:
    if worker.poll() is None:
        worker.kill()
        worker.wait()


def unequal(lab: Lab, report: Report) -> None:
    """Four nodes with 1/8, 1/4, 1/2 and all of a core (two cores in all), against what each does alone.

    The ideal is the sum of their speeds, from the moment when the fastest begins, which also has to start its engine.
    """
    images, epochs = (600, 3) if lab.quick else (12_000, 8)
    data, model = lab.digits(images), lab.cnn(64)
    shares = [1.0, 0.5] if lab.quick else [1.0, 0.5, 0.25, 0.125]
    alone: list[float] = []
    start = 0.0
    with ExitStack() as stack:
        together = lab.hosts(stack, shares, 1000)
        ended = train(together, model, data, epochs)
        found = steady(ended) | {"seconds": ended["ended_at"] - ended["created_at"]}
    for share in shares:
        with ExitStack() as stack:
            hosts = lab.hosts(stack, [share], 1000)
            part = max(200, int(images * share))
            ended = train(hosts, model, lab.digits(part), 2)
            alone.append(steady(ended)["samples_per_second"])
            start = start or ended["ended_at"] - ended["created_at"] - 2 * part / alone[0]
    ideal = start + images * epochs / sum(alone)
    rates = " + ".join(f"{rate:.1f}" for rate in alone)
    report.rows.append(
        (
            f"{len(shares)} nodes, {', '.join(f'{share:g}' for share in shares)} of a core; alone {rates}",
            f"{found['samples_per_second']:.1f} images/s",
            "",
        )
    )
    report.rows.append((f"the same, {epochs} epochs from cold", f"{found['seconds']:.1f} s", f"ideal {ideal:.1f} s"))
    report.figures["unequal"] = {"alone": alone, "together": found, "start_seconds": start, "ideal_seconds": ideal}
    report.check("unequal_nodes", found["samples_per_second"] / sum(alone), at_least=0.9)
    report.check("unequal_time", found["seconds"] / ideal, at_most=1.15)


def slow_helper(lab: Lab, report: Report) -> None:
    """A node with a core, and the same joined by one with a twentieth of a core, which must not make it slower. Engines are cold.

    In turns, and by the median: one node alone did 348 and 394 images/s within ten minutes of one day.
    """
    images, epochs, turns = (600, 3, 1) if lab.quick else (3000, 4, 3)
    data, model = lab.digits(images), lab.cnn(64)
    speed: dict[str, float] = {}
    wall: dict[str, float] = {}
    for strategy in ("auto",) if lab.quick else ("local", "sync", "auto"):
        found: dict[str, list[dict[str, float]]] = {"alone": [], "helped": []}
        for turn in range(turns):
            both = [("alone", [1.0]), ("helped", [1.0, 0.05])]
            for name, shares in both if turn % 2 == 0 else reversed(both):
                with ExitStack() as stack:
                    hosts = lab.hosts(stack, shares, 1000)
                    ended = train(hosts, model, data, epochs, "--strategy", strategy)
                    found[name].append(steady(ended) | {"seconds": ended["ended_at"] - ended["created_at"]})
        pairs = list(zip(found["alone"], found["helped"], strict=True))
        speed[strategy] = statistics.median(two["samples_per_second"] / one["samples_per_second"] for one, two in pairs)
        wall[strategy] = statistics.median(one["seconds"] / two["seconds"] for one, two in pairs)
        for name, what in (("alone", "a core alone"), ("helped", "with a twentieth of one")):
            rates = " ".join(f"{one['samples_per_second']:.0f}" for one in found[name])
            times = " ".join(f"{one['seconds']:.1f}" for one in found[name])
            report.rows.append((f"{strategy}: {what}", f"{rates} images/s", f"{times} s from cold"))
        report.figures[f"slow_helper_{strategy}"] = found | {"speed": speed[strategy], "time": wall[strategy]}
    report.check("slow_helper_speed", min(speed.values()), at_least=0.97)
    report.check("slow_helper_time", min(wall.values()), at_least=0.97)


def learning(lab: Lab, report: Report) -> None:
    """Rounds against exact synchronous training with equal samples: a language model, the digits; and with lost updates."""
    from learning import Trial, handwriting, language

    seeds = range(1 if lab.quick else 5)
    epochs, rounds = (1, 6) if lab.quick else (3, 40)
    found: dict[str, list[float]] = {"local": [], "sync": [], "lossy": []}
    digits: dict[str, list[float]] = {"local": [], "sync": []}
    for seed in seeds:
        with tempfile.TemporaryDirectory(dir=lab.folder) as folder:
            trial = Trial(Path(folder), language(seed), WORKERS)
            found["sync"].append(trial.sync(WORKERS, epochs)["loss"])
            found["local"].append(trial.local(WORKERS, epochs, rounds)["loss"])
        with tempfile.TemporaryDirectory(dir=lab.folder) as folder:
            trial = Trial(Path(folder), language(seed), WORKERS)
            found["lossy"].append(trial.local(WORKERS, epochs, rounds, lost=0.3, seed=seed)["loss"])
        with tempfile.TemporaryDirectory(dir=lab.folder) as folder:
            trial = Trial(Path(folder), handwriting(seed), WORKERS)
            digits["sync"].append(trial.sync(WORKERS, 4 * epochs)["accuracy"])
            digits["local"].append(trial.local(WORKERS, 4 * epochs, rounds)["accuracy"])
    median = {name: statistics.median(losses) for name, losses in found.items()}
    score = {name: statistics.median(accuracies) for name, accuracies in digits.items()}
    report.rows.append((f"language model, {WORKERS} nodes: sync", f"loss {median['sync']:.4f}", ""))
    report.rows.append((f"language model, {WORKERS} nodes: local", f"loss {median['local']:.4f}", f"{rounds} rounds"))
    report.rows.append(("the same, 30 % of the updates lost", f"loss {median['lossy']:.4f}", ""))
    report.rows.append(("digits: sync, local", f"accuracy {score['sync']:.4f}", f"{score['local']:.4f}"))
    report.figures["learning"] = {"language": found, "digits": digits}
    report.check("local_loss", median["local"] / median["sync"], at_most=1.02)
    report.check("local_accuracy", 100 * (score["sync"] - score["local"]), at_most=0.5)
    report.check("lost_updates", median["lossy"] / median["local"], at_most=1.05)


def synchronous(lab: Lab, report: Report) -> None:
    """Every step on two nodes together, against one process with the same batches."""
    import keras

    from support.digits import split
    from support.plain import plainly, relative

    found = split()
    x, y = found["x_train"].reshape(-1, 64), found["y_train"]
    data, start, end = lab.folder / "rows.npz", lab.folder / "start.keras", lab.folder / "end.keras"
    np.savez(data, x=x, y=y)
    keras.utils.set_random_seed(3)
    layers = [keras.Input((64,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(10, "softmax")]
    model = keras.Sequential(layers)
    model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy")
    model.save(start)
    epochs = 2 if lab.quick else 5
    with ExitStack() as stack:
        hosts = lab.hosts(stack, [1.0, 1.0], 1000)
        train(hosts, start, data, epochs, "--strategy", "sync", "--target", "y", "--output", str(end))
    difference = relative(keras.saving.load_model(end), plainly(model, x, y, epochs, BATCH))
    report.rows.append((f"sync on 2 nodes against one process, {epochs} epochs, SGD", f"{difference:.1e}", "relative"))
    report.check("sync_exact", difference, at_most=1e-6)


def predicted(lab: Lab, report: Report) -> None:
    """The cost model's predictions for both strategies on two nodes, against measurements: a model of 2.4 million weights."""
    from coordinator.plans.training.costs import Costs, predict

    size, megabits = 64, 1000  # a step together is a third computing, a third network, a third packing
    data, model = lab.digits(600 if lab.quick else 3000), lab.cnn(size)
    with ExitStack() as stack:
        alone = steady(train(lab.hosts(stack, [1.0], megabits), model, data, 2 if lab.quick else 3))
    rate = alone["samples_per_second"]
    errors: dict[str, float] = {}
    with ExitStack() as stack:
        hosts = lab.hosts(stack, [1.0, 1.0], megabits)
        for strategy in ("local", "sync"):
            options = ("--strategy", strategy, "--name", strategy)
            run = steady(train(hosts, model, data, 3, *options))
            samples = 1_000_000  # with so many samples, the start does not matter, as in `steady`
            costs = Costs((rate, rate), weights_bytes(model), 0, samples, BATCH, megabits / 8 * 1e6)
            said = predict(costs)
            seconds = said.local_seconds if strategy == "local" else said.sync_seconds
            measured = run["samples_per_second"]
            errors[strategy] = abs(samples / seconds - measured) / measured
            report.rows.append(
                (f"{strategy} on 2 nodes, 1 Gbit/s", f"{measured:.1f} images/s", f"predicted {samples / seconds:.1f}")
            )
    report.figures["predicted"] = {"alone": rate, "errors": errors}
    report.check("cost_model", max(errors.values()), at_most=0.2)


def weights_bytes(model: Path) -> int:
    import keras

    return 4 * int(keras.saving.load_model(model).count_params())


def aggregation(lab: Lab, report: Report) -> None:
    """Memory of a whole process that takes the outer step of 2 and of 12 nodes' updates, against the model's size."""
    from potluck.weights.files import save
    from potluck.weights.updates import write_update

    shapes = [(3, 3, 64, 128), (1024, 1024)] if lab.quick else [(3, 3, 64, 128), (25088, 512), (512, 10)]
    rng = np.random.default_rng(0)
    start = [rng.normal(0, 0.05, shape).astype(np.float32) for shape in shapes]
    weights = lab.folder / "aggregated"
    save(weights, [(f"w{number:05}", array) for number, array in enumerate(start)])
    size = sum(array.nbytes for array in start)
    for number in range(12):
        moved = [array + rng.normal(0, 1e-3, array.shape).astype(np.float32) for array in start]
        write_update(lab.folder / f"update-{number}", weights, moved, "auto")
    peaks: dict[int, int] = {}
    for nodes in (0, 2, 12):
        command = [sys.executable, str(Path(__file__).with_name("aggregate.py")), str(lab.folder), str(nodes)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
        peaks[nodes] = int(done.stdout)
        if nodes:
            report.rows.append(
                (
                    f"outer step of {nodes} updates of {size / 1e6:.1f} MB of weights",
                    f"{peaks[nodes] / 1e6:.0f} MB",
                    f"{peaks[0] / 1e6:.0f} MB before",
                )
            )
    report.figures["aggregation"] = {"model_bytes": size, "peak_bytes": {str(key): peaks[key] for key in peaks}}
    report.check("aggregation_memory", (max(peaks.values()) - peaks[0]) / size, at_most=3)


WORKERS = 2

PARTS: dict[Callable[[Lab, Report], None], tuple[str, ...]] = {
    two_nodes: ("two_nodes_speed", "two_nodes_time", "utilisation_1g"),
    slow_link: ("utilisation_100m", "slow_link_accuracy", "slow_link_time", "slow_link_bytes"),
    unequal: ("unequal_nodes", "unequal_time"),
    slow_helper: ("slow_helper_speed", "slow_helper_time"),
    synchronous: ("sync_exact",),
    predicted: ("cost_model",),
    learning: ("local_loss", "local_accuracy", "lost_updates"),
    aggregation: ("aggregation_memory",),
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that namespaces and quotas are taken down
    report = Report("training", columns=("local training", "speed", ""))
    with tempfile.TemporaryDirectory(prefix="potluck-bench-") as folder:
        lab = Lab(Path(folder), arguments.quick)
        for part, checks in PARTS.items():
            if arguments.only is None or arguments.only in checks:
                part(lab, report)
    report.show()


if __name__ == "__main__":
    main()
