"""Lines of keys in TOML: found for every document that tomllib reads."""

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from potluck.toml_lines import lines_of_keys

DOCUMENT = """\
# a comment with = and [ and "
first = 1  # ["
"quoted.key" = "x # = ["
many = [  # one
  "]", 'a = 1', # ]
  [2],
]
text = '''
[not.a.table]
no = 1'''
other = \"\"\"a \\\"\"\" b
c = 1\"\"\"\"
dotted . "a]" . c = { in = [1], line = "}" }

[table] # x
a=1
[ table . 'in.ner' ]
b=2
[[list]]
c = 3
[["x]"]]
"""


def test_every_statement_has_its_line() -> None:
    tomllib.loads(DOCUMENT)
    assert lines_of_keys(DOCUMENT) == {
        ("first",): 2,
        ("quoted.key",): 3,
        ("many",): 4,
        ("text",): 8,
        ("other",): 11,
        ("dotted",): 13,
        ("dotted", "a]"): 13,
        ("dotted", "a]", "c"): 13,
        ("table",): 15,
        ("table", "a"): 16,
        ("table", "in.ner"): 17,
        ("table", "in.ner", "b"): 18,
        ("list",): 19,
        ("list", "c"): 20,
        ("x]",): 21,
    }


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_the_end_of_the_file(end: str) -> None:
    assert lines_of_keys(f"a = 1\r\n# b\r\n[c]\r\nd = 'x'{end}") == {("a",): 1, ("c",): 3, ("c", "d"): 4}


signs = some.text(alphabet="ab =.#[]{}'\"\\\n", max_size=12)


@given(some.lists(some.tuples(signs, signs, some.sampled_from(["", "\n", "# [x\n"])), unique_by=lambda one: one[0]))
def test_texts_of_any_signs(entries: list[tuple[str, str, str]]) -> None:
    def quoted(text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'

    document, lines, line = "", {}, 1
    for key, value, before in entries:
        line += before.count("\n")
        lines[(key,)] = line
        document += f"{before}{quoted(key)} = {quoted(value)}\n"
        line += 1
    read: dict[str, Any] = tomllib.loads(document)
    assert read == {key: value for key, value, _ in entries}
    assert lines_of_keys(document) == lines
