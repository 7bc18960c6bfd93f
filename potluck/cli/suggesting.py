"""Commands that answer an option that there is none of with what was probably meant, the likeliest first.

Typer names similar options too, but in the order of the alphabet.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup


class _Suggesting:
    """Before one of the two below."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)  # type: ignore[misc, no-any-return]
        except Exception as error:  # its class is in click or in typer, as the version has it
            if likely := getattr(error, "possibilities", None):  # the nearest first (difflib.get_close_matches)
                error.message += f": did you mean {' or '.join(likely)}?"  # type: ignore[attr-defined]
                error.possibilities = None  # type: ignore[attr-defined]
            raise


class Command(_Suggesting, TyperCommand):
    """A command."""


class Group(_Suggesting, TyperGroup):
    """A group of commands."""
