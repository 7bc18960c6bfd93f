"""Reads settings: defaults, then a TOML file, then `POTLUCK_*` environment variables, then flags; and says where each came from."""

from __future__ import annotations

import difflib
import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from types import UnionType
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec import Struct, inspect

from potluck.errors import InvalidSettings, PotluckError
from potluck.settings import (
    LAMBDA,
    CoordinatorSettings,
    NetworkSettings,
    NodeSettings,
    check_coordinator,
    parse_address,
)
from potluck.toml_lines import Keys, lines_of_keys
from potluck.wire.topics import Topics, check_node_id
from potluck.wire.values import NODE_DATA_LIMIT

FILE_LIMIT_BYTES = 2**18
"""Read at once, also by a daemon that runs: this much takes half a second."""
PROBLEMS_LIMIT = 20
"""How many problems are told: whoever wrote more of them will look at the file anyway."""
TEXT_LIMIT = 500
"""How long the text of a problem may be: it goes into logs and to systemd."""
DEPTH_LIMIT = 8
"""How deep tables may be in each other. Settings are at most three deep."""
LISTS = (["seeds"], ["allow_code"])
"""Settings that are lists with commas in the environment."""
S = TypeVar("S", bound=NetworkSettings)
S_co = TypeVar("S_co", bound=NetworkSettings, covariant=True)
_LINE = re.compile(r" \(at line (\d+), column (\d+)\)")


@dataclass(frozen=True)
class Origin:
    """Where a setting came from. `name` is the variable's or the file's; `line` counts from 1 (0: unknown)."""

    kind: Literal["default", "file", "environment", "command line"] = "default"
    name: str = ""
    line: int = 0

    def __str__(self) -> str:
        if self.kind == "file":
            return f"{self.name}:{self.line}" if self.line else self.name
        return f"environment {self.name}" if self.kind == "environment" else self.kind


@dataclass(frozen=True)
class Problem:
    """What is wrong with a setting ("": with the whole file), and what was expected."""

    setting: str
    origin: Origin
    message: str

    def __str__(self) -> str:
        shown = self.message if len(self.message) <= TEXT_LIMIT else f"{self.message[:TEXT_LIMIT]}..."
        return f"{self.origin}: {shown}"


class WrongSettings(InvalidSettings):
    """Settings with these problems; the message names all of them."""

    def __init__(self, *problems: Problem) -> None:
        told = [*map(str, problems[:PROBLEMS_LIMIT]), *(["and more"] if len(problems) > PROBLEMS_LIMIT else [])]
        super().__init__("; ".join(told))
        self.problems = problems[:PROBLEMS_LIMIT]


@dataclass(frozen=True)
class Setting:
    """One value of the settings; `name` is dotted, as in TOML."""

    name: str
    value: Any
    origin: Origin


@dataclass(frozen=True)
class Found(Generic[S_co]):
    """Settings, and the origins of those that are no defaults."""

    settings: S_co
    origins: Mapping[Keys, Origin]

    def each(self) -> Iterator[Setting]:
        """Every setting, in the order of the settings' classes. What is not set and has no default is left out."""
        for keys, value in _leaves(msgspec.to_builtins(self.settings)):
            if value is not None:
                yield Setting(_dotted(keys), value, self.origins.get(keys, Origin()))


def load(kind: type[S], path: str | Path | None = None, flags: Mapping[str, Any] | None = None) -> S:
    """Settings of `kind` from the file at `path`, the environment, and `flags` (dotted keys; None: not given).

    `POTLUCK_LISTEN__PORT=9000` sets `listen.port`; lists are written with commas. Raises InvalidSettings.
    """
    return find(kind, path, flags).settings


def find(kind: type[S], path: str | Path | None = None, flags: Mapping[str, Any] | None = None) -> Found[S]:
    """The same with origins. Raises WrongSettings, with everything that is wrong, or the first PROBLEMS_LIMIT of it."""
    table: dict[str, Any] = {}
    origins: dict[Keys, Origin] = {}
    if path is not None:
        table, origins = _read(Path(path))
    for variable, text in os.environ.items():
        if variable.startswith("POTLUCK_") and len(variable) > len("POTLUCK_"):
            keys = variable[len("POTLUCK_") :].lower().split("__")
            if keys[0] in kind.__struct_fields__:
                value = [item for item in text.split(",") if item] if keys in LISTS else text
                _put(table, origins, tuple(keys), value, Origin("environment", variable))
    for dotted, value in (flags or {}).items():
        if value is not None:
            _put(table, origins, tuple(dotted.split(".")), value, Origin("command line"))
    first = islice(_wrong(table, kind), PROBLEMS_LIMIT + 1)
    wrong = [Problem(_dotted(keys), _origin(origins, keys), why) for keys, why in first]
    if wrong:
        raise WrongSettings(*wrong)
    settings = msgspec.convert(table, kind, strict=False)
    first = islice(_unusable(settings), PROBLEMS_LIMIT + 1)
    wrong = [Problem(_dotted(keys), _origin(origins, keys), why) for keys, why in first]
    if wrong:
        raise WrongSettings(*wrong)
    return Found(settings, origins)


def toml(value: Any) -> str:
    """A value as TOML has it, in one line."""
    match value:
        case bool():
            return str(value).lower()
        case str():
            known = value.encode(errors="replace").decode()  # the environment may have anything
            return msgspec.json.encode(known).decode().replace("\x7f", "\\u007f")
        case list() | tuple():
            return f"[{', '.join(map(toml, value))}]"
        case Mapping():
            return (
                f"{{ {', '.join(f'{_dotted((key,))} = {toml(one)}' for key, one in value.items())} }}"
                if value
                else "{}"
            )
        case _:
            return str(value)


def _read(path: Path) -> tuple[dict[str, Any], dict[Keys, Origin]]:
    whole = Origin("file", str(path))
    try:
        text = _bytes_of(path, whole).decode("utf-8-sig")  # some editors begin a file with a mark
        table = tomllib.loads(text)
    except OSError as error:
        raise WrongSettings(Problem("", whole, f"the file cannot be read: {error.strerror}")) from error
    except UnicodeDecodeError as error:
        at = Origin("file", str(path), error.object.count(b"\n", 0, error.start) + 1)
        raise WrongSettings(Problem("", at, "this is not valid TOML: it is not text in UTF-8")) from error
    except tomllib.TOMLDecodeError as error:
        found = _LINE.search(str(error))
        line = int(found[1]) if found else text.count("\n") + (not text.endswith("\n"))
        what = _LINE.sub(r" at column \2", str(error)).removesuffix(" (at end of document)")
        raise WrongSettings(Problem("", Origin("file", str(path), line), f"this is not valid TOML: {what}")) from error
    except RecursionError as error:
        raise WrongSettings(Problem("", whole, _TOO_DEEP)) from error
    except ValueError as error:  # a number with thousands of digits, for example
        raise WrongSettings(Problem("", whole, f"this cannot be read as TOML: {error}")) from error
    if _depth(table) > DEPTH_LIMIT:
        raise WrongSettings(Problem("", whole, _TOO_DEEP))
    lines = lines_of_keys(text)

    def line_of(keys: Keys) -> int:
        return next((lines[keys[:count]] for count in range(len(keys), 0, -1) if keys[:count] in lines), 0)

    # tables have an origin too, for what is wrong with a table itself
    every = [*lines, *(keys for keys, _ in _leaves(table))]
    return table, {keys: Origin("file", str(path), line_of(keys)) for keys in every}


_TOO_DEEP = f"lists or tables are in each other more than {DEPTH_LIMIT} deep, and no setting is"


def _bytes_of(path: Path, whole: Origin) -> bytes:
    """The file. Raises OSError, and WrongSettings where it is none, or too large for settings."""
    if stat.S_ISFIFO(path.stat().st_mode) or path.is_socket():
        raise WrongSettings(
            Problem(
                "",
                whole,
                "this is a pipe, which can be read only once, but SIGHUP reads the settings again: write a file",
            )
        )
    with path.open("rb") as file:
        found = file.read(FILE_LIMIT_BYTES + 1)
    if len(found) > FILE_LIMIT_BYTES:
        raise WrongSettings(
            Problem("", whole, f"this is no file of settings: it has more than {FILE_LIMIT_BYTES} bytes")
        )
    return found


def _depth(table: Mapping[str, Any]) -> int:
    """How deep values are in each other, as far as DEPTH_LIMIT and one more."""
    level: list[Any] = [table]
    for depth in range(DEPTH_LIMIT + 1):
        level = [
            inner
            for one in level
            for inner in (one.values() if isinstance(one, dict) else one if isinstance(one, list) else ())
        ]
        if not level:
            return depth
    return DEPTH_LIMIT + 1


def _put(table: dict[str, Any], origins: dict[Keys, Origin], keys: Keys, value: Any, origin: Origin) -> None:
    for count, key in enumerate(keys[:-1], 1):
        inner = table.setdefault(key, {})
        if not isinstance(inner, dict):
            before = f"{key} is {toml(inner)} ({_origin(origins, keys[:count])}), not a table"
            raise WrongSettings(Problem(_dotted(keys), origin, f"{before}: {_dotted(keys)} cannot be in it"))
        table = inner
    table[keys[-1]] = value
    for known in [known for known in origins if known[: len(keys)] == keys]:
        del origins[known]
    origins[keys] = origin
    for inner_keys, _ in _leaves(value) if isinstance(value, dict) else ():
        origins[keys + inner_keys] = origin


def _origin(origins: Mapping[Keys, Origin], keys: Keys) -> Origin:
    """Of a setting, else of the table that it is in, else of something in it."""
    for count in range(len(keys), 0, -1):
        if found := origins.get(keys[:count]):
            return found
    return next((origin for known, origin in origins.items() if known[: len(keys)] == keys), Origin())


def _leaves(table: Mapping[str, Any], above: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), value


def _dotted(keys: Keys) -> str:
    return ".".join(key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else toml(key) for key in keys)


def _wrong(value: Any, kind: Any, keys: Keys = ()) -> Iterator[tuple[Keys, str]]:
    """(setting, what is wrong with it and what was expected) for each value that has not the type `kind`."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    struct = next((one for one in kinds if isinstance(one, type) and issubclass(one, Struct)), None)
    if struct is not None and isinstance(value, dict):
        yield from _wrong_table(value, struct, keys)
    elif get_origin(kind) is dict and isinstance(value, dict):
        name_kind, inner = get_args(kind)
        for key, one in value.items():
            if not _is_text(key) or not _fits(key, name_kind):
                yield (*keys, key), f"{_dotted((*keys, key))}: a name here is {_expected(name_kind)}"
            yield from _wrong(one, inner, (*keys, key))
    elif get_origin(kind) is tuple and isinstance(value, list | tuple):
        inner = get_args(kind)[0]
        for number, one in enumerate(value, 1):
            if (isinstance(one, str) and not _is_text(one)) or not _fits(one, inner):
                yield keys, f"item {number} of {_dotted(keys)} is {toml(one)}, expected {_expected(inner)}"
    elif isinstance(value, str) and not _is_text(value):
        yield keys, f"{_dotted(keys)} is {toml(value)}, which is not text in UTF-8, or has the character of number 0"
    elif not _fits(value, kind):
        yield keys, f"{_dotted(keys)} is {toml(value)}, expected {_expected(kind)}"


def _wrong_table(table: dict[str, Any], kind: type[Struct], keys: Keys) -> Iterator[tuple[Keys, str]]:
    known = {field.name: field for field in msgspec.structs.fields(kind)}
    for key, value in table.items():
        if key in known:
            yield from _wrong(value, known[key].type, (*keys, key))
        else:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
            yield (*keys, key), f"there is no setting {_dotted((*keys, key))}: {hint}"
    for name, field in known.items():
        if field.required and name not in table:
            yield keys, f"{_dotted(keys)} has no {name}, expected {_expected(field.type)}"


def _is_text(value: str) -> bool:
    """Whether it can be the name of a file, and be sent: Python keeps other bytes of the environment in a way of its own."""
    return "\0" not in value and not any("\ud800" <= sign <= "\udfff" for sign in value)


def _fits(value: Any, kind: Any) -> bool:
    try:
        msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError:
        return False
    return True


def _expected(kind: Any) -> str:
    """What a value of this type is, for people."""
    return _words(inspect.type_info(kind))


def _words(kind: inspect.Type) -> str:
    match kind:
        case inspect.Metadata(extra_json_schema={"description": str(said)}):
            return said
        case inspect.Metadata(type=inner):
            return _words(inner)
        case inspect.IntType():
            return f"a whole number{_bounds(kind)}"
        case inspect.FloatType():
            return f"a number{_bounds(kind)}"
        case inspect.BoolType():
            return "true or false"
        case inspect.StrType(pattern=pattern):
            return f"a text that matches {pattern}" if pattern else "a text"
        case inspect.LiteralType(values=values):
            return " or ".join(toml(value) for value in values)
        case inspect.VarTupleType(item_type=inner):
            return f"a list, each {_words(inner)}"
        case inspect.UnionType(types=kinds):
            return " or ".join(_words(one) for one in kinds if not isinstance(one, inspect.NoneType))
        case inspect.StructType(cls=cls):
            return f"a table with {', '.join(cls.__struct_fields__)}"
        case _:
            return "a table"


def _bounds(kind: inspect.IntType | inspect.FloatType) -> str:
    if kind.le is not None and kind.ge is not None:
        return f" from {kind.ge:g} to {kind.le:g}"
    words = (("of at least", kind.ge), ("above", kind.gt), ("of at most", kind.le))
    said = " and ".join(f"{word} {number:g}" for word, number in words if number is not None)
    return f" {said}" if said else ""


def _unusable(settings: NetworkSettings) -> Iterator[tuple[Keys, str]]:
    """(setting, what is wrong with it) where a value has the right type and can still not be used."""

    def tried(keys: Keys, check: Callable[[], object]) -> Iterator[tuple[Keys, str]]:
        try:
            check()
        except PotluckError as error:
            yield keys, f"{_dotted(keys)}: {error.message}"

    yield from tried(("cluster",), lambda: Topics(settings.cluster))
    for seed in settings.seeds:
        yield from tried(("seeds",), lambda seed=seed: parse_address(seed))  # type: ignore[misc]
    if isinstance(settings, CoordinatorSettings):
        keys = ("seeds",) if settings.seeds else ("broker", "mode")
        yield from tried(keys, lambda: check_coordinator(settings))
    if isinstance(settings, NodeSettings | CoordinatorSettings):
        high, most = settings.service.memory_high_bytes, settings.service.memory_bytes
        if most and high > most:
            why = f"service.memory_high_bytes is {high}, more than service.memory_bytes ({most}): it would do nothing"
            yield ("service", "memory_high_bytes"), why
    if isinstance(settings, NodeSettings):
        if len(settings.data) > NODE_DATA_LIMIT:
            yield (
                ("data",),
                f"data has {len(settings.data)} data sets, and a node may have {NODE_DATA_LIMIT}: put some together",
            )
        if settings.node_id:
            yield from tried(("node_id",), lambda: check_node_id(settings.node_id))
        for name in settings.allow_code:
            if name != LAMBDA and find_spec(name.partition(".")[0]) is None:
                why = (
                    f"allow_code names the module {name!r}, which Python does not find: install it in potluck's environment, put "
                    "its folder on PYTHONPATH, or remove it from allow_code"
                )
                yield ("allow_code",), why
