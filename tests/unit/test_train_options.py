"""What `train` asks for where an option is not given."""

from __future__ import annotations

from typing import Any

import pytest

from potluck.client import training


@pytest.mark.parametrize(
    ("options", "validated", "monitor"),
    [
        ({}, True, "val_loss"),
        ({"monitor": "auto"}, True, "val_loss"),
        ({}, False, None),
        ({"monitor": None}, True, None),
        ({"monitor": "val_auc"}, True, "val_auc"),
        ({"monitor_mode": "max"}, True, None),  # of what, it does not say
    ],
)
def test_the_best_epoch_is_kept_where_there_are_validation_data(
    options: dict[str, Any], validated: bool, monitor: str | None
) -> None:
    assert training.fields(options, validated=validated).get("monitor") == monitor
