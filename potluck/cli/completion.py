"""Shell completion of ids and names: asks the cluster, for a moment, for those that it has now.

Where no cluster answers, it silently offers nothing.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from potluck.errors import PotluckError
from potluck.wording import counted

if TYPE_CHECKING:
    from potluck.client.connection import Connection

SECONDS = 1.0
"""How long completion waits for the cluster: nobody waits longer for a list to choose from."""

Found = list[tuple[str, str]]
"""Pairs of a word that can be typed, and its description."""

_ASKED = "_POTLUCK_COMPLETE"
"""Variables that the shells' completion scripts set."""
_BREAKS = ":="


def run(program: Callable[[], None]) -> None:
    """Run the command line; where bash asks for completions, prepare the words and the answers for bash.

    Bash ends words at `:` and `=` (COMP_WORDBREAKS); typer does not. Bash replaces only the last part of a word with the answer.
    So the parts are joined before typer sees them, and the part that bash keeps is cut off the answers.
    """
    if os.environ.get(_ASKED) != "complete_bash":
        program()
        return
    words, at, stands = joined(os.environ.get("COMP_WORDS", "").split("\n"), int(os.environ.get("COMP_CWORD") or 0))
    os.environ |= {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(at)}
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            program()
    finally:
        sys.stdout.write("".join(line.removeprefix(stands) for line in said.getvalue().splitlines(keepends=True)))


def joined(parts: Sequence[str], at: int) -> tuple[list[str], int, str]:
    """(whole words, index of the word with `parts[at]`, its start that bash keeps). An empty part starts a word: a space came before."""
    words: list[str] = []
    place, stands, open_ended = at, "", False
    for number, part in enumerate(parts):
        sign = bool(part) and not part.strip(_BREAKS)
        if words and (sign or (part and open_ended)):
            words[-1] += part
        else:
            words.append(part)
        if number == at:
            place = len(words) - 1
            stands = words[-1] if sign else words[-1].removesuffix(part)
        open_ended = sign
    return words, place, stands


def words(*choices: str) -> Callable[[str], list[str]]:
    """Completion for an option that takes one of these words."""

    def offered(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return offered


def jobs(context: typer.Context, incomplete: str) -> Found:
    """Jobs by id, newest first."""

    async def ask(connection: Connection) -> Found:
        from potluck.client import listings

        found = reversed(await listings.jobs(connection))
        return [(job.job_id, f"{job.kind} {job.subject.name or job.subject.model} {job.state}") for job in found]

    return _offered(context, incomplete, ask)


def models(context: typer.Context, incomplete: str) -> Found:
    """Registered models, their versions and aliases."""

    async def ask(connection: Connection) -> Found:
        from potluck.client import listings

        found: Found = []
        for info in await listings.models(connection):
            found += [(info.name, info.format), (f"{info.name}:{info.version}", info.source)]
            found += [(f"{info.name}:{alias}", f"version {info.version}") for alias in info.aliases]
        return list(dict(reversed(found)).items())[::-1]

    return _offered(context, incomplete, ask)


def model_files(context: typer.Context, incomplete: str) -> Found:
    """Registered models, and files."""
    return models(context, incomplete) + list(_files(incomplete))


def deployments(context: typer.Context, incomplete: str) -> Found:
    """Deployed models, by plain name and by version."""

    async def ask(connection: Connection) -> Found:
        from potluck.client import listings

        found = await listings.deployments(connection)
        plain = dict.fromkeys(one.name.partition(":")[0] for one in found)
        return [*((name, "") for name in plain), *((one.name, one.state) for one in found)]

    return _offered(context, incomplete, ask)


def nodes(context: typer.Context, incomplete: str) -> Found:
    """Nodes by id."""

    async def ask(connection: Connection) -> Found:
        from potluck.client import listings

        return [(node.node_id, node.state) for node in (await listings.nodes(connection))[0]]

    return _offered(context, incomplete, ask)


def clients(context: typer.Context, incomplete: str) -> Found:
    """Clients of a closed cluster by name."""

    async def ask(connection: Connection) -> Found:
        from potluck.client import listings

        found = [one for one in await listings.members(connection) if not one.removed_at]
        return [(name, one.role) for one in found if (name := one.identity.removeprefix("client:")) != one.identity]

    return _offered(context, incomplete, ask)


def tokens(context: typer.Context, incomplete: str) -> Found:
    """Join tokens by id."""

    async def ask(connection: Connection) -> Found:
        from potluck.wire.members import ListTokens, TokensListed

        return [(one.token_id, one.role) for one in (await connection.ask(ListTokens(), TokensListed)).tokens]

    return _offered(context, incomplete, ask)


def datasets(context: typer.Context, incomplete: str) -> Found:
    """Registered data sets."""

    async def ask(connection: Connection) -> Found:
        from potluck.client import listings

        return [
            (info.name, f"{info.kind}, {counted(info.count, 'item')}")
            for info in await listings.datasets(connection)
            if not info.nodes
        ]

    return _offered(context, incomplete, ask)


def data(context: typer.Context, incomplete: str) -> Found:
    """Data sets, also those that live on nodes, and files."""

    async def ask(connection: Connection) -> Found:
        from potluck.client import listings

        return [
            (info.name, f"{info.kind}, {counted(info.count, 'item')}") for info in await listings.datasets(connection)
        ]

    return _offered(context, incomplete, ask) + list(_files(incomplete))


def _offered(context: typer.Context, incomplete: str, ask: Callable[[Connection], Awaitable[Found]]) -> Found:
    import asyncio

    from potluck.client.connection import Connection, client_settings
    from potluck.client.membership import membership

    logging.disable()  # a log line would land in the middle of the text that somebody types
    given = context.find_root().params

    async def asked() -> Found:
        settings = client_settings(given.get("seed"), given.get("cluster"), SECONDS, given.get("credentials"))
        async with asyncio.timeout(SECONDS), Connection.of(membership(settings)) as connection:
            return await ask(connection)

    try:
        found: Iterable[tuple[str, str]] = asyncio.run(asked())
    except (PotluckError, TimeoutError, OSError):
        found = ()
    return [(name, said) for name, said in found if name.startswith(incomplete)]


def _files(incomplete: str) -> Iterator[tuple[str, str]]:
    """Files and folders that match the word. The shell offers files by itself only where we offer nothing."""
    folder, _, begun = incomplete.rpartition("/")
    where = Path(f"{folder}/" if "/" in incomplete else ".").expanduser()
    try:
        entries = sorted(where.iterdir())
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith(begun) and (begun or not entry.name.startswith(".")):
            yield f"{folder}/{entry.name}" if "/" in incomplete else entry.name, ""
