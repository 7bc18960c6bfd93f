"""Golden files: every later version reads what one version wrote, with the same result.

Each message type has `golden/<Type>.msgpack` and `golden/<Type>.json` with every field set. A file that exists is never
rewritten unless it is deleted first: a changed wire format must be seen in review.

    POTLUCK_WRITE_GOLDEN=1 pytest tests/contract/test_wire_golden.py
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import typing
from pathlib import Path
from typing import Any, Literal

import msgpack
import msgspec
import pytest

from potluck import messages, wire
from potluck.wire import codec
from potluck.wire.codec import Encoding
from potluck.wire.messages import AnyMessage
from potluck.wire.values import Message
from support import release

GOLDEN = Path(__file__).parent / "golden"
KINDS: list[type[Message]] = list(AnyMessage.__args__)
WRITE = os.environ.get("POTLUCK_WRITE_GOLDEN") == "1"
FIRST_EXAMPLES = {"node_id": "node-1", "session": "5e5510", "job_id": "job-1", "datatype": "FP32"}


def example(kind: Any, name: str = "", encoding: Encoding = "msgpack") -> Any:
    """A value of type `kind` with every field set, none to its default; the same at every call."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _constrained(args[0], args[1], name)
    if origin is tuple:
        count = 1 if args[-1] is Ellipsis else len(args)
        return tuple(example(args[0], name, encoding) for _ in range(count))
    if origin is dict:
        return {f"{name}-key": example(args[1], name, encoding)}
    if args:  # a union: bytes where the encoding has them, else the list or the largest alternative
        choices = [arg for arg in args if arg is not type(None)]
        if bytes in choices:
            return bytes(range(8)) if encoding == "msgpack" else [1.5, -2.0]
        structs = [arg for arg in choices if isinstance(arg, type) and issubclass(arg, msgspec.Struct)]
        return example((structs or choices)[0], name, encoding)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        hints = typing.get_type_hints(kind, include_extras=True)
        values = {}
        for field in msgspec.structs.fields(kind):
            hint = hints[field.name]
            if typing.get_origin(hint) is Literal:  # the first that is not the default: stable when more are added
                values[field.name] = next(choice for choice in typing.get_args(hint) if choice != field.default)
            else:
                values[field.name] = example(hint, field.name, encoding)
        return kind(**values)
    scalars: dict[Any, Any] = {
        str: FIRST_EXAMPLES.get(name, f"{name} é"),
        int: 42,
        float: 0.25,
        bool: True,
        type(None): None,
        bytes: bytes(range(8)),
    }
    return scalars[kind]


def _constrained(kind: Any, meta: msgspec.Meta, name: str) -> Any:
    if kind is str:
        if "0-9a-f" not in (meta.pattern or ""):
            return f"{name}-1"
        digits = "0123456789abcdef" * 4
        return digits[:10] if "{10}" in str(meta.pattern) else digits
    found = example(kind, name)
    return found if meta.le is None else min(found, meta.le)


def variants(kind: type[Message]) -> dict[str, Any]:
    """The union of tagged parts that a message carries, so that each alternative has a file; else the one message."""
    for field in ("job", "task", "result"):
        hint = typing.get_type_hints(kind).get(field)
        if len(typing.get_args(hint)) > 1:
            return {
                f"{kind.__name__}-{choice.__struct_config__.tag}": (field, choice) for choice in typing.get_args(hint)
            }
    return {kind.__name__: None}


def build(kind: type[Message], variant: Any, encoding: Encoding) -> Message:
    message: Message = example(kind, encoding=encoding)
    if variant is not None:
        field, choice = variant
        message = msgspec.structs.replace(message, **{field: example(choice, field, encoding)})
    return message


CASES = [
    pytest.param(kind, variant, encoding, GOLDEN / f"{name}.{encoding}", id=f"{name}-{encoding}")
    for kind in KINDS
    for name, variant in variants(kind).items()
    for encoding in ("msgpack", "json")
]


def plain(payload: bytes, encoding: Encoding) -> Any:
    return json.loads(payload) if encoding == "json" else msgpack.unpackb(payload)


@pytest.mark.parametrize(("kind", "variant", "encoding", "path"), CASES)
def test_old_bytes_decode_to_the_same_message(
    kind: type[Message], variant: Any, encoding: Encoding, path: Path
) -> None:
    expected = build(kind, variant, encoding)
    if WRITE and not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(_pretty(codec.encode(expected, encoding), encoding))
    assert path.exists(), f"no golden file for {path.stem}: write it with POTLUCK_WRITE_GOLDEN=1"
    message, found = codec.decode(path.read_bytes())
    assert (type(message), found) == (kind, encoding)
    stored = plain(path.read_bytes(), encoding)
    assert includes(plain(codec.encode(message, encoding), encoding), stored), (
        "a field of the old bytes was not understood"
    )
    assert includes(plain(codec.encode(expected, encoding), encoding), stored), "old fields kept their names and types"


def test_what_the_last_release_wrote_is_understood(tmp_path: Path) -> None:
    """Also where its golden files were deleted or written again since."""
    release.unpacked(tmp_path)
    paths = sorted((tmp_path / GOLDEN.relative_to(release.ROOT)).iterdir())
    assert len(paths) > 100
    for path in paths:
        message, encoding = codec.decode(path.read_bytes())
        stored = plain(path.read_bytes(), encoding)
        assert includes(plain(codec.encode(message, encoding), encoding), stored), f"{path.name} is not understood"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_field_is_set_in_its_golden_file(kind: type[Message]) -> None:
    """A new field needs a new golden file (`<Type>-<what is new>`), or this one deleted and written again on purpose."""
    stored: set[str] = set()
    for path in GOLDEN.glob("*.json"):
        if path.stem.split("-")[0] == kind.__name__:
            stored |= set(json.loads(path.read_bytes()))
    assert stored == {"type", *(field.encode_name for field in msgspec.structs.fields(kind))}


@pytest.mark.parametrize("path", sorted(GOLDEN.iterdir()) if GOLDEN.exists() else [], ids=lambda path: path.name)
def test_every_stored_file_still_decodes(path: Path) -> None:
    message, encoding = codec.decode(path.read_bytes())
    assert type(message).__name__ == path.stem.split("-")[0]
    assert path.suffix == f".{encoding}"


def test_no_message_type_is_missing_from_the_union() -> None:
    defined = {
        value
        for file in pkgutil.iter_modules(wire.__path__, "potluck.wire.")
        for value in vars(importlib.import_module(file.name)).values()
        if isinstance(value, type) and issubclass(value, Message) and value is not Message
    }
    assert defined == set(KINDS)


@pytest.mark.parametrize(
    "file", ["values", "jobs", "questions", "members", "births", "tasks", "commands", "reports", "messages"]
)
def test_users_import_everything_from_one_module(file: str) -> None:
    public = {name: value for name, value in vars(getattr(wire, file)).items() if not name.startswith("_")}
    assert [name for name, value in public.items() if vars(messages).get(name) is not value] == []


def includes(now: Any, before: Any) -> bool:
    """Whether `now` has everything in `before`: new fields may come, old ones may not go."""
    if isinstance(before, dict):
        return isinstance(now, dict) and all(key in now and includes(now[key], value) for key, value in before.items())
    if isinstance(before, list):
        return (
            isinstance(now, list)
            and len(now) == len(before)
            and all(includes(new, old) for new, old in zip(now, before, strict=True))
        )
    return type(now) is type(before) and bool(now == before)


def _pretty(payload: bytes, encoding: Encoding) -> bytes:
    if encoding == "msgpack":
        return payload
    return json.dumps(json.loads(payload), indent=1, ensure_ascii=False).encode() + b"\n"
