"""Precision, recall and F1 equal scikit-learn's."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

from coordinator.dispatch.results import evaluation, predictions
from potluck.blobs.store import BlobStore
from potluck.errors import InvalidModel
from potluck.wire.tasks import EvaluateResult, PredictResult
from potluck.wire.values import Tensor


def test_scores_equal_scikit_learns() -> None:
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 4, 500)
    guess = np.where(rng.random(500) < 0.7, truth, rng.integers(0, 5, 500))  # class 4 never occurs, but is predicted
    table = confusion_matrix(truth, guess, labels=range(6))  # class 5 is not even predicted
    confusion = tuple(tuple(int(cell) for cell in row) for row in table)
    found = evaluation(
        EvaluateResult(count=500, sums={"loss": 250.0}, confusion=confusion), ["a", "b", "c", "d", "e", "f"]
    )
    precision, recall, f1, support = precision_recall_fscore_support(truth, guess, labels=range(6), zero_division=0)
    assert found.metrics["loss"] == 0.5
    assert found.metrics["accuracy"] == pytest.approx(accuracy_score(truth, guess), rel=1e-12)
    for i, score in enumerate(found.classes):
        assert score.support == support[i]
        assert (score.precision, score.recall, score.f1) == pytest.approx((precision[i], recall[i], f1[i]), rel=1e-12)
    macro = precision_recall_fscore_support(truth, guess, average="macro", zero_division=0)  # over classes that occur
    assert [found.metrics[name] for name in ("precision", "recall", "f1")] == pytest.approx(macro[:3], rel=1e-12)
    assert [score.label for score in found.classes] == ["a", "b", "c", "d", "e", "f"]


def test_items_of_no_class_are_right_or_wrong_only_where_the_model_counts_them() -> None:
    table = ((3, 1), (0, 4))  # of ten items, two have no class
    assert evaluation(EvaluateResult(count=10, sums={"loss": 5.0}, confusion=table), []).metrics["accuracy"] == 7 / 8
    as_keras = EvaluateResult(count=10, sums={"accuracy": 10 * float(np.float32(0.7))}, confusion=table)
    assert evaluation(as_keras, []).metrics["accuracy"] == 7 / 10
    none = EvaluateResult(count=2, sums={"loss": 0.0}, confusion=((0, 0), (0, 0)))
    assert evaluation(none, []).metrics == {"loss": 0.0, "accuracy": 0.0, "precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_one_output_for_two_classes_is_summed_up_by_its_positive_class() -> None:
    table = ((50, 10), (20, 20))
    found = evaluation(EvaluateResult(count=100, confusion=table, threshold=0.5, middle=0.5), ["no", "yes"])
    assert found.metrics == {"accuracy": 0.7, "precision": 20 / 30, "recall": 0.5, "f1": 2 * 20 / (30 + 40)}
    assert (found.threshold, found.remark) == (0.5, "")


def test_f1_is_that_of_the_precision_and_recall_beside_it_and_means_over_classes_are_named_so() -> None:
    compiled = EvaluateResult(count=100, confusion=((50, 10), (20, 20)), values={"precision": 0.6, "recall": 0.4})
    found = evaluation(compiled, []).metrics
    assert found["f1"] == pytest.approx(2 * 0.6 * 0.4)
    assert found["macro_f1"] == pytest.approx((100 / 130 + 40 / 70) / 2)


def test_a_report_with_its_threshold_elsewhere_than_the_loss_says_so() -> None:
    found = evaluation(EvaluateResult(count=2, confusion=((1, 0), (0, 1)), threshold=0.5, middle=0.0), [])
    assert "threshold=0" in found.remark


def part(name: str, *shape: int) -> PredictResult:
    rows = np.zeros(shape, np.float32)
    return PredictResult(
        count=shape[0], outputs=(Tensor(name=name, datatype="FP32", shape=shape, data=rows.tobytes()),)
    )


def test_parts_of_predictions_are_joined_where_they_are_of_one_form_and_named_where_not(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 2**20)
    (joined,) = predictions([part("y", 2, 3), part("y", 1, 3)], store)
    assert joined.shape == (3, 3)
    for other in (part("y", 2, 4), part("z", 2, 3), PredictResult(count=2, outputs=())):
        with pytest.raises(InvalidModel, match=r"y FP32 \[3\] and "):
            predictions([part("y", 2, 3), other], store)
