"""Which versions of the protocol two programs share, and how a status says which its sender speaks."""

import pytest

from potluck.wire import births, codec
from potluck.wire.births import CoordinatorStatus, NodeStatus, Versions, in_our_versions, versions_of


@pytest.mark.parametrize(
    ("ours", "theirs", "shared"),
    [
        ((1, 1), (1, 1), 1),
        ((1, 1), (1, 2), 1),
        ((1, 2), (2, 3), 2),
        ((1, 3), (1, 2), 2),
        ((1, 1), (2, 2), 0),
        ((1, 2), (3, 4), 0),
    ],
)
def test_two_speak_where_their_ranges_overlap(ours: tuple[int, int], theirs: tuple[int, int], shared: int) -> None:
    assert Versions(*ours).shared(Versions(*theirs)) == Versions(*theirs).shared(Versions(*ours)) == shared


@pytest.mark.parametrize("versions", [Versions(1, 1), Versions(1, 2), Versions(2, 2), Versions(2, 3)])
@pytest.mark.parametrize(
    "status",
    [
        NodeStatus(node_id="n", session="s", state="online"),
        CoordinatorStatus(session="s", epoch=1, state="offline"),
    ],
)
def test_what_a_status_says_arrives_whatever_the_reader_speaks(
    status: NodeStatus | CoordinatorStatus, versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defaults are not written, so the default must not be the writer's or the reader's own version."""
    monkeypatch.setattr(births, "OURS", versions)
    payload = codec.encode(in_our_versions(status))
    monkeypatch.undo()
    read, _ = codec.decode(payload)
    assert isinstance(read, NodeStatus | CoordinatorStatus)
    assert versions_of(read) == versions


def test_a_status_without_versions_is_of_the_first() -> None:
    assert versions_of(NodeStatus(node_id="n", session="s", state="online")) == (1, 1)
    assert versions_of(NodeStatus(node_id="n", session="s", state="online", version=7)) == (7, 7)
    assert [str(Versions(2, 2)), str(Versions(2, 3))] == ["2", "2 to 3"]
