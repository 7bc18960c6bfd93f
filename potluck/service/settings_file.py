"""A settings file of a service: made from the example, and changed line by line, so that its comments stay. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

from potluck.settings_sources import toml

Value = str | int | bool | list[str]


def changed(text: str, changes: Mapping[str, Value]) -> str:
    """The TOML text with these settings (dotted keys: `listen.host`) in place of what it says about them.

    A value that is written over several lines is not understood: the caller must read the result (`settings_sources.load`).
    """
    lines = text.splitlines()
    for dotted, value in changes.items():
        table, _, key = dotted.rpartition(".")
        _put(lines, table, key, f"{key} = {toml(value)}")
    return "\n".join(lines) + "\n"


def _put(lines: list[str], table: str, key: str, new: str) -> None:
    present, header = "", -1 if not table else None
    for number, line in enumerate(lines):
        if found := re.match(r"\s*\[\s*([^\[\]]+?)\s*\]", line):
            present = found[1]
            if present == table:
                header = number
        elif present == table and re.match(rf"\s*{re.escape(key)}\s*=", line):
            lines[number] = new
            return
    if header is None:
        lines += ["", f"[{table}]", new]
    else:
        lines.insert(header + 1, new)
