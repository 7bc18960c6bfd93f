"""How counts and names are shown to people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def counted(count: float, one: str, many: str = "") -> str:
    """A count with its noun: `1 node`, `1,200 items`; `many` where the plural is not `one` with an s."""
    number = f"{count:,.0f}"
    return f"{number} {one if number == '1' else many or one + 's'}"


def printable(text: str, kept: str = "") -> str:
    r"""The same text, with escapes (`\n`, `\x1b`) for characters that a terminal would obey, not show; those in `kept` stay."""
    if text.isprintable():
        return text
    return "".join(
        sign if sign.isprintable() or sign in kept else sign.encode("unicode_escape").decode() for sign in text
    )


def be(count: float) -> str:
    """The verb after a count: `1 node is online`, `2 nodes are online`."""
    return "is" if count == 1 else "are"


def first(names: Sequence[str], most: int) -> str:
    """The first names, and how many more there are: `a, b and 3 more`."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def on_nodes(stages: Iterable[tuple[str, str]]) -> str:
    """What each node does, from (stage, node): `loading the model on n3; starting engine (TensorFlow) on n1, n2`."""
    nodes: dict[str, set[str]] = {}
    for stage, node_id in stages:
        nodes.setdefault(stage, set()).add(node_id)
    return "; ".join(f"{stage} on {', '.join(sorted(nodes[stage]))}" for stage in sorted(nodes) if stage)
