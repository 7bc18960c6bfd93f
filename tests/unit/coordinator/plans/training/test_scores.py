"""Which value of a metric is the better one."""

from __future__ import annotations

import pytest

from coordinator.plans.training.scores import Best, direction, is_better
from potluck.wire.jobs import Train
from potluck.wire.values import BlobRef


def blob(number: int) -> BlobRef:
    return BlobRef(sha256=f"{number:064x}", size=1)


def test_a_metric_that_rises_is_better() -> None:
    spec = Train(model="m", dataset="d", monitor="val_accuracy")
    best = Best(0.5, 1, 1, blob(1))
    assert is_better(spec, 0.6, best)
    assert not is_better(spec, 0.4, best)
    assert not is_better(spec, float("nan"), None)
    assert is_better(spec, 0.1, None)
    assert not is_better(Train(model="m", dataset="d"), 0.6, None)


@pytest.mark.parametrize(
    ("monitor", "found"),
    [
        ("loss", "min"), ("val_mape", "min"), ("val_msle", "min"), ("kl_divergence", "min"), ("val_false_positives", "min"),
        ("val_size_mae", "min"), ("sparse_categorical_crossentropy", "min"), ("val_root_mean_squared_error", "min"),
        ("accuracy", "max"), ("val_error_accuracy", "max"), ("val_loss_kind_acc", "max"), ("auc_1", "max"), ("mean_io_u", "max"),
        ("f1_score", "max"), ("val_cosine_similarity", "max"), ("val_r2_score", "max"), ("mine", None), ("val_loss_of_face", None),
    ],
)  # fmt: skip
def test_what_is_better_goes_by_how_a_metrics_name_ends(monitor: str, found: str | None) -> None:
    assert direction(Train(model="m", dataset="d", monitor=monitor)) == found
    assert direction(Train(model="m", dataset="d", monitor=monitor, monitor_mode="min")) == "min"
