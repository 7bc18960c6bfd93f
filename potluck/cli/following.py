"""Shows a job's progress to people: one live picture on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from potluck.cli.interrupts import STATUS
from potluck.cli.listing import Line
from potluck.cli.output import bytes_text, emit, metrics_text, note, rate_text, seconds_text, share
from potluck.cli.session import same_cluster
from potluck.errors import InvalidData, InvalidModel, PotluckError
from potluck.wording import counted

if TYPE_CHECKING:
    from potluck.client import Job
    from potluck.wire.jobs import EpochMetrics, JobProgress
    from potluck.wire.questions import JobChanged, JobEnded

    Beside = Callable[[JobChanged], Iterable[str]]
    """Gives extra lines to print with a job's progress."""

BAR_COLUMNS = 20
"""Width of the bar: with the text beside it, the line fits into 60 columns."""
PLAIN_SECONDS = 5.0
"""In plain lines: print one this often while the epoch does not change."""


def follow(job: Job, *, quiet: bool = False, verbose: bool = False, beside: Beside = lambda state: ()) -> None:
    """Show a job on standard error until it ends; `verbose`: also what its strategy says. Raises the job's error.

    Ctrl-C leaves the job running and says so.
    """
    try:
        if quiet:
            job.wait()
        elif sys.stderr.isatty():
            _live(job, verbose, beside)
        else:
            for line in plain_lines(job.states(), time.monotonic, job.epochs_so_far, verbose=verbose, beside=beside):
                note(line)
        job.wait()
    except KeyboardInterrupt:
        shows, ends = (same_cluster(f"potluck {what} {job.id}") for what in ("job", "cancel"))
        note(f"interrupted: job {job.id} goes on. `{shows}` shows it, `{ends}` ends it")
        raise typer.Exit(STATUS) from None


def ended(job: Job, as_json: bool, *, verbose: bool = False, beside: Beside = lambda state: ()) -> JobEnded:
    """Follow a job to its end, and return its result. Raises the job's error; with `as_json`, prints the result first."""
    try:
        follow(job, quiet=as_json, verbose=verbose, beside=beside)
    except PotluckError as error:
        state = job.status()
        if state.state not in ("failed", "cancelled"):
            raise
        if as_json:
            emit(job.result())
        elif state.kind == "train" and state.progress.round and not isinstance(error, InvalidModel | InvalidData):
            note(f"to continue from its last round, repeat the command with --resume {job.id}")
        raise
    return job.result()


def name_data(job: Job, data: str, validation: str | None = None) -> None:
    """Tell under which names a user's files were packed as data sets for a job, and that these are removed with the job."""
    from potluck.client.sources import as_name
    from potluck.wire.jobs import Train

    given = {data: job.status().subject.data}
    if validation is not None and isinstance(job.asked, Train):
        given.setdefault(validation, job.asked.validation or "")
    for path, name in given.items():
        if as_name(path) is None:
            note(f"job {job.id}: {path} is packed as data set {name}, which is removed with the job")


def plain_lines(
    states: Iterable[JobChanged],
    clock: Callable[[], float],
    epochs_so_far: Callable[[], Sequence[EpochMetrics]] = tuple,
    *,
    verbose: bool = False,
    beside: Beside = lambda state: (),
) -> Iterator[str]:
    """A line when the state or the epoch changes, one every few seconds between, and one for each epoch that has ended."""
    said_at = float("-inf")
    key: tuple[object, ...] | None = None
    strategy = ""
    image = None
    ended = EndedEpochs(epochs_so_far)
    for state in states:
        progress = state.progress
        yield from ended.lines(state)
        if progress.image != image:
            image = progress.image
            yield f"{state.kind} {state.job_id} images {images_text(progress)}"
        if verbose and progress.strategy != strategy:
            strategy = progress.strategy
            yield f"{state.kind} {state.job_id} strategy {strategy}"
        out = (*progress.quarantined, *progress.waiting)
        now, new_key = clock(), (state.state, progress.epoch, progress.message, *out)
        if new_key == key and now - said_at < PLAIN_SECONDS:
            continue
        said_at, key = now, new_key
        yield f"{state.kind} {state.job_id} {state.state}  {progress_text(progress)}".rstrip()
        yield from beside(state)


class EndedEpochs:
    """Gives the metrics of each ended epoch once: the progress tells only of the current epoch."""

    def __init__(self, epochs_so_far: Callable[[], Sequence[EpochMetrics]]) -> None:
        self._epochs_so_far = epochs_so_far
        self._at = 0
        self._said = 0

    def lines(self, state: JobChanged) -> Iterator[str]:
        """Lines for the epochs that ended since the last call."""
        progress = state.progress
        last = state.state in ("succeeded", "failed", "cancelled")
        if state.kind != "train" or (progress.epoch <= max(1, self._at) and not last):
            self._at = self._at or progress.epoch
            return
        self._at = progress.epoch
        for epoch in self._epochs_so_far():
            if epoch.epoch > self._said:
                self._said = epoch.epoch
                yield f"epoch {epoch.epoch}/{progress.epochs}  {metrics_text(epoch.metrics)}"


def current_texts(progress: JobProgress) -> tuple[str, str]:
    """Metrics of the current epoch, and those of the last validation, which belong to an earlier epoch."""
    validated = {name: value for name, value in progress.metrics.items() if name.startswith("val_")}
    training = {name: value for name, value in progress.metrics.items() if name not in validated}
    return metrics_text(training), metrics_text(validated)


def progress_text(progress: JobProgress) -> str:
    """The whole progress in one line."""
    parts = []
    if progress.epochs:
        parts.append(f"epoch {progress.epoch}/{progress.epochs}")
    if progress.total:
        parts.append(f"{progress.done:,}/{counted(progress.total, 'item')} ({progress.done / progress.total:.0%})")
    if progress.items_per_second:
        parts.append(
            f"{rate_text(progress.items_per_second)} on {counted(len(progress.nodes) + progress.nodes_more, 'node')}"
        )
    if (left := seconds_left(progress)) is not None:
        parts.append(f"{seconds_text(left)} left")
    training, validated = current_texts(progress)
    parts += [training] if training else []
    parts += [f"(last validation: {validated})"] if validated else []
    if progress.exchanged_bytes:
        parts.append(f"{bytes_text(progress.exchanged_bytes)} exchanged")
    if progress.message:
        parts.append(progress.message)
    return "  ".join([*parts, *left_out(progress)])


def images_text(progress: JobProgress) -> str:
    """How images become the model's input; empty for other data."""
    from potluck.data.items import pixels_text

    return pixels_text(progress.image) if progress.image is not None else ""


def left_out(progress: JobProgress) -> list[str]:
    """A sentence for each node that takes no part."""
    waiting = {node: reason for node, reason in progress.waiting.items() if node not in progress.quarantined}
    return [
        *(f"{node} is left out: {reason}" for node, reason in progress.quarantined.items()),
        *(f"{node} takes no part now: {reason}" for node, reason in waiting.items()),
    ]


def seconds_left(progress: JobProgress) -> float | None:
    """Seconds that remain at the present speed; None when the speed is 0 or nothing remains."""
    if not progress.items_per_second or progress.done >= progress.total:
        return None
    return (progress.total - progress.done) / progress.items_per_second


def picture(state: JobChanged, *, verbose: bool = False) -> RenderableType:
    """A job now: a bar, what remains, the metrics, and each node's speed; `verbose`: also what its strategy says."""
    progress = state.progress
    bar = Table.grid(padding=(0, 2))
    done = share(state)
    epoch = f"epoch {progress.epoch}/{progress.epochs}" if progress.epochs else ""
    left = seconds_left(progress)
    bar.add_row(
        "",
        ProgressBar(total=1.0, completed=done or 0.0, width=BAR_COLUMNS, pulse=done is None),
        "" if done is None else f"{done:4.0%}",
        f"{seconds_text(left)} left" if left is not None else "",
    )
    lines: list[RenderableType] = [
        Line(Text.assemble((f"{state.kind} {state.job_id}", "bold"), f"  {state.state}  {epoch}".rstrip())),
        bar,
    ]
    training, validated = current_texts(progress)
    if training:
        lines.append(Line(Text(training, style="cyan"), indent=2))
    if validated:
        lines.append(Line(Text(f"last validation:  {validated}", style="cyan"), indent=2))
    totals = [rate_text(progress.items_per_second)] if progress.items_per_second else []
    if progress.exchanged_bytes:
        totals.append(f"{bytes_text(progress.exchanged_bytes)} exchanged")
    if totals:
        lines.append(Line("  ".join(totals), indent=2))
    lines += [
        Text(f"    {node:<24} {rate_text(speed):>18}", style="dim", no_wrap=True, overflow="ignore")
        for node, speed in progress.nodes.items()
    ]
    if progress.nodes_more:
        lines.append(Text(f"    and {counted(progress.nodes_more, 'node')} more", style="dim"))
    if progress.image:
        lines.append(Line(Text(f"images {images_text(progress)}", style="dim"), indent=2))
    if verbose and progress.strategy:
        lines.append(Line(Text(progress.strategy, style="dim"), indent=2))
    if progress.message:
        lines.append(Line(Text(progress.message, style="yellow"), indent=2))
    lines += [Line(Text(reason, style="red"), indent=2) for reason in left_out(progress)]
    return Group(*lines)


def _live(job: Job, verbose: bool, beside: Beside) -> None:
    console = Console(stderr=True)
    ended = EndedEpochs(job.epochs_so_far)
    shown: RenderableType = Spinner("dots", f"job {job.id}")

    def now() -> RenderableType:
        """The last picture, and below it the reason where no news comes."""
        trouble = job.trouble()
        return Group(shown, Line(Text(f"no news: {trouble}", style="red"), indent=2)) if trouble else shown

    with Live(get_renderable=now, console=console, refresh_per_second=8) as live:
        for state in job.states():
            for line in ended.lines(state):
                live.console.print(Line(line))
            for line in beside(state):  # a user may copy these lines: a terminal gives a long line back whole
                live.console.print(Text(line), soft_wrap=True)
            shown = picture(state, verbose=verbose)
            live.refresh()


@contextmanager
def waiting(text: str, *, quiet: bool = False) -> Iterator[None]:
    """A spinner on a terminal while something takes a moment."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    with Console(stderr=True).status(text):
        yield
