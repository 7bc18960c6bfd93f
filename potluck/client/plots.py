"""A training job's history as a picture: one panel per metric, training and validation over the epochs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from potluck import extras
from potluck.client import arguments
from potluck.errors import InvalidRequest
from potluck.wire.jobs import EpochMetrics
from potluck.wire.questions import JobEnded

SUFFIXES = (".png", ".svg", ".pdf")
PANEL_INCHES = (5.6, 3.6)
DOTS_PER_INCH = 150
EPOCHS_MARKED = 30
"""Up to this many epochs, each epoch is a dot on its line."""
_COLORS = {"training": "#1f6fb4", "validation": "#e0701a"}
_INK, _FAINT = "#333333", "#d9d9d9"


def check_path(path: Path) -> Path:
    """`path`, checked. Raises InvalidRequest where no picture can be drawn there: wrong suffix, no folder, or no matplotlib."""
    if path.suffix.lower() not in SUFFIXES:
        raise InvalidRequest(f"the plot {str(path)!r} must end in .png, .svg or .pdf: the suffix chooses the format")
    arguments.in_a_folder("the plot", path)
    _matplotlib()
    return path


def save(ended: JobEnded, path: Path) -> None:
    """Draw the history of a training job to `path`. Raises InvalidRequest where it cannot be written."""
    check_path(path)
    figure = _figure(ended)
    try:
        figure.savefig(path, dpi=DOTS_PER_INCH)
    except OSError as error:
        raise InvalidRequest(f"the plot cannot be saved as {path}: {error.strerror or error}") from error


def panels(history: tuple[EpochMetrics, ...]) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """Epochs and finite values, by metric (losses first) and by `training` or `validation`."""
    found: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for epoch in history:
        for name, value in epoch.metrics.items():
            metric = name.removeprefix("val_")
            lines = found.setdefault(metric, {})
            epochs, values = lines.setdefault("validation" if name != metric else "training", ([], []))
            if math.isfinite(value):
                epochs.append(epoch.epoch)
                values.append(value)
    return dict(sorted(found.items(), key=lambda item: "loss" not in item[0]))


def _matplotlib() -> tuple[Any, Any]:
    """(Figure, MaxNLocator). Does not use pyplot, which would choose a window system and keep every figure."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise InvalidRequest(f"a plot needs matplotlib: {extras.install('plot')}") from error
    return Figure, MaxNLocator


def _figure(ended: JobEnded) -> Any:
    make_figure, whole_numbers = _matplotlib()
    drawn = panels(ended.history)
    columns = min(2, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    figure = make_figure(figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows + 0.5), layout="constrained")
    title = f"job {ended.job_id}" + (f": {ended.registered}" if ended.registered else "")
    figure.suptitle(title if ended.state == "succeeded" else f"{title} ({ended.state})", color=_INK, parse_math=False)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    axes = list(grid.flat)
    for axis in axes[len(drawn) :]:
        axis.remove()
    for place, (axis, (metric, lines)) in enumerate(zip(axes, drawn.items(), strict=False)):
        _draw(axis, metric, lines, len(ended.history))
        if ended.best_epoch:
            axis.axvline(ended.best_epoch, color="#888888", linestyle=":", linewidth=1.2, label="best epoch", zorder=1)
        if place + columns >= len(drawn):
            axis.set_xlabel("epoch", color=_INK)
            axis.tick_params(labelbottom=True)
        axis.xaxis.set_major_locator(whole_numbers(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        axis.legend(frameon=False, labelcolor=_INK, fontsize="small")
    return figure


def _draw(axis: Any, metric: str, lines: dict[str, tuple[list[int], list[float]]], epochs_count: int) -> None:
    marker = "o" if epochs_count <= EPOCHS_MARKED else ""
    for label, (epochs, values) in lines.items():
        axis.plot(epochs, values, label=label, color=_COLORS[label], marker=marker, markersize=4, linewidth=1.8)
    axis.set_title(metric.replace("_", " "), loc="left", color=_INK, fontsize="medium", parse_math=False)
    axis.grid(axis="y", color=_FAINT, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#999999")
    axis.tick_params(colors=_INK, labelsize="small")
    axis.ticklabel_format(axis="y", useOffset=False)
