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
        str, typer.Option(metavar="N|all|MIN..MAX", help="On how many nodes: a number, all, or as the load asks for.")
    ] = "1",
    name: Annotated[str | None, typer.Option(help="For a file: register it under this name.")] = None,
    canary: Annotated[
        int | None, typer.Option(min=1, max=100, metavar="PERCENT", help="Let it answer so many of the questions.")
    ] = None,
    shadow: Annotated[bool, typer.Option("--shadow", help="Let it have copies of the questions, to measure.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the version deployed that it replaces.")] = False,
    rollback_factor: Annotated[
        float | None, typer.Option(min=0, help="Withdraw it when it does so many times worse; 0: never (default 2).")
    ] = None,
    watch: Annotated[
        float | None,
        typer.Option(min=0, metavar="SECONDS", help="So long the version before is kept to go back to (default 30)."),
    ] = None,
    queue: Annotated[
        float | None,
        typer.Option(min=0, metavar="SECONDS", help="With MIN..MAX: more replicas while requests wait longer (0.2)."),
    ] = None,
    idle: Annotated[
        float | None,
        typer.Option(min=0, metavar="SECONDS", help="Hold none after so long without a request, until the next one."),
    ] = None,
    objective: Annotated[
        str | None, typer.Option(metavar="TIME", help="How long an answer may take: 50ms, or 0.05 (seconds).")
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="int8",
            help="Deploy NAME-int8 instead: a LiteRT model, made now, of a quarter of the size.",
            autocompletion=completion.words("int8"),
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="With --quantize: data that show what is usual (those that it was trained on).",
            autocompletion=completion.data,
        ),
    ] = None,
    evaluation: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="With --quantize: measure both models on these (on the former).",
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
    deploying.fields(replicas, options)  # what is wrong is said before anything is looked for
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
    """Withdraw the canary or shadow of a model, else go back to the version before."""
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
        raise typer.BadParameter(f"{text!r} is no time between 0 and an hour: write 50ms, or 0.05 (seconds)")
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
        output.note("nothing is deployed: `potluck deploy MODEL` does it")
