"""`potluck jobs`, `job`, `cancel`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from potluck.cli import completion
from potluck.cli.session import Json, check_output, session

if TYPE_CHECKING:
    from potluck.client import Job
    from potluck.wire.questions import JobEnded

EPOCHS = 10
"""How many epochs of a job are shown without --verbose: the newest."""

JobId = Annotated[
    str,
    typer.Argument(
        metavar="ID",
        help="The job's id, as `potluck jobs` shows it, or a beginning of it that only this job has.",
        autocompletion=completion.jobs,
    ),
]


def jobs(context: typer.Context, as_json: Json = False) -> None:
    """List the jobs that the coordinator remembers."""
    from potluck.cli import output

    with session(context).client() as client:
        found = client.jobs()
    if as_json:
        output.emit(found)
    elif found:
        output.show(output.jobs_table(found))
    else:
        output.note("no jobs yet: `potluck train` makes one")


def job(
    context: typer.Context,
    job_id: JobId,
    wait: Annotated[
        bool, typer.Option("--wait", help="Follow the job until it ends; its error becomes the exit code.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw loss and metrics over the epochs into this .png, .svg or .pdf file."),
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write event files for TensorBoard into this folder.")
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE",
            help="Save the trained model as this .keras file, or predictions as .csv, .json, .npy or .npz.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Show one job: its state, its last epochs, and its result when it has ended; save its model or predictions."""
    from potluck.cli import following, output
    from potluck.client import event_files, plots
    from potluck.client.jobs import ENDED, job_error
    from potluck.errors import Conflict

    verbose = session(context).verbose
    last = None if verbose else EPOCHS
    if save is not None:
        check_output(save)

    if plot is not None:
        plots.check_path(plot)
    with session(context).client() as client:
        found = client.job(job_id)
        if tensorboard is not None:
            event_files.check_folder(tensorboard, found.id)
        if wait and not as_json:
            following.follow(found, verbose=verbose)
        state = found.status()
        ended = found.result() if wait or state.state in ENDED else None
        failed = wait and ended is not None and ended.state != "succeeded"
        if ended is None and (plot or tensorboard or save):
            raise Conflict(f"job {found.id} is {state.state}: its result comes when it ends. Add --wait to wait for it")
        if save is not None and ended is not None and not failed:
            output.note(f"saved as {_save(found, ended, save)}")
        if plot is not None and not failed:
            output.note(f"drawn: {found.plot(plot)}")
        if tensorboard is not None and not failed:
            output.note(f"written. To see it, type: tensorboard --logdir {found.tensorboard(tensorboard)}")
        if as_json:
            output.emit(ended or state)
            if ended is not None and failed:
                raise job_error(ended)
            return
        output.show(output.jobs_table([state]))
        if ended is None:
            output.show(following.picture(state, verbose=verbose))
            if state.kind == "train" and (epochs := found.epochs_so_far()):
                output.show(output.epochs_table(epochs, last))
            return
        if ended.history:
            output.show(output.epochs_table(ended.history, last))
        if ended.rounds and verbose:
            output.show(output.rounds_table(ended.rounds))
        if ended.best_epoch:
            output.show(f"the model is that of the best epoch, {ended.best_epoch}")
        for reason in following.left_out(state.progress):
            output.show(reason)
        if ended.before is not None and ended.evaluation is not None:
            output.show(output.change_text(ended.registered, ended.before, ended.evaluation, ended.evaluated_on))
        elif ended.evaluation is not None:
            output.show(output.evaluation_report(ended.evaluation))
        for label, text in (("registered", ended.registered), ("deployment", ended.deployment)):
            if text:
                output.show(f"{label}: {text}")


def _save(job: Job, ended: JobEnded, path: Path) -> Path:
    """Save a job's model or predictions; returns the path. Raises Conflict for other jobs, InvalidRequest, and the job's error."""
    from potluck.cli.predict import check_suffix, predicted, save
    from potluck.cli.train import check_keras
    from potluck.errors import Conflict

    if ended.kind == "predict":
        check_suffix(path)
        return save(path, predicted(job), job.keys, ended.classes)
    if ended.kind == "train":
        check_keras(path)
        return Path(job.model(path))
    raise Conflict(
        f"job {job.id} is of kind {ended.kind!r}: only models and predictions can be saved. --json prints the rest"
    )


def stop(context: typer.Context, job_id: JobId, as_json: Json = False) -> None:
    """End training after the current epoch, and keep its result."""
    from potluck.cli import output

    with session(context).client() as client:
        state = client.job(job_id).stop()
    if as_json:
        output.emit(state)
    elif state.state in ("queued", "running"):
        output.show(f"job {state.job_id} ends after epoch {state.progress.epoch}")
    else:
        output.show(f"job {state.job_id} had already ended: {state.state}")


def cancel(context: typer.Context, job_id: JobId, as_json: Json = False) -> None:
    """End a job now."""
    from potluck.cli import output

    with session(context).client() as client:
        state = client.cancel(job_id)
    if as_json:
        output.emit(state)
    elif state.state == "cancelled":
        output.show(f"job {state.job_id} is cancelled")
    else:
        output.show(f"job {state.job_id} had already ended: {state.state}")
