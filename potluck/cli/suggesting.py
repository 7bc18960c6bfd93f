"""Commands that suggest the nearest options when a user types an unknown one, the likeliest first.

Typer suggests similar options too, but in alphabetical order.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup


class _Suggesting:
    """Put before one of the two Typer classes below."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)  # type: ignore[misc, no-any-return]
        except Exception as error:  # the error's class is in click or in typer, depending on the version
            if likely := getattr(error, "possibilities", None):  # the nearest first (difflib.get_close_matches)
                error.message += f": did you mean {' or '.join(likely)}?"  # type: ignore[attr-defined]
                error.possibilities = None  # type: ignore[attr-defined]
            raise


class Command(_Suggesting, TyperCommand):
    """A command."""


class CommandGroup(_Suggesting, TyperGroup):
    """A group of commands."""
