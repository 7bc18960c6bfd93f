"""What `train` sends for an option that is not given."""

from __future__ import annotations

from typing import Any

import pytest

from potluck.client import training
from potluck.errors import InvalidRequest


@pytest.mark.parametrize(
    ("options", "validated", "monitor"),
    [
        ({}, True, "val_loss"),
        ({"monitor": "auto"}, True, "val_loss"),
        ({}, False, None),
        ({"monitor": None}, True, None),
        ({"monitor": "val_auc"}, True, "val_auc"),
        ({"monitor_mode": "min"}, True, "val_loss"),
        ({"patience": 3}, True, "val_loss"),
    ],
)
def test_the_best_epoch_is_kept_where_there_are_validation_data(
    options: dict[str, Any], validated: bool, monitor: str | None
) -> None:
    assert training.fields(options, validated=validated).get("monitor") == monitor


def test_a_mode_that_does_not_fit_what_is_monitored_by_default_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="name the metric"):
        training.fields({"monitor_mode": "max"}, validated=True)
    assert "monitor" not in training.fields({"monitor_mode": "max"}, validated=False)
