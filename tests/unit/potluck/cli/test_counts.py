"""Counts in words for people, and names that are safe to print."""

from __future__ import annotations

import re
from pathlib import Path

import potluck
from potluck.wording import be, counted, printable

PLURAL = re.compile(
    r"\{[^{}]*\b(len|count|ready|there|total)\b[^{}]*\} (nodes|images|replicas|items|jobs|files|epochs|rows|models|requests)\b"
)
"""A count and a noun that is always plural."""


def test_one_of_a_thing_is_singular() -> None:
    assert [counted(count, "class", "classes") for count in (0, 1, 2)] == ["0 classes", "1 class", "2 classes"]
    assert [f"{counted(count, 'node')} {be(count)}" for count in (0, 1, 1200)] == [
        "0 nodes are",
        "1 node is",
        "1,200 nodes are",
    ]


def test_names_are_printable_and_stay_readable() -> None:
    assert printable("größe 猫 🐈 a\\b") == "größe 猫 🐈 a\\b"
    assert printable("a\n\t\x1b[2J\u202e\udc80") == r"a\n\t\x1b[2J\u202e\udc80"
    assert printable("a\n\r", "\n") == "a\n\\r"


def test_no_count_is_printed_without_the_helper() -> None:
    root = Path(potluck.__file__).parents[1]
    sources = [path for name in ("potluck", "node", "coordinator") for path in (root / name).rglob("*.py")]
    assert len(sources) > 100
    found = [
        f"{path.relative_to(root)}: {line.strip()}"
        for path in sources
        for line in path.read_text(encoding="utf-8").splitlines()
        if PLURAL.search(line)
    ]
    assert found == []
