"""How answers look: tables for people, JSON for programs, one sentence for an error."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import Struct
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from potluck.cli.listing import NOTHING, PIPE_COLUMNS, Facts, Line, Listing
from potluck.errors import PotluckError
from potluck.wire.jobs import EpochMetrics, Evaluation, RoundMetrics
from potluck.wire.questions import ClusterEvent, DatasetInfo, DeploymentInfo, JobChanged, ModelInfo, NodeInfo
from potluck.wire.values import TensorSpec
from potluck.wording import counted, printable

_COLORS = {
    "online": "green", "ready": "green", "succeeded": "green", "running": "cyan", "loading": "cyan", "queued": "yellow",
    "suspect": "yellow", "offline": "red", "left": "yellow", "failed": "red", "cancelled": "magenta",
    "joined": "green", "lost": "red", "missed": "red", "idle": "yellow", "evicted": "yellow", "withdrawn": "red", "retired": "yellow", "failing": "red",
}  # fmt: skip

_LINES = "\n"
"""Characters that error sentences keep: some sentences end with lines of a log."""
CONFUSED = 20
"""How many pairs of confused classes are named where the whole confusion matrix does not fit."""


def show(renderable: RenderableType) -> None:
    """Print for people, on standard output. The terminal wraps a line that is too long, and gives it back whole when it is copied."""
    if isinstance(renderable, str):
        _console().print(printable(renderable, _LINES), soft_wrap=True, crop=False)
    else:
        _console().print(renderable, crop=False)


def columns() -> int:
    """How many columns `show` has for a line."""
    return _console().width


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS, markup=False)


def note(text: str) -> None:
    """Print a remark for people on standard error: standard output holds only what was asked for."""
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(printable(text, _LINES))


def emit(value: Any) -> None:
    """Print JSON on standard output."""
    sys.stdout.write(json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def emit_line(value: Any) -> None:
    """Print as JSON in one line, on standard output, at once: for a value after another."""
    sys.stdout.write(json.dumps(plain(value), ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def error_line(error: PotluckError) -> str:
    """One clear sentence, for standard error."""
    return f"potluck: {printable(error.message, _LINES)}\n"


def plain(value: Any) -> Any:
    """Structs, tuples and numpy values as JSON has them, with every field; a number that is not finite becomes null."""
    if isinstance(value, Struct):
        return {name: plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # numpy
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, bytes):
        return value.hex()
    return value


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    *,
    right: Sequence[str] = (),
    below: Sequence[Sequence[str | Text]] = (),
) -> Listing:
    """A listing: columns named in `right` hold numbers, `below` has the lines below each row."""
    return Listing(columns, list(rows), right, below)


def colored(state: str) -> Text:
    return Text(state, style=_COLORS.get(state, ""))


def bytes_text(count: float) -> str:
    """A size as people read it: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def seconds_text(seconds: float) -> str:
    """A time as people read it: `1 h 05 min`, `2 min 03 s`, `4 s`."""
    whole = max(0, round(seconds))
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 60} min {whole % 60:02} s" if whole >= 60 else f"{whole} s"


def rate_text(items_per_second: float) -> str:
    """`1,200 items/s`."""
    return f"{counted(items_per_second, 'item')}/s"


def share(job: JobChanged) -> float | None:
    """How much of a job is done, 0 to 1; None where that is unknown."""
    if job.state == "succeeded":
        return 1.0  # also after a restart of the coordinator, which then remembers no counts
    return job.progress.done / job.progress.total if job.progress.total else None


def metrics_text(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def nodes_table(nodes: Iterable[NodeInfo]) -> Listing:
    """What each node has and does. The load of an offline node is unknown, and is not shown."""

    def told(node: NodeInfo) -> list[Text]:
        return [Text(f"left out: {node.left_out}", style="red")] if node.left_out else []

    def row(node: NodeInfo) -> tuple[str | Text, ...]:
        has = node.capacity
        gone = node.state == "offline"
        return (
            node.node_id, colored("left" if gone and node.left else node.state), str(has.cores), bytes_text(has.memory_bytes),
            f"{has.gflops:.0f}" if has.gflops else "?", "-" if gone else f"{node.cpu_percent:.0f} %",
            f"heard {ago_text(node.seen_at)}" if gone else work_text(node),
            ", ".join(f"{gpu.name} {bytes_text(gpu.memory_bytes)}" for gpu in has.gpus) or "-",
            runtimes_text(node), has.hostname,
        )  # fmt: skip

    columns = ("node", "state", "cores", "memory", "GFLOP/s", "load", "does", "GPU", "runs", "host")
    shown = list(nodes)
    right = ("cores", "memory", "GFLOP/s", "load")
    return table(columns, map(row, shown), right=right, below=list(map(told, shown)))


def work_text(node: NodeInfo) -> str:
    """What a node does, and whether its disk is full: `2 shards, 1 replica`."""
    shards = f"{counted(node.leases, 'shard')}{' (give way)' if node.gives_way else ''}"
    does = (shards if node.leases else "", counted(len(node.replicas), "replica") if node.replicas else "")
    return (", ".join(filter(None, does)) or "nothing") + (" (disk full)" if node.shortage else "")


def runtimes_text(node: NodeInfo) -> str:
    """The runtimes of a node: `TensorFlow 2.21.0, LiteRT 2.3.0`."""
    names = {"tensorflow": "TensorFlow", "litert": "LiteRT"}
    has = node.capacity.runtimes
    return ", ".join(f"{name} {has[key]}" for key, name in names.items() if key in has) or "no runtime"


def jobs_table(jobs: Iterable[JobChanged]) -> Listing:
    """One line per job; below it what the job does, what it reached, or why it failed."""

    def row(job: JobChanged) -> tuple[str | Text, ...]:
        done, subject = share(job), job.subject
        took = seconds_text((job.ended_at or time.time()) - job.started_at) if job.started_at else "-"
        return (
            job.job_id, job.kind, colored(job.state), "-" if done is None else f"{done:.0%}",
            subject.model or "-", subject.data or "-", subject.name or "-", took, ago_text(job.created_at),
        )  # fmt: skip

    def told(job: JobChanged) -> list[Text]:
        if job.error:
            return [Text(job.error.message, style="red" if job.state == "failed" else "")]
        text = job.progress.message or metrics_text(job.progress.metrics)
        return [Text(text, style="dim")] if text else []

    columns = ("job", "kind", "state", "done", "model", "data", "name", "took", "asked")
    shown = list(jobs)
    return table(columns, map(row, shown), right=("done", "took", "asked"), below=list(map(told, shown)))


def epochs_table(history: Sequence[EpochMetrics], shown: int | None = None) -> Facts:
    """The metrics of each epoch, and below them its costs; `shown`: how many of the last epochs."""
    width = max(len("epoch"), *(len(str(epoch.epoch)) for epoch in history))
    rows: list[tuple[str, str | Text]] = [("epoch", Text("metrics", "bold"))]
    samples = 0
    for epoch in history:
        took = (
            f"{counted(epoch.samples - samples, 'sample')} in {seconds_text(epoch.seconds)}",
            counted(epoch.rounds, "round"),
            f"{epoch.computing:.0%} computing",
            f"{bytes_text(epoch.exchanged_bytes)} exchanged",
        )
        samples = epoch.samples
        below = Text("  ".join(took), "dim")
        rows.append((f"{epoch.epoch:>{width}}", Text.assemble(metrics_text(epoch.metrics), "\n", below)))
    left_out = len(history) - (len(history) if shown is None else shown)
    if left_out > 0:
        told = Text(f"{counted(left_out, 'epoch')} before these: --verbose shows all", "dim")
        rows[1 : 1 + left_out] = [("", told)]
    return Facts(rows)


def rounds_table(rounds: Iterable[RoundMetrics]) -> Listing:
    """What the outer optimizer did in each round. In a very long list, some rounds are missing."""
    rows = [
        (
            str(one.round), str(one.samples), f"{one.outer_learning_rate:.3f}", f"{one.outer_momentum:.3f}",
            metrics_text(one.metrics), "; ".join(f"{node} left out: {why}" for node, why in one.rejected.items()),
        )
        for one in rounds
    ]  # fmt: skip
    columns = ("round", "samples", "outer lr", "momentum", "metrics", "")
    return table(columns, rows, right=columns[:4])


def ago_text(at: float) -> str:
    return f"{seconds_text(time.time() - at)} ago" if at else "-"


def time_text(at: float) -> str:
    """By the clock here: `2026-01-07 10:31:04`."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def events_table(events: Iterable[ClusterEvent]) -> Listing:
    """An event a line, the oldest first."""
    rows = [(str(one.number), time_text(one.at), one.subject, one.name, colored(one.what), one.text) for one in events]
    return table(("number", "time", "subject", "name", "event", "text"), rows, right=("number",))


def event_line(event: ClusterEvent) -> Line:
    """The same as a line of its own."""
    of = f"{event.subject} {event.name}".rstrip()
    parts = [Text(time_text(event.at), style="dim"), Text(printable(of)), colored(printable(event.what))]
    return Line(Text("  ").join([*parts, Text(printable(event.text))]))


def models_table(models: Iterable[ModelInfo]) -> Listing:
    """One line per version. A column that no version fills is left out (inputs and outputs are unknown until a model is loaded once)."""

    def row(model: ModelInfo) -> tuple[str | Text, ...]:
        signature = model.signature
        return (
            f"{model.name}:{model.version}",
            ", ".join(model.aliases) or "-",
            model.format,
            bytes_text(model.model.size),
            ago_text(model.created_at),
            ", ".join(map(spec_text, signature.inputs)) if signature else "",
            ", ".join(map(spec_text, signature.outputs)) if signature else "",
            str(len(model.classes) or "-"),
            metrics_text(model.metrics),
        )

    columns = ("model", "aliases", "format", "size", "made", "inputs", "outputs", "classes", "metrics")
    return _told(columns, [row(model) for model in models], right=("size", "made", "classes"))


def _told(
    columns: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    *,
    right: Sequence[str],
    below: Sequence[Sequence[str | Text]] = (),
) -> Listing:
    """A table without its empty columns."""
    told = [place for place in range(len(columns)) if any(cells[place] not in NOTHING for cells in rows)]
    kept = [[cells[place] for place in told] for cells in rows]
    return table([columns[place] for place in told], kept, right=right, below=below)


def model_report(model: ModelInfo) -> Facts:
    """Everything that the registry knows about a version."""
    signature, ref = model.signature, model.model
    return Facts(
        [
            ("model", f"{model.name}:{model.version}"),
            ("aliases", ", ".join(f"{model.name}:{alias}" for alias in model.aliases)),
            ("tags", tags_text(model.tags)),
            ("format", model.format),
            ("from", model.source),
            (
                "made",
                f"{time_text(model.created_at)} ({ago_text(model.created_at)})",
            ),
            ("size", f"{bytes_text(ref.size)} ({counted(ref.size, 'byte')})"),
            ("sha256", ref.sha256),
            (
                "inputs",
                "\n".join(map(spec_text, signature.inputs)) if signature else "unknown until it is deployed once",
            ),
            ("outputs", "\n".join(map(spec_text, signature.outputs)) if signature else ""),
            ("images", _images_text(model)),
            ("recordings", f"{model.rate:,} samples a second" if model.rate else ""),
            ("classes", ", ".join(map(printable, model.classes))),
            ("metrics", metrics_text(model.metrics)),
            ("held by", "\n".join(ref.holders)),
        ]
    )


def _images_text(model: ModelInfo) -> str:
    """How image files become the model's input; empty where it takes no images."""
    from potluck.data.items import CHANNELS, image_options, input_shape, pixels_text
    from potluck.errors import InvalidRequest

    shape = input_shape(model)
    if model.image is None and (shape is None or len(shape) != 4 or shape[3] not in CHANNELS):
        return ""
    try:
        return pixels_text(image_options(model, ""))
    except InvalidRequest:  # the model takes inputs of any size
        return ""


def tags_text(tags: Mapping[str, str]) -> str:
    return printable("  ".join(f"{key}={value}" for key, value in sorted(tags.items())))


def spec_text(spec: TensorSpec) -> str:
    """`images FP32 [?, 32, 32, 3]`."""
    return f"{spec.name} {spec.datatype} [{', '.join('?' if size < 0 else str(size) for size in spec.shape)}]"


def deployments_table(deployments: Iterable[DeploymentInfo]) -> Listing:
    """One line per deployment; below it one line for each replica, and remarks."""

    def row(found: DeploymentInfo) -> tuple[str | Text, ...]:
        ready = sum(replica.state == "ready" for replica in found.replicas)
        wanted = f"{found.min_replicas}..{found.max_replicas}" if found.max_replicas else str(found.wanted or "all")
        share = f" {found.weight} %" if found.role in ("stable", "canary") else ""
        return (
            found.name, colored(found.state), f"{ready}/{wanted}", f"{found.role or '-'}{share}", str(found.served),
            milliseconds_text(found.p50_seconds), milliseconds_text(found.p99_seconds), f"{found.failure_rate:.1%}",
            str(found.queued), milliseconds_text(found.queue_seconds),
            bytes_text(found.resident_bytes) if found.resident_bytes else "?",
        )  # fmt: skip

    def told(found: DeploymentInfo) -> list[Text]:
        where = [
            Text.assemble(
                "on ",
                replica.node_id,
                " ",
                colored(replica.state),
                f": {replica.error.message}" if replica.error else "",
            )
            for replica in found.replicas
        ]
        return [*where, *([Text(found.reason, style="dim")] if found.reason else [])]

    columns = ("deployment", "state", "ready", "traffic", "served", "p50", "p99", "failed", "queued", "waits", "memory")
    shown = list(deployments)
    return table(columns, map(row, shown), right=("ready", *columns[4:]), below=list(map(told, shown)))


def milliseconds_text(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds else "-"


def datasets_table(datasets: Iterable[DatasetInfo]) -> Listing:
    """One line per data set, with the nodes that it lives on; data sets without nodes are the coordinator's."""

    def row(data: DatasetInfo) -> tuple[str | Text, ...]:
        classes = ", ".join(data.classes[:10]) + (", ..." if len(data.classes) > 10 else "")
        here = not data.nodes  # for data that live on nodes, the size and the skipped items are unknown
        size = bytes_text(data.size_bytes) if here else "-"
        left_out = str(data.skipped) if data.skipped and here else "-"
        return data.name, data.kind, str(data.count), size, classes or "-", left_out, ", ".join(data.nodes) or "-"

    columns = ("data set", "kind", "items", "size", "classes", "skipped", "lives on")
    shown = list(datasets)
    below = [[Text("packed for a job, and removed with it", style="dim")] if data.packed else [] for data in shown]
    return _told(columns, list(map(row, shown)), right=("items", "size", "skipped"), below=below)


def evaluation_report(evaluation: Evaluation) -> Group:
    """Metrics, precision, recall and F1 for each class, and the confusion matrix (rows: the truth)."""
    parts: list[RenderableType] = [
        Line(Text(f"{counted(evaluation.count, 'item')}  {metrics_text(evaluation.metrics)}", style="bold"))
    ]
    if evaluation.classes:
        rows = [
            (score.label, f"{score.precision:.4f}", f"{score.recall:.4f}", f"{score.f1:.4f}", str(score.support))
            for score in evaluation.classes
        ]
        columns = ("class", "precision", "recall", "F1", "items")
        parts += ["", table(columns, rows, right=columns[1:])]
    if evaluation.confusion:
        parts += ["", Confusion(evaluation)]
    if evaluation.remark:
        parts += ["", Text(printable(evaluation.remark))]
    return Group(*parts)


def change_text(name: str, before: Evaluation, after: Evaluation, data: str) -> str:
    """The metrics of a converted model beside those of its original, in one line."""
    told = ("accuracy", "mae", "mse")  # with several outputs, a name begins with the output's: `size_mae`
    both = [name for name in after.metrics if name in before.metrics and name.rpartition("_")[2] in told]
    changes = ", ".join(
        f"{metric} {after.metrics[metric]:.4f} instead of {before.metrics[metric]:.4f} "
        f"({after.metrics[metric] - before.metrics[metric]:+.4f})"
        for metric in (["accuracy"] if "accuracy" in both else both)
    )
    return f"{name}: {changes} on {counted(after.count, 'item')} of {data}"


@dataclass
class Confusion:
    """Rows are the truth, columns what was said; the diagonal is right. Where it is too wide, the confused pairs are listed instead."""

    evaluation: Evaluation

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        found = self.evaluation.confusion
        labels = [score.label for score in self.evaluation.classes]
        labels += [str(index) for index in range(len(labels), len(found))]
        rows: list[tuple[str | Text, ...]] = [
            (
                Text(labels[index], style="bold"),
                *(
                    Text(str(count), style="bold green" if column == index else "red" if count else "dim")
                    for column, count in enumerate(row)
                ),
            )
            for index, row in enumerate(found)
        ]
        matrix = table(("", *labels), rows, right=labels)
        if matrix.width <= options.max_width:
            yield Text("confusion (rows: truth)", style="italic")
            yield matrix
            return
        wrong = [
            (count, labels[truth], labels[said])
            for truth, row in enumerate(found)
            for said, count in enumerate(row)
            if count and truth != said
        ]
        wrong.sort(key=lambda one: -one[0])
        more = f", {CONFUSED} of {len(wrong)}" if len(wrong) > CONFUSED else ""
        yield Text(f"confused most often{more}" if wrong else "nothing was confused", style="italic")
        if wrong:
            yield table(
                ("items", "truth", "said"), [(str(count), *both) for count, *both in wrong[:CONFUSED]], right=("items",)
            )
