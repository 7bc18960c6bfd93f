"""Recordings of one data set on several nodes have one sample rate."""

from __future__ import annotations

import pytest

from coordinator.plans.node_data import fits, joined
from potluck.errors import InvalidRequest
from potluck.wire.values import DataFormat, NodeData


def held(rate: int) -> NodeData:
    return NodeData(name="calls", format=DataFormat(kind="audio", classes=("a", "b"), rate=rate), count=5)


def test_parts_of_one_rate_are_joined_with_it() -> None:
    dataset = joined("calls", {"n1": held(8000), "n2": held(8000)})
    assert (dataset.format.rate, dataset.count) == (8000, 10)
    assert fits(held(8000), dataset.format)
    assert not fits(held(16000), dataset.format)


def test_parts_of_different_rates_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="audio at 8000 Hz on n1, audio at 16000 Hz on n2"):
        joined("calls", {"n1": held(8000), "n2": held(16000)})
