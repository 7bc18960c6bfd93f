"""How counts are told to people."""

from __future__ import annotations


def counted(count: float, one: str, many: str = "") -> str:
    """As people say it: `1 node`, `1,200 items`; `many` where that is not `one` with an s."""
    number = f"{count:,.0f}"
    return f"{number} {one if number == '1' else many or one + 's'}"


def be(count: float) -> str:
    """The verb after so many things: `1 node is online`, `2 nodes are online`."""
    return "is" if count == 1 else "are"
