"""What every benchmark prints: a table for people, and one JSON object as its last line."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table


@dataclass
class Report:
    """Measurements, and checks against their bounds."""

    benchmark: str
    figures: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    rows: list[tuple[str, ...]] = field(default_factory=list)
    columns: tuple[str, ...] = ()

    def check(self, name: str, value: float, *, at_least: float | None = None, at_most: float | None = None) -> None:
        bound = {"at_least": at_least} if at_least is not None else {"at_most": at_most}
        holds = value >= at_least if at_least is not None else value <= (at_most or 0.0)
        self.checks.append({"name": name, "value": float(f"{value:.4g}"), **bound, "holds": holds})

    def show(self) -> None:
        console = Console()
        table = Table(*self.columns, title=self.benchmark, title_justify="left", box=None)
        for row in self.rows:
            table.add_row(*row)
        console.print(table)
        for check in self.checks:
            bound = f"at least {check['at_least']}" if "at_least" in check else f"at most {check['at_most']}"
            mark = "[green]holds[/]" if check["holds"] else "[red]does not hold[/]"
            console.print(f"{check['name']}: {check['value']:.4g} ({bound}): {mark}")
        print(json.dumps({"benchmark": self.benchmark, "figures": self.figures, "checks": self.checks}))


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100)
    return {f"p{p}_ms": round(cuts[p - 1] * 1000, 3) for p in (50, 95, 99)}


class OtherLoad:
    """How busy other programs have kept this machine since this was made: on a busy machine, a failed check says little."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._busy, self._ours = _machine_seconds(), _own_seconds()

    def cores(self) -> float:
        """The cores that other programs used on average."""
        theirs = (_machine_seconds() - self._busy) - (_own_seconds() - self._ours)
        return max(0.0, theirs / (time.monotonic() - self._started))


def _machine_seconds() -> float:
    """CPU time that all programs have used (and other guests of the host: steal)."""
    times = psutil.cpu_times()
    return float(sum(times[:-2]) - times.idle - times.iowait)  # the last two, guest times, are part of user and nice


def _own_seconds() -> float:
    """CPU time of this process and its children."""
    this = psutil.Process()
    return float(sum(sum(process.cpu_times()[:4]) for process in (this, *this.children(recursive=True))))
