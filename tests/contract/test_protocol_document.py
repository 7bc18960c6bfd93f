"""docs/protocol.md and docs/nodes.md agree with the code: their messages decode, and their tables are complete."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest

from potluck import errors
from potluck.cli.output import plain
from potluck.wire import codec, topics
from potluck.wire.births import NodeStatus, NodeTelemetry
from potluck.wire.commands import AnyCommand
from potluck.wire.jobs import Deploy, Train
from potluck.wire.messages import AnyMessage
from potluck.wire.reports import AnyReport
from potluck.wire.values import INLINE_LIMIT_BYTES

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "protocol.md").read_text(encoding="utf-8")
NODES = (DOCS / "nodes.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```json\n(.*?)```", TEXT + NODES, flags=re.DOTALL)
EXAMPLES += [
    example.replace("""'"$me"'""", "answers/me")
    for example in re.findall(r"-m '(\{.*?\})'(?:\n|$)", TEXT, flags=re.DOTALL)
]


def check_fields(example: object, decoded: object) -> None:
    """Check that the message has every key of the example: decoding would ignore a misspelt key."""
    if isinstance(example, dict) and isinstance(decoded, dict):
        unknown = set(example) - set(decoded) - {"type", "kind"}
        assert not unknown, unknown
        for key in set(example) & set(decoded):
            check_fields(example[key], decoded[key])
    elif isinstance(example, list) and isinstance(decoded, list):
        for item, other in zip(example, decoded, strict=True):
            check_fields(item, other)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: json.loads(text)["type"])
def test_every_example_decodes(example: str) -> None:
    message, encoding = codec.decode(example.encode())
    assert encoding == "json"
    check_fields(json.loads(example), plain(message))


def test_the_error_codes_are_all_there() -> None:
    table = TEXT.split("| code | meaning | retryable |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (`.*?`) \|.*\| (yes|no) \|$", table, flags=re.MULTILINE)
    documented = {code: retry == "yes" for codes, retry in rows for code in re.findall(r"`(\w+)`", codes)}
    known = {code: kind.retryable for code, kind in errors.BY_CODE.items()}
    assert known.items() <= documented.items()


def test_every_question_of_clients_is_there() -> None:
    for kind in AnyMessage.__args__:
        name = kind.__name__
        if name.startswith(("List", "Get")) or name in {
            "CancelJob",
            "AddDataset",
            "RemoveDataset",
            "RegisterModel",
            "SetAlias",
            "RemoveAlias",
            "TagModel",
            "DeleteModel",
            "FindReplicas",
            "Undeploy",
            "Promote",
            "RollBack",
            "FollowEvents",
            "Infer",
        }:
            assert f"`{name}`" in TEXT, name
    for field in (*Train.__struct_fields__, *Deploy.__struct_fields__):
        assert f"`{field}`" in TEXT, field
    assert f"{INLINE_LIMIT_BYTES:,}" in TEXT


def test_the_topics_are_those_of_the_code() -> None:
    for topic in re.findall(r"^\| ([a-z]+/\S+)", topics.__doc__ or "", flags=re.MULTILINE):
        assert topic in TEXT, topic


def test_what_a_node_hears_and_says_is_there() -> None:
    for kinds in (AnyCommand, AnyReport):
        for kind in get_args(kinds):
            assert f"`{kind.__name__}`" in NODES, kind
    for kind in (NodeStatus, NodeTelemetry):
        for field in set(kind.__struct_fields__) - {"id", "reply_to", "expires"}:
            assert f"`{field}`" in NODES or f'"{field}"' in NODES, field
