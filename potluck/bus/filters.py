"""Which subscriptions a topic matches (MQTT 5, section 4.7)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
_CACHE_LIMIT = 4096
_CACHED_LENGTH = 512
"""Ours are shorter; a topic may have 65,535 bytes."""


def matches(topic_filter: str, topic: str) -> bool:
    """Whether `topic` (without wildcards) matches `topic_filter` (`+`: one level, a final `#`: all below)."""
    return _match(topic_filter.split("/"), topic.split("/"))


def check_filter(topic_filter: str) -> str:
    """`topic_filter`, when it is well formed. Raises ValueError."""
    levels = topic_filter.split("/")
    well_formed = (
        bool(topic_filter)
        and "\0" not in topic_filter
        and len(topic_filter.encode()) <= 65535
        and all("#" not in level or level == "#" for level in levels)
        and all("+" not in level or level == "+" for level in levels)
        and "#" not in levels[:-1]
    )
    if not well_formed:
        raise ValueError(f"{topic_filter!r} is not a topic filter")
    return topic_filter


def is_wild(topic_filter: str) -> bool:
    return "+" in topic_filter or "#" in topic_filter


class FilterTable(Generic[T]):
    """Values by topic filter; `find` is one dictionary look-up for a topic that was seen before."""

    def __init__(self) -> None:
        self._values: dict[str, T] = {}
        self._wild: dict[str, list[str]] = {}
        self._found: dict[str, tuple[T, ...]] = {}

    def __setitem__(self, topic_filter: str, value: T) -> None:
        self._values[check_filter(topic_filter)] = value
        if is_wild(topic_filter):
            self._wild[topic_filter] = topic_filter.split("/")
        self._found.clear()

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def get(self, topic_filter: str) -> T | None:
        return self._values.get(topic_filter)

    def pop(self, topic_filter: str) -> T | None:
        self._wild.pop(topic_filter, None)
        self._found.clear()
        return self._values.pop(topic_filter, None)

    def find(self, topic: str) -> tuple[T, ...]:
        """The values of every filter that matches `topic`."""
        found = self._found.get(topic)
        if found is None:
            levels = topic.split("/")
            exact = () if is_wild(topic) or topic not in self._values else (self._values[topic],)
            found = (*exact, *(self._values[key] for key, parts in self._wild.items() if _match(parts, levels)))
            if len(topic) > _CACHED_LENGTH:  # a sender may make up any number of these
                return found
            if len(self._found) >= _CACHE_LIMIT:
                self._found.clear()
            self._found[topic] = found
        return found


def _match(parts: list[str], levels: list[str]) -> bool:
    if levels[0].startswith("$") and parts[0] in ("+", "#"):
        return False
    if parts[-1] == "#":
        above = parts[:-1]
        return len(levels) >= len(above) and _same(above, levels[: len(above)])
    return len(parts) == len(levels) and _same(parts, levels)


def _same(parts: list[str], levels: list[str]) -> bool:
    return all(part in ("+", level) for part, level in zip(parts, levels, strict=True))
