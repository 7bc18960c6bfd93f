"""`potluck deploy`, `undeploy`, `deployments`."""

from __future__ import annotations

from typing import Annotated

import typer

from potluck.cli.session import Json, session


def deploy(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="A registered `name`, `name:version` or `name:alias`, or a model's file.")
    ],
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
    model: Annotated[str, typer.Argument(help="`name` (every version), `name:version` or `name:alias`.")],
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
