"""`potluck config check|show`: the settings of the daemons and of clients, and where each value came from."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from potluck.cli.session import Json, Session, session
from potluck.cli.suggesting import Command, CommandGroup

if TYPE_CHECKING:
    from potluck.settings import NetworkSettings
    from potluck.settings_sources import Found

SYSTEM = Path("/etc/potluck")
"""Where the units of systemd look for settings."""

config = typer.Typer(cls=CommandGroup, no_args_is_help=True, help="Check the settings, or show them all.")


class Role(StrEnum):
    """Whose settings; a file of settings is named after its role."""

    node = "node"
    coordinator = "coordinator"
    client = "client"


AskedRole = Annotated[
    Role | None, typer.Option(help="Whose settings they are (default: as the file's name says).", show_default=False)
]
File = Annotated[
    Path | None,
    typer.Argument(metavar="[FILE]", help=f"The file (default: {SYSTEM}/ROLE.toml, where there is one)."),
]


@config.command("check", cls=Command)
def check(context: typer.Context, file: File = None, role: AskedRole = None, as_json: Json = False) -> None:
    """Say what is wrong with the settings: file, line, and what is expected. Exit code 2 if anything is."""
    from potluck.cli import output
    from potluck.errors import InvalidSettings

    results = []
    for one_role, path in _asked(role, file):
        problems = _problems(one_role, path, session(context))
        results.append({"role": str(one_role), "file": str(path or ""), "problems": problems})
        if not as_json:
            for problem in problems:
                output.note(problem["text"])
            if not problems:
                output.show(f"{path or f'no file of the {one_role}'}: the settings are right")
    if as_json:
        output.emit(results)
    if any(result["problems"] for result in results):
        raise typer.Exit(InvalidSettings.exit_code)


@config.command("show", cls=Command)
def show(context: typer.Context, file: File = None, role: AskedRole = None, as_json: Json = False) -> None:
    """Show every setting, its value, and where that came from: a line of a file, the environment, the command line, or the default."""
    from potluck.cli import output
    from potluck.settings_sources import toml

    results = []
    for one_role, path in _asked(role, file):
        settings = list(_find(one_role, path, session(context)).each())
        results.append(
            {
                "role": str(one_role),
                "file": str(path or ""),
                "settings": [
                    {
                        "setting": one.name,
                        "value": one.value,
                        "from": one.origin.kind,
                        "name": one.origin.name,
                        "line": one.origin.line or None,
                    }
                    for one in settings
                ],
            }
        )
        if not as_json:
            lines = [(f"{one.name} = {toml(one.value)}", one.origin) for one in settings]
            width = min(40, max(len(line) for line, _ in lines))
            told = [f"{line:<{width}}  # {origin}" for line, origin in lines]
            output.show("\n".join([f"# {one_role}: {path or 'no file'}", *told]))
    if as_json:
        output.emit(results)


def _asked(role: Role | None, file: Path | None) -> list[tuple[Role, Path | None]]:
    """The settings that are meant. Raises InvalidRequest where a file's role is unknown, NotFound where nothing is configured."""
    from potluck.client.connection import client_file
    from potluck.errors import InvalidRequest, NotFound

    if file is not None:
        named = role or next((one for one in Role if one in file.name), None)
        if named is None:
            raise InvalidRequest(f"whose settings are in {file}? say it with --role node, coordinator or client")
        return [(named, file)]
    usual = {one: SYSTEM / f"{one}.toml" for one in (Role.node, Role.coordinator)} | {Role.client: client_file()}
    there = {one: path if path.exists() else None for one, path in usual.items()}
    if role is not None:
        return [(role, there[role])]
    if not any(there.values()):
        places = ", ".join(map(str, usual.values()))
        raise NotFound(f"there is no file of settings ({places}): name one, or a --role to see its defaults")
    return [(one, path) for one, path in there.items() if path is not None]


def _problems(role: Role, path: Path | None, given: Session) -> list[dict[str, Any]]:
    """What is wrong with these settings, as JSON has it."""
    from potluck.settings_sources import WrongSettings

    try:
        _find(role, path, given)
    except WrongSettings as error:
        return [
            {
                "setting": problem.setting,
                "from": problem.origin.kind,
                "name": problem.origin.name,
                "line": problem.origin.line or None,
                "message": problem.message,
                "text": str(problem),
            }
            for problem in error.problems
        ]
    return []


def _find(role: Role, path: Path | None, given: Session) -> Found[NetworkSettings]:
    """Settings as this role reads them, in this environment, with the options before the command. Raises WrongSettings."""
    from potluck.settings import ClientSettings, CoordinatorSettings, NodeSettings
    from potluck.settings_sources import find

    flags = {"cluster": given.cluster, "seeds": [given.seed] if given.seed else None}
    match role:
        case Role.node:
            return find(NodeSettings, path, flags)
        case Role.coordinator:
            return find(CoordinatorSettings, path, flags)
        case Role.client:
            return find(ClientSettings, path, flags | {"timeout_seconds": given.timeout})
