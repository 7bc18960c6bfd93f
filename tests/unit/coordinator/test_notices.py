"""What the coordinator says and asks when the membership changes."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest

from coordinator.daemon import Coordinator
from coordinator.membership import NodeRefused, NodeUnknown
from potluck.settings import CoordinatorSettings
from potluck.wire.commands import Rebirth


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    return Coordinator(CoordinatorSettings(state_dir=str(tmp_path / "state")))


def test_each_reason_for_refusing_nodes_is_logged(coordinator: Coordinator, caplog: pytest.LogCaptureFixture) -> None:
    for node_id in ("a", "b", "c"):
        coordinator._notice([NodeRefused(node_id, "its session is empty"), NodeRefused(node_id, "there are too many")])
    refused = [record.getMessage() for record in caplog.records]
    assert len(refused) == 2
    assert "its session is empty" in refused[0]
    assert "there are too many" in refused[1]


def test_other_nodes_trouble_keeps_nobody_from_being_asked_for_its_birth(coordinator: Coordinator) -> None:
    coordinator._outbox = Mock()
    for number in range(200):
        coordinator._seldom.due(f"trouble {number}")
    coordinator._notice([NodeUnknown(f"n{number}") for number in range(200)])
    asked = [call.args for call in coordinator._outbox.publish.call_args_list]
    assert asked == [(coordinator.topics.node(f"n{number}", "inbox"), Rebirth()) for number in range(200)]
