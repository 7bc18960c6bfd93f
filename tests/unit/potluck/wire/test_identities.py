"""What is an identity, and what could be mistaken for one."""

from __future__ import annotations

import pytest

from potluck.wire.identities import ANONYMOUS, identity, is_identity


def test_a_name_and_its_role() -> None:
    assert identity("node", "kitchen-5f2a") == "node:kitchen-5f2a"
    for text in ("client:9c3e61b02d47", "coordinator:attic.lan-1_2", f"user:{'a' * 64}"):
        assert is_identity(text)


@pytest.mark.parametrize(
    "text",
    ["", ANONYMOUS, "node:", ":a", "node", "Node:a", "node:-a", "node:a b", "node:a\n", "node:a:b", "node:a/b", "node:+", f"node:{'a' * 65}"],
)  # fmt: skip
def test_what_is_none(text: str) -> None:
    assert not is_identity(text)


def test_of_an_impossible_name_there_is_none() -> None:
    with pytest.raises(ValueError, match="is no identity"):
        identity("client", "a b")
