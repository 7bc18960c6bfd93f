"""How shapes and the errors of others are told to a person."""

from __future__ import annotations

import re
from collections.abc import Sequence

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


_GRAPH_ERROR = re.compile(r"^Node: '[^']*'\n(.+?)(?:\n\t ?\[\[|\Z)", re.MULTILINE | re.DOTALL)
"""In an error of a graph: what is wrong stands after the whole stack."""


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """The text without line breaks and colours, cut at `limit`; of an error in a TensorFlow graph, what is wrong."""
    text = _COLOURS.sub("", str(error))
    if "Graph execution error" in text and (found := _GRAPH_ERROR.search(text)) is not None:
        text = found[1]
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[:limit]}..."


def shape(dimensions: Sequence[int | None]) -> str:
    """`(any, 32, 32, 3)`: None and -1 are dimensions that may have any size."""
    return "(" + ", ".join("any" if d is None or d < 0 else str(d) for d in dimensions) + ")"
