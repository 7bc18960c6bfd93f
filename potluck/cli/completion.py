"""What the shell offers for ids and names: those that the cluster has now, asked in a moment; and nothing, silently, without one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from potluck.errors import PotluckError
from potluck.wording import counted

if TYPE_CHECKING:
    from potluck.client import AsyncClient

SECONDS = 1.0
"""Nobody waits longer for a list to choose from."""

Found = list[tuple[str, str]]
"""What can be written, and a word on what it is."""


def words(*choices: str) -> Callable[[str], list[str]]:
    """These words, for an option that takes one of them."""

    def offered(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return offered


def jobs(context: typer.Context, incomplete: str) -> Found:
    """Jobs by id, the newest first."""

    async def ask(client: AsyncClient) -> Found:
        found = reversed(await client.jobs())
        return [(job.job_id, f"{job.kind} {job.subject.name or job.subject.model} {job.state}") for job in found]

    return _offered(context, incomplete, ask)


def models(context: typer.Context, incomplete: str) -> Found:
    """Registered models, their versions and aliases."""

    async def ask(client: AsyncClient) -> Found:
        found: Found = []
        for info in await client.models():
            found += [(info.name, info.format), (f"{info.name}:{info.version}", info.source)]
            found += [(f"{info.name}:{alias}", f"version {info.version}") for alias in info.aliases]
        return list(dict(reversed(found)).items())[::-1]

    return _offered(context, incomplete, ask)


def model_files(context: typer.Context, incomplete: str) -> Found:
    """Registered models, and files."""
    return models(context, incomplete) + list(_files(incomplete))


def deployments(context: typer.Context, incomplete: str) -> Found:
    """Deployed models, by their plain names and by version."""

    async def ask(client: AsyncClient) -> Found:
        found = await client.deployments()
        plain = dict.fromkeys(one.name.partition(":")[0] for one in found)
        return [*((name, "") for name in plain), *((one.name, one.state) for one in found)]

    return _offered(context, incomplete, ask)


def datasets(context: typer.Context, incomplete: str) -> Found:
    """Registered data sets."""

    async def ask(client: AsyncClient) -> Found:
        return [
            (info.name, f"{info.kind}, {counted(info.count, 'item')}")
            for info in await client.datasets()
            if not info.nodes
        ]

    return _offered(context, incomplete, ask)


def data(context: typer.Context, incomplete: str) -> Found:
    """Data sets, those that live on nodes too, and files."""

    async def ask(client: AsyncClient) -> Found:
        return [(info.name, f"{info.kind}, {counted(info.count, 'item')}") for info in await client.datasets()]

    return _offered(context, incomplete, ask) + list(_files(incomplete))


def _offered(context: typer.Context, incomplete: str, ask: Callable[[AsyncClient], Awaitable[Found]]) -> Found:
    logging.disable()  # whatever is said now stands in the middle of what somebody types
    given = context.find_root().params

    async def asked() -> Found:
        from potluck.client import AsyncClient

        async with (
            asyncio.timeout(SECONDS),
            AsyncClient(given.get("seed"), cluster=given.get("cluster"), timeout=SECONDS) as client,
        ):
            return await ask(client)

    try:
        found: Iterable[tuple[str, str]] = asyncio.run(asked())
    except (PotluckError, TimeoutError, OSError):
        found = ()
    return [(name, said) for name, said in found if name.startswith(incomplete)]


def _files(incomplete: str) -> Iterator[tuple[str, str]]:
    """What lies where the word leads to: the shell itself offers files only where nothing else is offered."""
    folder, _, begun = incomplete.rpartition("/")
    where = Path(f"{folder}/" if "/" in incomplete else ".").expanduser()
    try:
        entries = sorted(where.iterdir())
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith(begun) and (begun or not entry.name.startswith(".")):
            yield f"{folder}/{entry.name}" if "/" in incomplete else entry.name, ""
