"""A value of any of our types, so that each kind of message, frame or row is among the seeds without a list of them."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import inspect

_TEXTS = (
    "a",
    "0" * 32,
    "0" * 10,
    "0" * 8,
    "cluster",
    "0" * 64,
    "2026-01-01",
    "node:a",
    "1.2",
    "http://a:1",
    "h:1",
    "prod",
)


def sample(kind: Any, *, full: bool) -> Any:
    """An instance of a struct (the first kind of a union), with only what it needs, or `full` with all fields set."""
    return msgspec.convert(_plain(inspect.type_info(kind), full), kind)


def _plain(kind: inspect.Type, full: bool) -> Any:
    match kind:
        case inspect.Metadata(type=inner):
            return _plain(inner, full)
        case inspect.StructType(tag_field=field, tag=tag):
            found = {} if field is None else {field: tag}
            for one in kind.fields:
                if one.required or full:
                    found[one.encode_name] = _plain(one.type, full)
            return found
        case inspect.UnionType(types=kinds):
            chosen = [one for one in kinds if not isinstance(one, inspect.NoneType)]
            return _plain(chosen[-1] if full else chosen[0], full)
        case inspect.LiteralType(values=values):
            return values[-1] if full else values[0]
        case inspect.IntType(ge=least):
            return max(int(least or 0), 1)
        case inspect.FloatType(gt=over):
            return 0.5 if over is None or over < 0.5 else over + 1
        case inspect.StrType():
            return _text(kind)
        case inspect.BytesType():
            return b"\0\1"
        case inspect.BoolType():
            return True
        case inspect.DictType(key_type=key, value_type=value):
            return {_plain(key, full): _plain(value, full)} if full else {}
        case inspect.TupleType(item_types=kinds):
            return [_plain(one, full) for one in kinds]
        case inspect.VarTupleType(item_type=one) | inspect.ListType(item_type=one):
            return [_plain(one, full)] if full or kind.min_length else []
        case _:
            return None


def _text(kind: inspect.StrType) -> str:
    for text in _TEXTS:
        try:
            return str(msgspec.convert(text, _annotated(kind)))
        except msgspec.ValidationError:
            continue
    raise AssertionError(f"no sample matches {kind.pattern}")


def _annotated(kind: inspect.StrType) -> Any:
    from typing import Annotated

    return Annotated[str, msgspec.Meta(pattern=kind.pattern, min_length=kind.min_length, max_length=kind.max_length)]
