"""Connections are made in one place per plane, where `Credentials` are looked at: who opens one elsewhere is found here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(path for folder in ("potluck", "node", "coordinator") for path in (ROOT / folder).rglob("*.py"))
PLACES: dict[str, set[str]] = {
    # the bus
    "open_connection": {"potluck/bus/connecting.py"},
    "client_options": {"potluck/bus/mqtt.py"},
    "start_server": {"potluck/net/broker_embedded.py"},
    # bulk
    "ClientSession": {"potluck/net/http_client.py"},
    "urlopen": set(),
    "HTTPConnection": set(),
    "create_server": {"potluck/net/http.py"},
    "AppRunner": {"potluck/net/http.py"},
    "TCPSite": set(),
    # compute: a socket pair between a node and its own engine
    "create_connection": {"node/engine/process.py"},
}
"""Who may call what, by the name of the function."""


def trees() -> Iterator[tuple[str, ast.Module]]:
    for path in MODULES:
        yield str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PLACES)
def test_who_connects(name: str) -> None:
    found = set()
    for module, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and name == (
                node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            ):
                found.add(module)
    assert found == PLACES[name]


def test_the_scheme_of_an_address_is_written_in_one_place() -> None:
    found = set()
    for module, tree in trees():
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) and id(node) not in prose else None
            if isinstance(text, str) and ("http:" in text or "https:" in text):
                found.add(module)
    assert found == {"potluck/wire/addresses.py"}
