"""`potluck jobs`, `job`, `cancel`."""

from __future__ import annotations

from typing import Annotated

import typer

from potluck.cli.session import Json, session

JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id, as `potluck jobs` shows it.")]


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
        bool, typer.Option("--wait", help="Follow it until it ends; its error becomes the exit code.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show one job: its state, and its result when it has ended."""
    from potluck.cli import following, output
    from potluck.client.jobs import ENDED, job_error

    with session(context).client() as client:
        found = client.job(job_id)
        if wait and not as_json:
            following.follow(found)
        state = found.status()
        ended = found.result() if wait or state.state in ENDED else None
        if as_json:
            output.emit(ended or state)
            if wait and ended is not None and ended.state != "succeeded":
                raise job_error(ended)
            return
        output.show(output.jobs_table([state]))
        if ended is None:
            output.show(following.picture(state))
            return
        for epoch in ended.history:
            took = output.seconds_text(epoch.seconds)
            samples = output.counted(epoch.samples, "sample")
            output.show(f"epoch {epoch.epoch}  {output.metrics_text(epoch.metrics)}  {samples} in {took}")
        if ended.evaluation is not None:
            output.show(output.evaluation_report(ended.evaluation))
        for label, text in (("registered", ended.registered), ("deployment", ended.deployment)):
            if text:
                output.show(f"{label}: {text}")


def cancel(context: typer.Context, job_id: JobId, as_json: Json = False) -> None:
    """End a job."""
    from potluck.cli import output

    with session(context).client() as client:
        state = client.cancel(job_id)
    if as_json:
        output.emit(state)
    else:
        output.show(f"job {state.job_id} is {state.state}")
