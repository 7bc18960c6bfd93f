"""`potluck models [show|add|export|alias|tag|delete]`: the registry."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from potluck.cli import completion
from potluck.cli.session import ImageSize, Json, image_size, session
from potluck.cli.suggesting import Command, CommandGroup

models = typer.Typer(
    cls=CommandGroup,
    invoke_without_command=True,
    help="List the registered models; show, add, export, name, tag or delete one.",
)

Version = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="`name` (its newest version), `name:version` or `name:alias`.",
        autocompletion=completion.models,
    ),
]
Tags = Annotated[list[str] | None, typer.Option("--tag", metavar="KEY=VALUE", help="A tag. Repeat it for more.")]


@models.callback()
def list_models(context: typer.Context, as_json: Json = False) -> None:
    if context.invoked_subcommand is not None:
        return
    from potluck.cli import output

    with session(context).client() as client:
        found = client.models()
    if as_json:
        output.emit(found)
    elif found:
        output.show(output.models_table(found))
    else:
        output.note(
            "no models yet: `potluck train --name NAME` registers one, `potluck models add FILE --name NAME` too"
        )


@models.command("show", cls=Command)
def show(context: typer.Context, model: Version, as_json: Json = False) -> None:
    """Show everything that is known about a model, and where its bytes are."""
    from potluck.cli import output

    with session(context).client() as client:
        info = client.get_model(model)
    if as_json:
        output.emit(info)
    else:
        output.show(output.model_report(info))


@models.command("add", cls=Command)
def add(
    context: typer.Context,
    path: Annotated[
        str, typer.Argument(metavar="FILE", help="A .keras, .h5 or .tflite file, or a SavedModel's folder.")
    ],
    name: Annotated[str | None, typer.Option(help="The model's name (default: the file's or folder's).")] = None,
    tag: Tags = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,C|FILE", help="The classes in the order of the scores, or a file with one class per line."
        ),
    ] = None,
    image: ImageSize = None,
    source: Annotated[str | None, typer.Option(help="Where the model came from (default: the file's name).")] = None,
    as_json: Json = False,
) -> None:
    """Register a model as the next version of a name."""
    from potluck.cli import output

    size, tags, classes = image_size(image), read_tags(tag), read_labels(labels)
    with session(context).client() as client:
        info = client.register(Path(path), name, image=size, classes=classes, tags=tags, source=source)
    if as_json:
        output.emit(info)
    else:
        output.show(output.models_table([info]))


@models.command("export", cls=Command)
def export(
    context: typer.Context,
    model: Version,
    to: Annotated[
        Path, typer.Option("--output", "-o", help="The file; for a SavedModel the folder, which must be new or empty.")
    ],
    as_json: Json = False,
) -> None:
    """Write a model's file, or a SavedModel's folder, as it was registered."""
    from potluck.cli import output

    with session(context).client() as client:
        written = client.export(model, to)
    if as_json:
        output.emit({"model": model, "output": str(written)})
    else:
        output.show(f"{model} is in {written}")


@models.command("alias", cls=Command)
def alias(
    context: typer.Context,
    model: Version,
    alias: Annotated[
        str | None, typer.Argument(metavar="ALIAS", help="Its name for this version, such as prod.")
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove an alias: MODEL is name:alias.")] = False,
    as_json: Json = False,
) -> None:
    """Make name:ALIAS another name for this version: `potluck models alias digits:3 prod`."""
    from potluck.cli import output
    from potluck.errors import InvalidRequest

    if remove == (alias is not None):
        raise InvalidRequest("give an alias, as in `digits:3 prod`, or --remove one, as in `digits:prod --remove`")
    with session(context).client() as client:
        info = client.remove_alias(model) if alias is None else client.set_alias(model, alias)
    if as_json:
        output.emit(info)
    elif alias is None:
        output.show(f"removed alias {model}, which was {info.name}:{info.version}")
    else:
        output.show(f"{info.name}:{alias} is {info.name}:{info.version}")


@models.command("tag", cls=Command)
def tag(
    context: typer.Context,
    model: Version,
    tags: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    remove: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Remove this tag. Repeat it for more.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Set tags of a version, or remove them."""
    from potluck.cli import output

    said = read_tags(tags)
    with session(context).client() as client:
        info = client.tag_model(model, said, remove=remove or ())
    if as_json:
        output.emit(info)
    else:
        output.show(f"{info.name}:{info.version}  {output.tags_text(info.tags) or 'has no tags'}")


@models.command("delete", cls=Command)
def delete(
    context: typer.Context,
    model: Version,
    every_version: Annotated[bool, typer.Option("--all", help="Delete every version of the name.")] = False,
    as_json: Json = False,
) -> None:
    """Delete a version that no deployment, alias or job uses. Its number is never used again."""
    from potluck.cli import output

    with session(context).client() as client:
        deleted = client.delete_model(model, every_version=every_version)
    if as_json:
        output.emit({"deleted": deleted})
    else:
        output.show(f"deleted {', '.join(deleted)}")


def read_tags(given: list[str] | None) -> dict[str, str]:
    """A map from `key=value` texts. Raises InvalidRequest."""
    from potluck.errors import InvalidRequest

    tags: dict[str, str] = {}
    for text in given or ():
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise InvalidRequest(f"tag {text!r}: write KEY=VALUE, as in team=garden")
        tags[key] = value
    return tags


def read_labels(text: str | None) -> tuple[str, ...]:
    """The classes from `a,b,c`, or from the lines of a file. Raises InvalidRequest."""
    from potluck.errors import InvalidRequest

    if text is None:
        return ()
    path = Path(text)
    try:
        if "," not in text and path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            return tuple(line.strip() for line in lines if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"--labels {text}: the file cannot be read as text in UTF-8: {error}") from error
    labels = tuple(label.strip() for label in text.split(","))
    if len(labels) < 2 or not all(labels):
        what = "this is a folder; name a file with one class per line" if path.is_dir() else "there is no such file"
        raise InvalidRequest(f"--labels {text!r}: {what}; or write the classes as a,b,c")
    return labels
