"""On which line of a TOML file each key stands. `tomllib` tells values, but not where they are."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from typing import Any

Keys = tuple[str, ...]

_TOKEN = re.compile(
    r'"""(?:\\.|[^"\\]|"{1,2}(?!"))*"{3,5}'
    r"|'''(?:[^']|'{1,2}(?!'))*'{3,5}"
    r'|"(?:\\.|[^"\\\n])*"'
    r"|'[^'\n]*'"
    r"|\#[^\n]*"
    r"|[\[\]{}=\n]",
    re.DOTALL,
)
"""Texts, comments, and the signs that begin or end something. What is between them does not matter here."""


def lines_of_keys(text: str) -> dict[Keys, int]:
    """The line (from 1) of each table and key of a document that `tomllib` can read; keys in inline tables are not among them."""
    found: dict[Keys, int] = {}
    table: Keys = ()
    line = began = 1
    start = depth = 0
    # where the key ends that a statement begins with
    key_end: int | None = None
    for token in _TOKEN.finditer(text + "\n"):
        sign = token[0]
        if sign in "[{":
            depth += 1
        elif sign in "]}":
            depth -= 1
            if depth == 0 and key_end is None:
                table = _keys(text[start : token.end()].strip().strip("[]"))
                found.setdefault(table, began)
        elif sign == "=" and depth == 0 and key_end is None:
            key_end = token.start()
            keys = table + _keys(text[start:key_end])
            for count in range(len(table) + 1, len(keys) + 1):
                found.setdefault(keys[:count], began)
        elif sign == "\n" and depth == 0:
            start, key_end, began = token.end(), None, line + 1
        elif sign.startswith("#") and key_end is None and depth == 0:
            start = token.end()
        line += sign.count("\n")
    return found


def _keys(text: str) -> Keys:
    """The parts of a dotted key: `a."b.c"` is ("a", "b.c")."""
    inner: Any = tomllib.loads(f"{text.strip()} = 0")
    keys = []
    while isinstance(inner, Mapping):
        ((key, inner),) = inner.items()
        keys.append(key)
    return tuple(keys)
