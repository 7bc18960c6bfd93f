"""How answers look: tables for people, JSON for programs, one sentence for an error."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from msgspec import Struct
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from potluck.errors import PotluckError
from potluck.messages import (
    DatasetInfo,
    DeploymentInfo,
    EpochMetrics,
    Evaluation,
    JobChanged,
    ModelInfo,
    NodeInfo,
    TensorSpec,
)

_COLORS = {
    "online": "green", "ready": "green", "succeeded": "green", "running": "cyan", "loading": "cyan", "queued": "yellow",
    "suspect": "yellow", "offline": "red", "failed": "red", "cancelled": "magenta",
    "idle": "yellow", "evicted": "yellow", "withdrawn": "red", "retired": "yellow", "failing": "red",
}  # fmt: skip

PIPE_COLUMNS = 400


def show(renderable: RenderableType) -> None:
    """Print for people, on standard output. A pipe has no width: nothing is broken to fit into one."""
    if sys.stdout.isatty():
        Console().print(renderable)
    else:
        Console(soft_wrap=True, width=PIPE_COLUMNS).print(renderable)


def note(text: str) -> None:
    """A remark for people, on standard error, so that standard output stays what was asked for."""
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(text)


def emit(value: Any) -> None:
    """Print as JSON, on standard output."""
    sys.stdout.write(json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def error_line(error: PotluckError) -> str:
    """One clear sentence, for standard error."""
    return f"potluck: {error.message}\n"


def plain(value: Any) -> Any:
    """Structs, tuples and numpy values as JSON has them, every field present; what is not a finite number is null."""
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


def table(columns: Sequence[str], rows: Iterable[Sequence[RenderableType]], *, right: Sequence[str] = ()) -> Table:
    """A plain table; the columns named in `right` hold numbers."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        # Words wrap, but a number or a heading that is cut in two cannot be read.
        made.add_column(column, justify="right" if column in right else "left", overflow="fold", min_width=len(column))
    for row in rows:
        made.add_row(*row)
    return made


def colored(state: str) -> Text:
    return Text(state, style=_COLORS.get(state, ""))


def bytes_text(count: float) -> str:
    """As people read it: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def seconds_text(seconds: float) -> str:
    """As people read it: `1 h 05 min`, `2 min 03 s`, `4 s`."""
    whole = max(0, round(seconds))
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 60} min {whole % 60:02} s" if whole >= 60 else f"{whole} s"


def counted(count: float, one: str) -> str:
    """As people say it: `1 node`, `1,200 items`."""
    number = f"{count:,.0f}"
    return f"{number} {one}" if number == "1" else f"{number} {one}s"


def rate_text(items_per_second: float) -> str:
    """`1,200 items/s`."""
    return f"{counted(items_per_second, 'item')}/s"


def share(job: JobChanged) -> float | None:
    """How much of a job is done, 0 to 1; None where that is not known."""
    if job.state == "succeeded":
        return 1.0  # also where the coordinator was started anew, and remembers no counts
    return job.progress.done / job.progress.total if job.progress.total else None


def metrics_text(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def nodes_table(nodes: Iterable[NodeInfo]) -> Table:
    def row(node: NodeInfo) -> tuple[RenderableType, ...]:
        has = node.capacity
        gpus = ", ".join(f"{gpu.name} {bytes_text(gpu.memory_bytes)}" for gpu in has.gpus) or "-"
        state = Text.assemble(colored(node.state), ", jobs give way" if node.gives_way else "")
        return (
            node.node_id, state, has.hostname, str(has.cores), bytes_text(has.memory_bytes), gpus,
            f"{has.gflops:.0f}" if has.gflops else "?",
            has.runtimes.get("tensorflow", "none"), has.runtimes.get("litert", "none"),
            f"{node.cpu_percent:.0f} %", str(len(node.replicas)),
        )  # fmt: skip

    columns = (
        "node", "state", "host", "cores", "memory", "GPUs", "GFLOP/s", "TensorFlow", "LiteRT", "cpu", "replicas"
    )  # fmt: skip
    return table(columns, map(row, nodes), right=("cores", "memory", "GFLOP/s", "cpu", "replicas"))


def jobs_table(jobs: Iterable[JobChanged]) -> Table:
    def row(job: JobChanged) -> tuple[RenderableType, ...]:
        progress = job.progress
        done = share(job)
        end = job.ended_at or time.time()
        took = seconds_text(end - job.started_at) if job.started_at else "-"
        told = job.error.message if job.error else progress.message or metrics_text(progress.metrics)
        shown = "-" if done is None else f"{done:.0%}"
        return job.job_id, job.kind, colored(job.state), shown, took, ago_text(job.created_at), Text(told)

    columns = ("job", "kind", "state", "done", "took", "asked", "")
    return table(columns, map(row, jobs), right=("done", "took"))


def epochs_table(history: Iterable[EpochMetrics]) -> Table:
    """Two lines an epoch: its metrics, and what it took."""
    rows: list[tuple[RenderableType, ...]] = []
    samples = 0
    for epoch in history:
        took = (
            f"{counted(epoch.samples - samples, 'sample')} in {seconds_text(epoch.seconds)}",
            counted(epoch.rounds, "round"),
            f"{epoch.computing:.0%} computing",
            f"{bytes_text(epoch.exchanged_bytes)} exchanged",
        )
        samples = epoch.samples
        rows.append((str(epoch.epoch), Text.assemble(metrics_text(epoch.metrics), "\n", ("  ".join(took), "dim"))))
    return table(("epoch", ""), rows, right=("epoch",))


def ago_text(at: float) -> str:
    return f"{seconds_text(time.time() - at)} ago" if at else "-"


def models_table(models: Iterable[ModelInfo]) -> Table:
    def row(model: ModelInfo) -> tuple[RenderableType, ...]:
        signature = model.signature
        return (
            f"{model.name}:{model.version}",
            ", ".join(model.aliases) or "-",
            model.format,
            bytes_text(model.model.size),
            ", ".join(map(spec_text, signature.inputs)) if signature else "?",
            ", ".join(map(spec_text, signature.outputs)) if signature else "?",
            str(len(model.classes) or "-"),
            ago_text(model.created_at),
            metrics_text(model.metrics),
        )

    columns = ("model", "aliases", "format", "size", "inputs", "outputs", "classes", "made", "metrics")
    return table(columns, map(row, models), right=("size", "classes"))


def model_report(model: ModelInfo) -> Table:
    """Everything that the registry knows of a version."""
    signature, size, ref = model.signature, model.image, model.model
    images = f"{size.height}x{size.width}x{size.channels}, times {size.scale:g}" if size else ""
    rows: list[tuple[str, str]] = [
        ("model", f"{model.name}:{model.version}"),
        ("aliases", ", ".join(f"{model.name}:{alias}" for alias in model.aliases)),
        ("tags", tags_text(model.tags)),
        ("format", model.format),
        ("from", model.source),
        (
            "made",
            f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(model.created_at))} ({ago_text(model.created_at)})",
        ),
        ("size", f"{bytes_text(ref.size)} ({ref.size:,} bytes)"),
        ("sha256", ref.sha256),
        (
            "inputs",
            "\n".join(map(spec_text, signature.inputs)) if signature else "not known before it is deployed once",
        ),
        ("outputs", "\n".join(map(spec_text, signature.outputs)) if signature else ""),
        ("images", images),
        ("recordings", f"{model.rate:,} samples a second" if model.rate else ""),
        ("classes", ", ".join(model.classes)),
        ("metrics", metrics_text(model.metrics)),
        ("held by", "\n".join(ref.holders)),
    ]
    made = Table(box=None, pad_edge=False, show_header=False)
    made.add_column("", style="bold")
    made.add_column("", overflow="fold")
    for what, said in rows:
        if said:
            made.add_row(what, Text(said))
    return made


def tags_text(tags: Mapping[str, str]) -> str:
    return "  ".join(f"{key}={value}" for key, value in sorted(tags.items()))


def spec_text(spec: TensorSpec) -> str:
    """`images FP32 [?, 32, 32, 3]`."""
    return f"{spec.name} {spec.datatype} [{', '.join('?' if size < 0 else str(size) for size in spec.shape)}]"


def deployments_table(deployments: Iterable[DeploymentInfo]) -> Table:
    """A deployment a line, with its replicas below each other, and below them what there is to say."""

    def row(found: DeploymentInfo) -> tuple[RenderableType, ...]:
        ready = sum(replica.state == "ready" for replica in found.replicas)
        where = [
            Text.assemble(
                replica.node_id, " ", colored(replica.state), f" {replica.error.message}" if replica.error else ""
            )
            for replica in found.replicas
        ]
        said = [Text(found.reason, style="dim")] if found.reason else []
        wanted = f"{found.min_replicas}..{found.max_replicas}" if found.max_replicas else str(found.wanted or "all")
        share = f" {found.weight} %" if found.role in ("stable", "canary") else ""
        return (
            found.name, colored(found.state), f"{found.role or '-'}{share}", f"{ready}/{wanted}",
            bytes_text(found.resident_bytes) if found.resident_bytes else "?",
            str(found.queued), milliseconds_text(found.queue_seconds), milliseconds_text(found.p50_seconds),
            milliseconds_text(found.p99_seconds), f"{found.failure_rate:.1%}", str(found.served),
            Text("\n").join([*where, *said]),
        )  # fmt: skip

    columns = (
        "deployment", "state", "traffic", "ready", "memory", "queued", "waits", "p50", "p99", "failed", "served",
        "replicas",
    )  # fmt: skip
    return table(columns, map(row, deployments), right=columns[3:-1])


def milliseconds_text(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds else "-"


def datasets_table(datasets: Iterable[DatasetInfo]) -> Table:
    def row(data: DatasetInfo) -> tuple[RenderableType, ...]:
        classes = ", ".join(data.classes[:10]) + (", ..." if len(data.classes) > 10 else "")
        here = not data.nodes  # of what lives on nodes, neither size nor what was left out is known
        sizes = (str(data.shards), bytes_text(data.size_bytes)) if here else ("-", "-")
        where = "coordinator" if here else ", ".join(data.nodes)
        skipped = str(data.skipped) if here else "-"
        return data.name, data.kind, str(data.count), *sizes, classes or "-", skipped, where

    columns = ("data set", "kind", "items", "shards", "size", "classes", "skipped", "lives on")
    return table(columns, map(row, datasets), right=("items", "shards", "size", "skipped"))


def evaluation_report(evaluation: Evaluation) -> Group:
    """Metrics, precision, recall and F1 for each class, and the confusion matrix (rows: the truth)."""
    parts: list[RenderableType] = [
        Text(f"{counted(evaluation.count, 'item')}  {metrics_text(evaluation.metrics)}", style="bold")
    ]
    if evaluation.classes:
        rows = [
            (score.label, f"{score.precision:.4f}", f"{score.recall:.4f}", f"{score.f1:.4f}", str(score.support))
            for score in evaluation.classes
        ]
        columns = ("class", "precision", "recall", "F1", "items")
        parts += ["", table(columns, rows, right=columns[1:])]
    if evaluation.confusion:
        parts += ["", confusion_table(evaluation)]
    return Group(*parts)


def change_text(name: str, before: Evaluation, after: Evaluation, data: str) -> str:
    """How a model that was converted does, and how what it was made of does, in one line."""
    told = ("accuracy", "mae", "mse")  # of one of several outputs with its name before: `size_mae`
    both = [name for name in after.metrics if name in before.metrics and name.rpartition("_")[2] in told]
    changes = ", ".join(
        f"{metric} {after.metrics[metric]:.4f} instead of {before.metrics[metric]:.4f} "
        f"({after.metrics[metric] - before.metrics[metric]:+.4f})"
        for metric in (["accuracy"] if "accuracy" in both else both)
    )
    return f"{name}: {changes} on {counted(after.count, 'item')} of {data}"


def confusion_table(evaluation: Evaluation) -> Table:
    """Rows are the truth, columns what was said; the diagonal is right."""
    labels = [score.label for score in evaluation.classes]
    labels += [str(index) for index in range(len(labels), len(evaluation.confusion))]
    made = Table(box=None, pad_edge=False, header_style="bold", title="confusion (rows: truth)", title_justify="left")
    made.add_column("")
    for label in labels:
        made.add_column(label, justify="right")
    for index, row in enumerate(evaluation.confusion):
        cells = [
            Text(str(count), style="bold green" if column == index else "red" if count else "dim")
            for column, count in enumerate(row)
        ]
        made.add_row(Text(labels[index], style="bold"), *cells)
    return made
