"""A training job's history for TensorBoard, with the runs and names of Keras' callback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from potluck import extras
from potluck.errors import InvalidRequest
from potluck.wire.questions import JobEnded

RUNS = ("train", "validation")

Scalar = tuple[str, float, int, float]
"""(Tag, value, step, Unix time)."""


def check_folder(folder: Path, job_id: str) -> Path:
    """`folder`, checked. Raises InvalidRequest where nothing can be written, or where another run's event files are: TensorBoard
    would draw both as one line.
    """
    _writer()
    for run in RUNS:
        others = [path.name for path in folder.glob(f"{run}/*tfevents*") if not path.name.endswith(_suffix(job_id))]
        if others:
            raise InvalidRequest(f"{folder / run} has event files of another run ({others[0]}): name another folder")
    if folder.exists() and not folder.is_dir():
        raise InvalidRequest(f"{folder} is a file: name a folder for TensorBoard's event files")
    return folder


def save(ended: JobEnded, folder: Path) -> None:
    """Write `train` and, if there is one, `validation` below `folder`; replaces earlier files of the same job.

    Raises InvalidRequest where they cannot be written.
    """
    check_folder(folder, ended.job_id)
    try:
        for run, found in scalars(ended).items():
            for old in folder.glob(f"{run}/*tfevents*{_suffix(ended.job_id)}"):
                old.unlink()
            if not found:
                continue
            with _writer()(str(folder / run), filename_suffix=_suffix(ended.job_id)) as writer:
                for tag, value, step, at in found:
                    writer.add_scalar(tag, value, step, walltime=at)
    except OSError as error:
        raise InvalidRequest(f"event files cannot be written to {folder}: {error.strerror or error}") from error


def scalars(ended: JobEnded) -> dict[str, list[Scalar]]:
    """Scalars by run. Steps count from 0, for epochs (as in Keras) and for rounds."""
    found: dict[str, list[Scalar]] = {run: [] for run in RUNS}
    at = ended.started_at
    for epoch in ended.history:
        at += epoch.seconds
        for name, value in epoch.metrics.items():
            metric = name.removeprefix("val_")
            run = "train" if name == metric else "validation"
            found[run].append((f"epoch_{metric}", value, epoch.epoch - 1, at))
    found["train"] += _of_rounds(ended)
    return found


def _of_rounds(ended: JobEnded) -> Iterator[Scalar]:
    for part in ended.rounds:
        measured = {
            **part.metrics,
            "samples": float(part.samples),
            "outer_learning_rate": part.outer_learning_rate,
            "outer_momentum": part.outer_momentum,
            "rejected": float(len(part.rejected)),
        }
        for name, value in measured.items():
            yield f"round_{name}", value, part.round, part.closed_at


def _suffix(job_id: str) -> str:
    return f".potluck-{job_id}"


def _writer() -> Any:
    # tensorboardX, not TensorFlow's own writer: it is small and quick to import, and a client may not have TensorFlow.
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise InvalidRequest(f"writing event files needs tensorboardX: {extras.install('tensorboard')}") from error
    return SummaryWriter
