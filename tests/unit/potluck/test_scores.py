"""Class scores: one for each class, also where a model has a score only for the second."""

from __future__ import annotations

import numpy as np

from potluck.cli.predict import labels
from potluck.scores import of_classes


def test_one_score_is_that_of_the_second_of_two_classes() -> None:
    scores, found = of_classes(np.array([[0.25], [0.75]], np.float32), ("neg", "pos"))
    assert scores.tolist() == [[0.75, 0.25], [0.25, 0.75]]
    assert found == ("neg", "pos")
    assert labels({"": np.array([[0.25], [0.75]], np.float32)}, ("neg", "pos")) == ["neg", "pos"]


def test_classes_that_do_not_fit_are_no_labels() -> None:
    for columns, classes in ((1, ()), (1, ("a", "b", "c")), (3, ("a", "b"))):
        values = np.zeros((2, columns), np.float32)
        scores, found = of_classes(values, classes)
        assert scores is values
        assert found == ()
        assert labels({"": values}, classes) == []
    assert labels({"": np.zeros((1, 2)), "b": np.zeros((1, 2))}, ("a", "b")) == []
    assert labels({"": np.array([[0.1, 0.9]])}, ("a", "b")) == ["b"]
