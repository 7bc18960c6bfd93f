"""`potluck deploy`, `promote`, `rollback`, `undeploy`, `deployments`."""

from __future__ import annotations

from typing import Annotated

import typer

from potluck.cli import completion
from potluck.cli.session import Json, session


def deploy(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="A registered `name`, `name:version` or `name:alias`, or a model's file.",
            autocompletion=completion.model_files,
        ),
    ],
    replicas: Annotated[
        str, typer.Option(metavar="N|all|MIN..MAX", help="On how many nodes: a number, all, or MIN..MAX by load.")
    ] = "1",
    name: Annotated[str | None, typer.Option(help="For a file: register it under this name.")] = None,
    canary: Annotated[
        int | None,
        typer.Option(min=1, max=100, metavar="PERCENT", help="Let it answer this percentage of the requests."),
    ] = None,
    shadow: Annotated[bool, typer.Option("--shadow", help="Send it copies of the requests, to measure it.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the version that it replaces deployed.")] = False,
    rollback_factor: Annotated[
        float | None, typer.Option(min=0, help="Withdraw it when it is this many times worse; 0: never (default 2).")
    ] = None,
    watch: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="SECONDS", help="How long to keep the version before, to go back to it (default 30)."
        ),
    ] = None,
    queue: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="With MIN..MAX: add replicas while requests wait longer than this (default 0.2).",
        ),
    ] = None,
    idle: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="Unload all replicas after this long without a request, until the next request.",
        ),
    ] = None,
    objective: Annotated[
        str | None, typer.Option(metavar="TIME", help="How long an answer may take: 50ms, or 0.05 (seconds).")
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="int8",
            help="Deploy NAME-int8 instead: a LiteRT model made from this one now, a quarter of its size.",
            autocompletion=completion.words("int8"),
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="With --quantize: data like the usual inputs (default: the model's training data).",
            autocompletion=completion.data,
        ),
    ] = None,
    evaluation: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="With --quantize: data to measure both models on (default: those of --calibration).",
            autocompletion=completion.data,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Keep a model loaded on some nodes, ready to answer; its version takes over from the one before."""
    from potluck.cli import curl, following, output
    from potluck.client import deploying
    from potluck.client.deploying import DeployOptions

    given = {
        "canary": canary, "shadow": shadow, "keep": keep, "rollback_factor": rollback_factor,
        "watch_seconds": watch, "queue_seconds": queue, "idle_seconds": idle,
        "objective": None if objective is None else _seconds(objective),
        "quantize": quantize, "calibration": calibration, "evaluation": evaluation,
    }  # fmt: skip
    options = DeployOptions(**{key: value for key, value in given.items() if value is not None})  # type: ignore[typeddict-item]
    deploying.fields(replicas, options)  # wrong options are refused before anything is looked up
    with session(context).client() as client:
        job = client.deploy(model, replicas, name=name, **options)
        early = curl.Early(client)
        ended = following.ended(job, as_json, verbose=session(context).verbose, beside=early.lines)
        deployment = ended.deployment
        found = [entry for entry in client.deployments() if entry.name == deployment]
        lines = [] if as_json else curl.lines(client, deployment)
    if as_json:
        output.emit(ended if quantize else found[0] if found else {"name": deployment})
    else:
        output.show(output.deployments_table(found))
        if ended.before is not None and ended.evaluation is not None:
            output.show(output.change_text(ended.registered, ended.before, ended.evaluation, ended.evaluated_on))
        for line in lines:
            output.show(line)


def promote(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A model's plain name.", autocompletion=completion.deployments)],
    as_json: Json = False,
) -> None:
    """Make the canary (or shadow) of a model the version that answers."""
    from potluck.cli import output

    with session(context).client() as client:
        found = client.promote(model)
    output.emit(found) if as_json else output.show(output.deployments_table(found))


def rollback(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A model's plain name.", autocompletion=completion.deployments)],
    as_json: Json = False,
) -> None:
    """Withdraw the canary or shadow of a model; if it has none, go back to the version before."""
    from potluck.cli import output

    with session(context).client() as client:
        found = client.roll_back(model)
    output.emit(found) if as_json else output.show(output.deployments_table(found))


def _seconds(text: str) -> float:
    """`50ms`, `2s` or a number of seconds. Raises BadParameter."""
    number, scale = (text[:-2], 1e-3) if text.endswith("ms") else (text.removesuffix("s"), 1.0)
    try:
        seconds = float(number) * scale
    except ValueError:
        seconds = -1.0
    if not 0.0 <= seconds <= 3600.0:
        raise typer.BadParameter(f"{text!r} is not a time between 0 and an hour: write 50ms, or 0.05 (seconds)")
    return seconds


def undeploy(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="`name` (every version), `name:version` or `name:alias`.", autocompletion=completion.deployments
        ),
    ],
    as_json: Json = False,
) -> None:
    """Unload a model from all nodes."""
    from potluck.cli import output

    with session(context).client() as client:
        gone = client.undeploy(model)
    if as_json:
        output.emit({"undeployed": gone})
    else:
        output.show(f"undeployed {', '.join(gone)}")


def deployments(context: typer.Context, as_json: Json = False) -> None:
    """List what is deployed, and where."""
    from potluck.cli import output

    with session(context).client() as client:
        found = client.deployments()
    if as_json:
        output.emit(found)
    elif found:
        output.show(output.deployments_table(found))
    else:
        output.note("nothing is deployed: `potluck deploy MODEL` deploys a model")
