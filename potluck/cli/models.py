"""`potluck models`, `deploy`, `undeploy`, `deployments`."""

from __future__ import annotations

from typing import Annotated

import typer

from potluck.cli.session import Json, session


def models(context: typer.Context, as_json: Json = False) -> None:
    """List the registered models."""
    from potluck.cli import output

    with session(context).client() as client:
        found = client.models()
    if as_json:
        output.emit(found)
    elif found:
        output.show(output.models_table(found))
    else:
        output.note(
            "no models yet: `potluck train --name NAME` registers one, `potluck deploy FILE.keras --name NAME` too"
        )


def deploy(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A registered `name` or `name:version`, or a .keras file.")],
    replicas: Annotated[int, typer.Option(min=0, help="On how many nodes; 0: on all.")] = 1,
    name: Annotated[str | None, typer.Option(help="For a file: register it under this name.")] = None,
    as_json: Json = False,
) -> None:
    """Keep a model loaded on some nodes, ready to answer."""
    from potluck.cli import following, output

    with session(context).client() as client:
        job = client.deploy(model, replicas, name=name)
        following.follow(job, quiet=as_json)
        deployment = job.result().deployment
        found = [entry for entry in client.deployments() if entry.name == deployment]
    if as_json:
        output.emit(found[0] if found else {"name": deployment})
    else:
        output.show(output.deployments_table(found))


def undeploy(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="`name` (every version) or `name:version`.")],
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
