"""What the coordinator says and asks when the membership changes."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest

from coordinator.daemon import Coordinator
from coordinator.membership import Membership, NodeRefused, NodeUnknown
from potluck.bus.exchange import Envelope
from potluck.errors import InvalidSettings
from potluck.settings import CoordinatorSettings, GatewayListen
from potluck.wire.births import NodeStatus
from potluck.wire.commands import Rebirth
from potluck.wire.reports import LeaseTaken


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


def test_what_a_removed_node_sent_before_is_not_heard_after(coordinator: Coordinator) -> None:
    """It was under way, or the broker had not read its rules yet: the node would be online again, and get work."""
    coordinator._membership, coordinator._dispatcher = Membership(10.0), Mock()
    coordinator._closed = Mock(role_of={"node:n1": "node"}.get)
    coordinator._copies = coordinator._serving = coordinator._events = coordinator._inference = Mock()
    for node_id in ("n1", "gone"):
        status = NodeStatus(node_id=node_id, session="s", state="online")
        coordinator._on_presence(Envelope(coordinator.topics.node(node_id, "status"), status))
        lost = LeaseTaken(attempt_id=node_id)
        coordinator._on_outbox(Envelope(coordinator.topics.node(node_id, "outbox"), lost))
    assert set(coordinator._membership.members) == {"n1"}
    assert [call.args[0] for call in coordinator._dispatcher.on_node_message.call_args_list] == ["n1"]


@pytest.mark.parametrize("listen", [GatewayListen(), GatewayListen(host="0.0.0.0", insecure=True)])
def test_a_closed_cluster_is_never_served_open(tmp_path: Path, listen: GatewayListen) -> None:
    """A setting that was forgotten or changed would give its models, data and jobs to everybody."""
    key = tmp_path / "identity" / "ca.key"
    coordinator = Coordinator(CoordinatorSettings(state_dir=str(tmp_path), listen=listen))
    assert coordinator._found(Mock()) is None
    key.parent.mkdir()
    key.touch()
    with pytest.raises(InvalidSettings, match="of a closed cluster"):
        coordinator._found(Mock())
