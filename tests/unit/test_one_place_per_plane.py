"""Connections are made in one place per plane, where `Credentials` are looked at: who opens one elsewhere is found here."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(path for folder in ("potluck", "node", "coordinator") for path in (ROOT / folder).rglob("*.py"))
PLACES: dict[str, set[str]] = {
    # the bus
    "open_connection": {"potluck/bus/connecting.py"},
    "client_options": {"potluck/bus/connecting.py", "potluck/bus/mqtt.py"},
    "start_server": {"potluck/net/broker_embedded.py"},
    # bulk
    "ClientSession": {"potluck/net/http_client.py"},
    "urlopen": set(),
    "HTTPConnection": set(),
    # a cluster for tests and benchmarks asks where no loop runs
    "HTTPSConnection": {"potluck/net/bulk_client.py", "potluck/local_cluster.py"},
    "create_server": {"potluck/net/http.py"},
    "connect_accepted_socket": {"potluck/net/http.py"},
    "AppRunner": {"potluck/net/http.py"},
    "TCPSite": set(),
    # compute: a socket pair between a node and its own engine
    "create_connection": {"node/engine/process.py"},
}
"""Who may call what, by the name of the function."""


@pytest.fixture(scope="module")
def syntax() -> dict[str, list[ast.AST]]:
    """All that each module says. To read it takes longer than all tests here."""
    return {str(path.relative_to(ROOT)): [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))] for path in MODULES}


@pytest.fixture(scope="module")
def callers(syntax: dict[str, list[ast.AST]]) -> dict[str, set[str]]:
    """The modules that call each function, by its name."""
    found: dict[str, set[str]] = {}
    for module, nodes in syntax.items():
        for node in nodes:
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                found.setdefault(name, set()).add(module)
    return found


@pytest.mark.parametrize("name", PLACES)
def test_who_connects(name: str, callers: dict[str, set[str]]) -> None:
    assert callers.get(name, set()) == PLACES[name]


def test_the_scheme_of_an_address_is_written_in_one_place(syntax: dict[str, list[ast.AST]]) -> None:
    found = set()
    for module, nodes in syntax.items():
        prose = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            text = node.value if isinstance(node, ast.Constant) and id(node) not in prose else None
            if isinstance(text, str) and ("http:" in text or "https:" in text):
                found.add(module)
    assert found == {"potluck/wire/addresses.py"}
