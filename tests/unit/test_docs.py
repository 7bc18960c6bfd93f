"""The documents' own rules: prose is wrapped at 100 columns, for editors and reviews."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COLUMNS = 100
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
NO_PROSE = re.compile(r"\s*(\||<|\[[^\]]+\]:)|    ")
"""A table, HTML, the target of a link, or indented code."""


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_prose_is_wrapped(path: Path) -> None:
    fenced = False
    long: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and len(line) > COLUMNS and not NO_PROSE.match(line):
            words = re.findall(r"(?:`[^`]*`|\S)+", line)  # code is not broken
            if len(words) > 2:  # a list marker, and one word that is longer than a line
                long.append(f"{number}: {line[:60]}")
    assert not long, f"wrap the paragraphs at {COLUMNS} columns"
