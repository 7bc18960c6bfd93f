"""Precision, recall and F1 equal scikit-learn's."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

from coordinator.results import evaluation
from potluck.messages import EvaluateResult


def test_scores_equal_scikit_learns() -> None:
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 4, 500)
    guess = np.where(rng.random(500) < 0.7, truth, rng.integers(0, 5, 500))  # class 4 never occurs, but is predicted
    table = confusion_matrix(truth, guess, labels=range(6))  # class 5 does not even do that
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
    assert found.metrics["f1"] == pytest.approx(f1.mean(), rel=1e-12)
    assert [score.label for score in found.classes] == ["a", "b", "c", "d", "e", "f"]
