"""Every message, with odd values in each of its fields: made from the types in `potluck.wire.messages`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from msgspec import inspect

from potluck.wire.values import Message

Plain = dict[str, Any]
_DEPTH = 4
_TEXTS = ("", "//x", "http://x:1/../?q#f", "\u0000\u00e9\U0001f967", "+/#", "a" * 5000, "-1", "node:")
_WHOLE = (-1, 0, 1, 2**31, 2**53, 2**53 + 1, 2**63 - 1, -(2**63))
_REAL = (-1.0, 0.0, 1e-300, 1e308, math.inf, -math.inf, math.nan)


def odd_messages(kind: type[Message], known: Mapping[str, Any]) -> Iterator[Plain]:
    """A correct message of this kind, and others with an odd value in each field. `known`: values of fields by name."""
    found = inspect.type_info(kind)
    assert isinstance(found, inspect.StructType)
    yield _sample(found, known)
    yield from _odd(found, known, _DEPTH)


def _sample(found: inspect.Type, known: Mapping[str, Any]) -> Any:
    match found:
        case inspect.StructType():
            made = {} if found.tag_field is None else {found.tag_field: found.tag}
            needed = (field for field in found.fields if field.required or field.encode_name in known)
            return made | {
                field.encode_name: known.get(field.encode_name, _sample(field.type, known)) for field in needed
            }
        case inspect.UnionType():
            return _sample(found.types[0], known)
        case inspect.VarTupleType() | inspect.ListType():
            return [_sample(found.item_type, known)]
        case inspect.DictType():
            return {"k": _sample(found.value_type, known)}
        case inspect.LiteralType():
            return found.values[0]
        case inspect.StrType():
            return "a" * 64 if "0-9a-f" in (found.pattern or "") else "x"
        case inspect.IntType():
            return max(1, found.ge or 0)
        case inspect.FloatType():
            return 0.5
        case inspect.BytesType():
            return b"x"
        case inspect.BoolType():
            return True
        case inspect.AnyType():
            return 1
        case _:
            return None


def _odd(found: inspect.Type, known: Mapping[str, Any], depth: int) -> Iterator[Any]:
    """Odd values of this type; most have the type, some are beyond its bounds."""
    if not depth:
        return
    match found:
        case inspect.StructType():
            sample = _sample(found, known)
            for field in found.fields:
                for value in _odd(field.type, known, depth - 1):
                    yield sample | {field.encode_name: value}
        case inspect.UnionType():
            for one in found.types:
                yield _sample(one, known)
                yield from _odd(one, known, depth)
        case inspect.VarTupleType() | inspect.ListType():
            yield []
            yield [_sample(found.item_type, known)] * 50
            for value in _odd(found.item_type, known, depth):
                yield [value]
        case inspect.DictType():
            yield {}
            yield {str(number): _sample(found.value_type, known) for number in range(300)}
            for text in _TEXTS:
                yield {text: _sample(found.value_type, known)}
            for value in _odd(found.value_type, known, depth):
                yield {"k": value}
        case inspect.LiteralType():
            yield from (*found.values, "odd")
        case inspect.StrType():
            yield from _TEXTS
        case inspect.IntType():
            yield from _WHOLE
        case inspect.FloatType():
            yield from _REAL
        case inspect.BytesType():
            yield from (b"", b"x" * 999)
        case inspect.AnyType():
            yield from ("", 2**53, math.nan, [[1], [2, 3]], {"k": None}, None, b"\xff")
        case _:
            yield from (True, None)
