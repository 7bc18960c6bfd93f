"""Compiled metrics that are not means, such as AUC and precision: the counts of parts add up to Keras's values for the whole."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from coordinator.dispatch.results import evaluation as report_of
from coordinator.plans.batch import merge
from coordinator.plans.training.scores import evaluation_metrics
from potluck.errors import InvalidRequest
from potluck.wire.tasks import EvaluateTask
from support.engine_lab import Lab, engine_lab, evaluation, training
from support.models import stepwise, whole

pytestmark = [pytest.mark.tensorflow, pytest.mark.asyncio(loop_scope="module")]

ROWS = 300


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    async with engine_lab(tmp_path_factory.mktemp("engine")) as lab:
        yield lab


def network(units: int, activation: str | None, loss: Any, metrics: Callable[[Any], list[Any]]) -> Any:
    import keras

    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(units, activation=activation)])
    model.compile("sgd", loss, metrics=metrics(keras.metrics))
    return model


def binary(metrics: Any) -> list[Any]:
    curves = [metrics.AUC(name="auc"), metrics.AUC(curve="PR", num_thresholds=50, name="prc")]
    at = [metrics.PrecisionAtRecall(0.5), metrics.SensitivityAtSpecificity(0.4)]
    return [*curves, *at, "accuracy", metrics.Precision(thresholds=0.4), metrics.Recall(), metrics.TruePositives()]


def labels(metrics: Any) -> list[Any]:
    return [metrics.AUC(multi_label=True, name="auc"), metrics.F1Score(average="macro", threshold=0.5)]


def classes(metrics: Any) -> list[Any]:
    return [metrics.F1Score(average="weighted"), metrics.F1Score(name="each"), metrics.OneHotMeanIoU(num_classes=3)]


def numbers(metrics: Any) -> list[Any]:
    return [metrics.RootMeanSquaredError(), metrics.R2Score(), "mae"]


def targets(kind: str) -> Any:
    rng = np.random.default_rng(7)
    match kind:
        case "binary":
            return rng.integers(0, 2, ROWS)
        case "labels":
            return rng.integers(0, 2, (ROWS, 4)).astype(np.float32)
        case "classes":
            return np.eye(3, dtype=np.float32)[rng.integers(0, 3, ROWS)]
        case _:
            return rng.normal(size=(ROWS, 2)).astype(np.float32)


CASES: dict[str, tuple[int, str | None, str, Callable[[Any], list[Any]], set[str]]] = {
    "binary": (1, "sigmoid", "binary_crossentropy", binary,
               {"auc", "prc", "precision_at_recall", "sensitivity_at_specificity", "precision", "recall", "true_positives"}),
    "labels": (4, "sigmoid", "binary_crossentropy", labels, {"auc", "f1_score"}),
    "classes": (3, "softmax", "categorical_crossentropy", classes, {"f1_score", "one_hot_mean_io_u"}),
    "numbers": (2, None, "mse", numbers, {"root_mean_squared_error", "r2_score"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
async def test_parts_add_up_to_the_values_of_keras(lab: Lab, kind: str) -> None:
    units, activation, loss, metrics, names = CASES[kind]
    model = network(units, activation, loss, metrics)
    x, y = np.random.default_rng(3).normal(size=(ROWS, 6)).astype(np.float32), targets(kind)
    blob, shards = lab.files.model(model), lab.files.arrays(3, x=x, y=y)
    expected = stepwise(model).evaluate(x, y, batch_size=50, return_dict=True, verbose=0)
    parts = [await lab.run(evaluation(blob, whole([shard]))) for shard in shards]
    together = merge(parts)
    assert set(together.states) == names
    task: EvaluateTask = evaluation(blob, whole(shards[:1]), states=together.states)
    answer = await lab.run(task)
    assert (answer.count, answer.sums) == (0, {})
    found = evaluation_metrics(merge([*parts, answer]))
    assert names <= set(found)
    scalars = {name: value for name, value in expected.items() if np.ndim(value) == 0}
    assert {name: found[name] for name in scalars} == pytest.approx(scalars, rel=1e-5)
    at_once = await lab.run(evaluation(blob, whole(shards)))
    assert evaluation_metrics(at_once) == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize(
    ("chosen", "threshold"),
    [(lambda m: ["accuracy"], 0.5), (lambda m: [m.BinaryAccuracy(threshold=0.1)], 0.1), (lambda m: [m.Recall()], 0.5), (lambda m: [], 0.0)],
)  # fmt: skip
async def test_a_whole_report_has_one_threshold(lab: Lab, chosen: Callable[[Any], list[Any]], threshold: float) -> None:
    import keras

    model = network(1, None, keras.losses.BinaryCrossentropy(from_logits=True), chosen)
    x, y = np.random.default_rng(3).normal(size=(ROWS, 6)).astype(np.float32), targets("binary")
    blob, shards = lab.files.model(model), lab.files.arrays(1, x=x, y=y)
    expected = stepwise(model).evaluate(x, y, batch_size=50, return_dict=True, verbose=0)
    report = report_of(await lab.run(evaluation(blob, whole(shards))), ["no", "yes"])
    assert report.threshold == threshold
    assert bool(report.remark) == (threshold != 0)
    said = model.predict(x, verbose=0)[:, 0] > threshold
    np.testing.assert_array_equal(report.confusion, [[np.sum((y == a) & (said == b)) for b in (0, 1)] for a in (0, 1)])
    assert report.metrics["recall"] == pytest.approx(np.sum(said & (y == 1)) / np.sum(y == 1), rel=1e-6)
    for name in expected.keys() & {"accuracy", "recall"}:
        assert report.metrics[name] == pytest.approx(expected[name], rel=1e-6)
    both = report.metrics["precision"] + report.metrics["recall"]
    assert report.metrics["f1"] == pytest.approx(2 * report.metrics["precision"] * report.metrics["recall"] / both)


@pytest.mark.parametrize(("void", "pixels"), [(255, True), (-1, True), (-1, False)])
async def test_values_without_a_class_are_left_out_as_in_keras(lab: Lab, void: int, pixels: bool) -> None:
    import keras

    keras.utils.set_random_seed(1)
    layer = keras.layers.Conv2D(3, 1, activation="softmax") if pixels else keras.layers.Dense(3, activation="softmax")
    model = keras.Sequential([keras.Input((4, 4, 2) if pixels else (6,)), layer])
    means = keras.metrics.SparseCategoricalCrossentropy(ignore_class=void, name="entropy")
    overlap = keras.metrics.MeanIoU(3, ignore_class=void, sparse_y_pred=False, name="overlap")
    loss = keras.losses.SparseCategoricalCrossentropy(ignore_class=void)
    model.compile(keras.optimizers.SGD(0.1), loss, metrics=[means, overlap])
    rng = np.random.default_rng(3)
    x = rng.normal(size=(ROWS, *model.input_shape[1:])).astype(np.float32)
    y = rng.integers(0, 3, (ROWS, 4, 4) if pixels else (ROWS,))
    y[rng.random(y.shape) < rng.random((ROWS, 1, 1) if pixels else ROWS)] = void  # another share of each item
    y[:40] = void  # and whole batches
    y = y.astype(np.uint8 if void == 255 else np.int64)
    blob, shards = lab.files.model(model), lab.files.arrays(3, x=x, y=y)
    expected = stepwise(model).evaluate(x, y, batch_size=ROWS, return_dict=True, verbose=0)
    parts = [await lab.run(evaluation(blob, whole([shard]))) for shard in shards]
    together = merge(parts)
    answer = await lab.run(evaluation(blob, whole(shards[:1]), states=together.states))
    found = evaluation_metrics(merge([*parts, answer]))
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    table = np.array(together.confusion)
    if not pixels:
        guess, known = model.predict(x, verbose=0).argmax(axis=1), y != void
        np.testing.assert_array_equal(
            table, [[np.sum(known & (y == a) & (guess == b)) for b in range(3)] for a in range(3)]
        )
        assert found["accuracy"] == np.trace(table) / known.sum()
    by_class = {} if pixels else {"0": 5.0}
    result = await lab.run(training(blob, shards, samples=ROWS, batch_size=ROWS, class_weight=by_class), "void")
    model.train_on_batch(x, y, sample_weight=np.where(y == 0, 5.0, 1.0) if by_class else None)
    for ours, theirs in zip(lab.weights(result), model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    y[0] = 3
    with pytest.raises(InvalidRequest, match=rf"classes 0 to 3 \(beside {void}, which the loss ignores\)"):
        await lab.run(evaluation(blob, whole(lab.files.arrays(1, x=x, y=y))))


async def test_counts_of_another_length_have_no_value(lab: Lab) -> None:
    model = network(1, "sigmoid", "binary_crossentropy", lambda metrics: [metrics.AUC(name="auc")])
    blob, shards = lab.files.model(model), lab.files.arrays(1, x=np.zeros((8, 6), np.float32), y=np.zeros(8, np.int64))
    answer = await lab.run(evaluation(blob, whole(shards), states={"auc": (1.0, 2.0)}))
    assert answer.values == {}
