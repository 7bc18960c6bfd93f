"""Checks a caller's arguments before anything is sent: an error names the argument, what it takes, and what it got."""

from __future__ import annotations

import reprlib
import sys
from pathlib import Path
from typing import Any

import msgspec

from potluck.errors import InvalidRequest
from potluck.wire.questions import TagKey, TagValue
from potluck.wire.values import Name, Positive, Seconds

_SHORT = reprlib.Repr()
_SHORT.maxother = _SHORT.maxstring = 80


def checked(argument: str, value: object, kind: Any, takes: str) -> Any:
    """`value` as `kind`, a type of the wire with its limits; numpy numbers count as numbers. Raises InvalidRequest."""
    try:
        return msgspec.convert(msgspec.to_builtins(value, builtin_types=(bytes,), enc_hook=_number), kind)
    except (msgspec.ValidationError, TypeError, OverflowError):
        raise InvalidRequest(f"{argument} must be {takes}, not {shown(value)}") from None


def at_least_one(argument: str, value: object) -> int:
    """`value` as an int of at least 1. Raises InvalidRequest."""
    number: int = checked(argument, value, Positive, "a whole number of at least 1")
    return number


def flag(argument: str, value: object) -> bool:
    """`value`, True or False. Raises InvalidRequest for anything else."""
    found: bool = checked(argument, value, bool, "True or False")
    return found


def text(argument: str, value: object, takes: str) -> str:
    """`value` as a text. Raises InvalidRequest for anything else."""
    found: str = checked(argument, value, str, takes)
    return found


def name(argument: str, value: object) -> str | None:
    """A name that a user gives, or None. Raises InvalidRequest."""
    found: str | None = checked(
        argument,
        value,
        Name | None,
        "made of letters, digits, '.', '_' and '-', at most 128, beginning with a letter or digit",
    )
    return found


def path(argument: str, value: Any) -> Path | None:
    """`value` as a path, or None. Raises InvalidRequest."""
    try:
        return None if value is None else Path(value)
    except TypeError:
        raise InvalidRequest(f"{argument} must be the path of a file, not {shown(value)}") from None


def given_path(argument: str, value: Any) -> Path:
    """`value` as a path; None is refused. Raises InvalidRequest."""
    found = path(argument, value)
    if found is None:
        raise InvalidRequest(f"{argument} must be the path of a file or folder, not None")
    return found


def in_a_folder(what: str, path: Path) -> None:
    """Check `path` before the work begins whose result goes there. Raises InvalidRequest where its folder does not exist."""
    folder = path.resolve().parent
    if not folder.is_dir():
        raise InvalidRequest(f"{what} cannot be saved as {path}: there is no folder {folder}")


def target(value: object) -> str | tuple[str, ...] | None:
    """`value` as the name of a column or array, a tuple of names, or None. Raises InvalidRequest."""
    found: str | tuple[str, ...] | None
    found = checked("target", value, str | tuple[str, ...] | None, "the name of a column or array, or several names")
    return found


def sample_weight(value: object) -> str | None:
    """`value` as the name of a column or array, or None. Raises InvalidRequest."""
    found: str | None = checked("sample_weight", value, str | None, "the name of a column or array")
    return found


def tags(value: object) -> dict[str, str]:
    """`value` as tags. Raises InvalidRequest."""
    found: dict[str, str] = checked(
        "tags",
        {} if value is None else value,
        dict[TagKey, TagValue],
        "a map from texts of at most 64 characters to texts of at most 256",
    )
    return found


def timeout(value: object) -> float | None:
    """`value` as a number of seconds, or None. Raises InvalidRequest."""
    seconds: float | None = checked("timeout", value, Seconds | None, "a number of seconds, or None")
    return seconds


def may_name_files(inputs: object) -> bool:
    """Whether `inputs` may be names of files: a text, a path, or a list of them."""
    if isinstance(inputs, list | tuple):
        return bool(inputs) and all(isinstance(each, str | Path) for each in inputs)
    return isinstance(inputs, str | Path)


def shown(value: object) -> str:
    """`value` as an error shows it: in one line, and short."""
    return " ".join(_SHORT.repr(value).split())


def _number(value: object) -> object:
    numpy = sys.modules.get("numpy")  # whoever has a numpy number has imported numpy
    if numpy is not None and isinstance(value, numpy.generic):
        return value.item()
    raise TypeError
