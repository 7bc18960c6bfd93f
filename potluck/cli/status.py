"""`potluck status`: the state of the cluster and what is wrong with it, in ten lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import typer

from potluck.cli.session import Json, session

if TYPE_CHECKING:
    from rich.text import Text

    from potluck.client.health import Health

LINES = 10
"""How many lines are shown: further problems are only counted."""
NAMED = 3
"""How many deployments, and how many waiting nodes, are named."""
Row = tuple[str, "str | Text"]
WRONG, UNREACHED = 1, 4
"""Exit codes, as in `potluck.errors`."""


def status(context: typer.Context, as_json: Json = False) -> None:
    """Show the state of the cluster: broker, gateway, coordinator, nodes, work, problems. Exit code 0: nothing is wrong."""
    import asyncio

    from potluck.cli import here, output
    from potluck.cli.listing import Facts
    from potluck.client.health import examine

    given = session(context)
    found = asyncio.run(examine(given.settings()))
    local = [str(one) for one in here.running()]
    if as_json:
        output.emit({"healthy": not found.problems, **output.plain(found), "here": local})
    else:
        output.show(Facts(fitting(found, local, output.columns())))
    if found.problems:
        raise typer.Exit(WRONG if found.reachable else UNREACHED)


def fitting(found: Health, local: Sequence[str], width: int) -> list[Row]:
    """The rows to show in LINES lines of this width: at least the first problem, then as much about the cluster as still fits."""
    from potluck.cli.listing import Facts

    parts = list(facts(found, local))
    told = [("wrong", text) for text in found.problems] + [("note", text) for text in found.remarks]
    rows = parts
    for kept in range(len(parts), 0, -1):
        for count in range(min(len(told), LINES), min(1, len(told)) - 1, -1):
            more = len(told) - count
            rows = [*parts[:kept], *told[:count]]
            rows += [("", f"and {more} more: `potluck status --json` shows all of them")] if more else []
            if len(list(Facts(rows).lines(width))) <= LINES:
                return rows
    return rows


def facts(found: Health, local: Sequence[str]) -> Iterator[Row]:
    """The rows about the cluster itself, each with its subject."""
    from potluck.sole_use import clock_text
    from potluck.wording import be, counted

    since = f" since {clock_text(found.since)}" if found.since else ""
    wrong = (
        f"{counted(len(found.problems), 'thing')} {be(len(found.problems))} wrong" if found.problems else "all is well"
    )
    yield "cluster", f"{found.cluster}: {wrong}"
    yield "broker", found.broker or "no broker is reached"
    yield "coordinator", f"{found.coordinator}{since}" if found.coordinator else ""
    yield "gateway", "  ".join(found.gateway)
    yield "nodes", nodes_text(found)
    yield "work", work_text(found)
    yield "here", "; ".join(local) or "no `potluck up` and no service of potluck runs on this machine"


def nodes_text(found: Health) -> str:
    from potluck.cli.output import bytes_text
    from potluck.wording import counted, first

    if found.waiting:
        return f"{counted(len(found.waiting), 'node')} without a coordinator: {first(found.waiting, NAMED)}"
    if found.coordinator != "online":
        return ""
    online = [node for node in found.nodes if node.state != "offline"]
    has = [node.capacity for node in online]
    gpus = sum(len(one.gpus) for one in has)
    parts = (
        counted(sum(one.cores for one in has), "core"),
        bytes_text(sum(one.memory_bytes for one in has)),
        counted(gpus, "GPU") if gpus else "",
        f"{sum(one.gflops for one in has):.0f} GFLOP/s",
    )
    return f"{len(online)} of {len(found.nodes)} online" + (f": {', '.join(filter(None, parts))}" if online else "")


def work_text(found: Health) -> str:
    from potluck.wording import counted, first

    if found.coordinator != "online":
        return ""
    jobs = Counter(job.state for job in found.jobs)
    parts = [f"{counted(count, 'job')} {state}" for state, count in sorted(jobs.items(), reverse=True)]
    deployed = []
    for deployment in found.deployments:
        ready = sum(replica.state == "ready" for replica in deployment.replicas)
        deployed.append(f"{deployment.name} {deployment.state} on {counted(ready, 'node')}")
    return ", ".join([*parts, *([first(deployed, NAMED)] if deployed else [])]) or "nothing is deployed, no job runs"
