"""`potluck data add|list|remove`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from potluck.cli import completion
from potluck.cli.session import Json, session
from potluck.cli.suggesting import Command, CommandGroup

data = typer.Typer(
    cls=CommandGroup, no_args_is_help=True, help="Add data sets to the cluster, list them and remove them."
)


@data.command("add", cls=Command)
def add(
    context: typer.Context,
    path: Annotated[
        str,
        typer.Argument(
            help="A folder of class folders with images, .txt or .wav files, or an .npz, .csv, .parquet or TFRecord file."
        ),
    ],
    name: Annotated[str | None, typer.Option(help="The data set's name (default: the file's or folder's).")] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="The label's column or array, for tables and .npz. Repeat it for more outputs."),
    ] = None,
    sample_weight: Annotated[str | None, typer.Option(help="The column or array with the weight of each item.")] = None,
    as_json: Json = False,
) -> None:
    """Pack a data set into shards, and send it to the coordinator."""
    from rich.console import Console
    from rich.progress import Progress

    from potluck.cli import output
    from potluck.client.sources import is_here

    with session(context).client() as client:
        hidden = as_json or not sys.stderr.isatty()
        with Progress(console=Console(stderr=True), transient=True, disable=hidden) as bar:
            tasks = {what: bar.add_task(what, total=None) for what in ("packing", "sending")}

            def tell(what: str, done: int, total: int) -> None:
                bar.update(tasks[what], completed=done, total=total or None)

            info = client.add_data(path, name, target=target or None, sample_weight=sample_weight, progress=tell)
    if as_json:
        output.emit(info)
        return
    output.show(output.datasets_table([info]))
    if is_here(info.name):
        output.note(
            f"in this folder, DATA {info.name} means the {'folder' if Path(info.name).is_dir() else 'file'} of that name: "
            "to use the data set, work in another folder, or add it with another --name"
        )


@data.command("list", cls=Command)
def list_data(context: typer.Context, as_json: Json = False) -> None:
    """List the registered data sets."""
    from potluck.cli import output

    with session(context).client() as client:
        found = client.datasets()
    if as_json:
        output.emit(found)
    elif found:
        output.show(output.datasets_table(found))
    else:
        output.note("no data sets yet: `potluck data add PATH` adds one")


@data.command("remove", cls=Command)
def remove(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A registered data set.", autocompletion=completion.datasets)],
    as_json: Json = False,
) -> None:
    """Remove a data set that no job uses."""
    from potluck.cli import output

    with session(context).client() as client:
        client.remove_data(name)
    if as_json:
        output.emit({"removed": name})
    else:
        output.show(f"removed {name}")
