"""Training on a real cluster: small data as in Keras, the options of `train`, resuming, and one node against Keras."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potluck.client import Client
from potluck.errors import Conflict, InvalidRequest, PotluckError
from potluck.local_cluster import LocalCluster
from support.digits import mlp, split

pytestmark = [pytest.mark.tensorflow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path_factory.mktemp("cluster"), cluster="options", nodes=2, discovery=False) as running:
        yield running


@pytest.fixture(scope="module")
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(f"{cluster.broker_host}:{cluster.broker_port}", cluster=cluster.cluster) as connected:
        yield connected


def regression() -> Any:
    import keras

    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.05), "mse")
    return model


@pytest.mark.parametrize("rows", [1, 3, 20, 32])
def test_data_smaller_than_a_batch_is_trained_as_keras_does(client: Client, rows: int) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(rows, 4)).astype(np.float32), rng.normal(size=rows).astype(np.float32)
    job = client.train(regression(), (x, y), epochs=6, compression="none").wait(timeout=120)
    model = regression()
    plain = model.fit(x, y, epochs=6, verbose=0).history["loss"]
    np.testing.assert_allclose(job.history["loss"], plain, rtol=1e-4)
    for ours, theirs in zip(job.model().get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert [epoch.samples for epoch in job.result().history] == [rows * (epoch + 1) for epoch in range(6)]


def two_outputs() -> Any:
    import keras

    keras.utils.set_random_seed(3)
    given = keras.Input((4,))
    hidden = keras.layers.Dense(8, activation="tanh")(given)
    kind = keras.layers.Dense(3, activation="softmax", name="kind")(hidden)
    model = keras.Model(given, [kind, keras.layers.Dense(2, name="size")(hidden)])
    model.compile(
        keras.optimizers.SGD(0.05),
        loss={"kind": "sparse_categorical_crossentropy", "size": "mse"},
        loss_weights={"kind": 1.0, "size": 0.3},
        metrics={"kind": ["accuracy"]},
        weighted_metrics={"size": ["mae"]},
    )
    return model


@pytest.mark.parametrize("by_name", [True, False])
def test_two_outputs_with_weights_are_trained_and_validated_as_keras_does(client: Client, by_name: bool) -> None:
    rng = np.random.default_rng(0)

    def made(rows: int) -> tuple[Any, Any, Any]:
        x, size = rng.normal(size=(rows, 4)).astype(np.float32), rng.normal(size=(rows, 2)).astype(np.float32)
        kind = rng.integers(0, 3, rows)
        y = {"size": size, "kind": kind} if by_name else [kind, size]
        return x, y, rng.uniform(0, 3, rows).astype(np.float32)

    (x, y, weights), held_out = made(20), made(100)
    job = client.train(two_outputs(), (x, y, weights), validation=held_out, epochs=4, compression="none", monitor=None)
    job.wait(timeout=120)
    model = two_outputs()
    targets = [y["kind"], y["size"]] if by_name else y
    wanted = [held_out[1]["kind"], held_out[1]["size"]] if by_name else held_out[1]
    validation = (held_out[0], wanted, held_out[2])
    plain = model.fit(x, targets, sample_weight=weights, validation_data=validation, validation_batch_size=100,
                      epochs=4, verbose=0).history  # fmt: skip
    assert set(job.history) == set(plain)
    for name, values in plain.items():
        np.testing.assert_allclose(job.history[name], values, rtol=1e-4, err_msg=name)
    scored = client.evaluate(job.model(), held_out).wait(timeout=120).evaluation
    expected = model.evaluate(*validation[:2], sample_weight=held_out[2], batch_size=100, return_dict=True, verbose=0)
    assert scored.metrics == pytest.approx(expected, rel=1e-4)
    predicted = client.predict(job.model(), held_out[0]).wait(timeout=120).predictions
    for name, theirs in zip(("kind", "size"), model.predict(held_out[0], verbose=0), strict=True):
        np.testing.assert_allclose(predicted[name], theirs, atol=1e-5)


def test_metrics_that_are_not_means_cover_all_items_and_can_be_monitored(client: Client) -> None:
    import keras

    rng = np.random.default_rng(5)
    x = rng.normal(size=(1500, 4)).astype(np.float32)
    y = (x[:, 0] + 0.5 * rng.normal(size=1500) > 0.3).astype(np.int64)
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, activation="sigmoid")])
    metrics = [keras.metrics.AUC(name="auc"), keras.metrics.Precision(name="precision"), "accuracy"]
    model.compile(keras.optimizers.SGD(0.05), "binary_crossentropy", metrics=metrics)
    job = client.train(model, (x, y), validation=(x[:900], y[:900]), epochs=3, monitor="val_auc").wait(timeout=120)
    best = job.result().best_epoch
    assert job.history["val_auc"][best - 1] == max(job.history["val_auc"])
    trained = job.model()
    expected = trained.evaluate(x[:900], y[:900], return_dict=True, verbose=0)
    assert expected["auc"] > 0.8
    assert job.history["val_auc"][best - 1] == pytest.approx(expected["auc"], rel=1e-4)
    scored = client.evaluate(trained, (x[:900], y[:900])).wait(timeout=120).evaluation
    for name in ("auc", "precision", "accuracy"):
        assert scored.metrics[name] == pytest.approx(expected[name], rel=1e-4)


def test_a_table_with_two_targets_and_a_column_of_weights(client: Client, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    table = rng.normal(size=(24, 7)).round(4)
    table[:, 4] = rng.integers(0, 3, 24)
    table[:, 6] = np.abs(table[:, 6])
    path = tmp_path / "table.csv"
    np.savetxt(path, table, delimiter=",", header="a,b,c,d,kind,size,importance", comments="", fmt="%g")
    import keras

    def make() -> Any:
        keras.utils.set_random_seed(3)
        given = keras.Input((4,))
        outputs = {"kind": keras.layers.Dense(3, activation="softmax")(given), "size": keras.layers.Dense(1)(given)}
        model = keras.Model(given, outputs)
        model.compile("sgd", {"kind": "sparse_categorical_crossentropy", "size": "mse"})
        return model

    job = client.train(
        make(), path, target=["kind", "size"], sample_weight="importance", epochs=3, compression="none"
    ).wait(timeout=120)
    y = {"kind": table[:, 4], "size": table[:, 5:6]}
    plain = make().fit(table[:, :4], y, sample_weight=table[:, 6], epochs=3, verbose=0).history
    assert set(job.history) == {"loss", "kind_loss", "size_loss"}
    for name, values in plain.items():
        np.testing.assert_allclose(job.history[name], values, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("rows", [33, 64, 100, 200])
def test_every_epoch_of_a_small_data_set_is_trained_and_measured(client: Client, rows: int) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(rows, 4)).astype(np.float32), rng.normal(size=rows).astype(np.float32)
    job = client.train(regression(), (x, y), validation=(x, y), epochs=4).wait(timeout=120)
    assert np.isfinite(job.history["loss"]).all()
    assert job.history["val_loss"][-1] < job.history["val_loss"][0]
    assert rows * 4 - 4 * 32 <= job.result().history[-1].samples <= rows * 4 + 64


def test_early_stopping_gives_the_model_of_the_best_epoch(client: Client) -> None:
    def hasty() -> Any:
        """A model that soon knows the few items by heart."""
        model = mlp()
        model.optimizer.learning_rate = 0.01
        return model

    data = split()
    few = (data["x_train"][:64], data["y_train"][:64])
    job = client.train(
        hasty(), few, validation=(data["x_test"], data["y_test"]), epochs=400, monitor="val_loss", patience=4
    ).wait(timeout=200)
    ended = job.result()
    losses = job.history["val_loss"]
    assert len(losses) < 400
    assert ended.best_epoch == int(np.argmin(losses)) + 1 == len(losses) - 4
    loss, _ = job.model().evaluate(data["x_test"], data["y_test"], verbose=0)
    assert loss == pytest.approx(min(losses), rel=1e-3)
    held_out = (data["x_test"], data["y_test"])
    by_itself = client.train(hasty(), few, validation=held_out, epochs=len(losses)).wait(timeout=200)
    assert by_itself.result().best_epoch == int(np.argmin(by_itself.history["val_loss"])) + 1


def test_a_cancelled_job_is_resumed_where_it_stood(client: Client) -> None:
    data = split()
    xy = (data["x_train"], data["y_train"])
    job = client.train(mlp(), xy, epochs=10_000)
    with pytest.raises(Conflict, match="has not ended"):
        client.train(mlp(), xy, epochs=20_000, resume=job)
    for progress in job.progress():
        if progress.epoch > 8:
            break
    job.cancel()
    before = job.result()
    assert before.checkpoint is not None
    assert len(before.rounds) >= sum(epoch.rounds for epoch in before.history) > 8
    done = len(before.history)
    again = client.train(mlp(), xy, epochs=done + 2, resume=job.id).wait(timeout=120)
    assert [epoch.epoch for epoch in again.result().history] == [done + 1, done + 2]
    assert again.history["loss"][0] < before.history[0].metrics["loss"] / 2


def test_class_weights_by_label_or_number(client: Client) -> None:
    data = split()
    xy = (data["x_train"], data["y_train"])
    weights = dict.fromkeys(range(1, 10), 0.0)
    job = client.train(mlp(), xy, epochs=2, class_weight=weights).wait(timeout=120)
    outputs = job.model().predict(data["x_test"], verbose=0)
    assert (outputs.argmax(axis=1) == 0).mean() > 0.99  # nothing else was worth learning
    assert client.job(job.id[:-2]).id == job.id, "a beginning that only this job has"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"patience": 3}, "patience needs a metric"),
        ({"monitor": "val_loss"}, "needs validation data"),
        ({"monitor": "f1"}, "no metric 'f1' to monitor.*accuracy, loss"),
        ({"class_weight": {"x": 1.0}}, "class_weight names x"),
        ({"compression": "zip"}, "compression must be 'auto'"),
        ({"outer_momentum": 1.5}, "outer_momentum must be"),
        ({"speed": 9}, "unexpected keyword argument 'speed'"),
        ({"sample_weight": "w"}, "sample_weight 'w' names a column or array of a file"),
        ({"resume": "nothing"}, "no job 'nothing'"),
    ],
)
def test_options_that_make_no_sense_are_refused(client: Client, options: Any, words: str) -> None:
    data = split()
    with pytest.raises(PotluckError, match=words):
        client.train(mlp(), (data["x_train"], data["y_train"]), **options).wait(timeout=60)


def test_validation_data_of_another_kind_is_refused_before_anything_is_trained(client: Client, tmp_path: Path) -> None:
    data = split()
    xy = (data["x_train"], data["y_train"])
    with pytest.raises(InvalidRequest, match="validation data need the same"):
        client.train(mlp(), xy, validation=({"a": data["x_test"], "b": data["x_test"]}, data["y_test"]))


def test_updates_in_four_bits_learn_as_those_in_full(client: Client) -> None:
    data = split()
    found = {}
    for compression in ("none", "int4"):
        job = client.train(
            mlp(), (data["x_train"], data["y_train"]), validation=(data["x_test"], data["y_test"]), epochs=12,
            compression=compression,
        ).wait(timeout=200)  # fmt: skip
        found[compression] = job.history["val_accuracy"][-1]
        sizes = [epoch.exchanged_bytes / epoch.rounds for epoch in job.result().history]
        assert max(sizes) < (200_000 if compression == "none" else 60_000)
    assert found["int4"] > found["none"] - 0.03


def test_keras_callbacks_follow_a_job_and_end_it(client: Client, tmp_path: Path) -> None:
    import keras

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 4)).astype(np.float32), rng.normal(size=64).astype(np.float32)
    log = tmp_path / "log.csv"
    stopper = keras.callbacks.EarlyStopping("loss", patience=2, min_delta=10.0)  # nothing ever improves by so much
    job = client.train(regression(), (x, y), epochs=500)
    history = job.follow([keras.callbacks.CSVLogger(str(log)), stopper])
    epochs = len(history["loss"])
    assert 3 <= epochs < 500, "the epoch under way at the end of the third is the last"
    assert job.model().count_params() == regression().count_params()
    rows = log.read_text().splitlines()
    assert rows[0].startswith("epoch,loss")
    assert [float(row.split(",")[1]) for row in rows[1:]] == history["loss"]
    assert [epoch.epoch for epoch in job.epochs()] == list(range(1, epochs + 1)), (
        "epochs can be read again, from the first"
    )


def test_rounds_that_change_nothing_count(client: Client) -> None:
    """Their weights have the same hash as before."""
    import keras

    model = regression()
    model.compile(keras.optimizers.SGD(0.0), "mse")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(256, 4)).astype(np.float32), rng.normal(size=256).astype(np.float32)
    job = client.train(model, (x, y), validation=(x, y), epochs=3, strategy="local").wait(timeout=120)
    assert len(job.history["val_loss"]) == 3
    for ours, theirs in zip(job.model().get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_weights_that_begin_at_zero_are_trained(client: Client) -> None:
    """The file of the first step is then equal to the file of the new weights."""
    import keras

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    model.compile(keras.optimizers.SGD(0.05), "mse")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 4)).astype(np.float32)
    y = x @ np.array([1, -2, 3, 0], np.float32)
    job = client.train(model, (x, y), epochs=10, strategy="local").wait(timeout=120)
    assert job.history["loss"][-1] < 0.1 * job.history["loss"][0]


def test_jobs_that_hold_the_same_weights_do_not_take_them_from_each_other(client: Client) -> None:
    """As in a search over learning rates: all jobs begin with the same weights, and two have the same weights in every round."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(512, 4)).astype(np.float32), rng.normal(size=512).astype(np.float32)
    jobs = [client.train(regression(), (x, y), epochs=epochs, deterministic=True) for epochs in (6, 6, 5)]
    for job in jobs:
        job.wait(timeout=200)
    first, second, _ = ([weights.tobytes() for weights in job.model().get_weights()] for job in jobs)
    assert first == second


@pytest.mark.parametrize("every", [None, 4])
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_a_schedule_follows_the_samples_of_the_cluster(every: int | None, policy: str) -> None:
    """Also around an optimizer that accumulates gradients, and one that scales the loss."""
    import keras

    from node.engine.training import TrainingSession

    keras.config.set_dtype_policy(policy)
    try:
        model = regression()
        schedule = keras.optimizers.schedules.PiecewiseConstantDecay([50], [0.1, 0.2])
        model.compile(keras.optimizers.SGD(schedule, gradient_accumulation_steps=every), "mse")
        model.optimizer.build(model.trainable_variables)
        session = TrainingSession(model, seed=0)
        session._batch = 32
        session.follow(3200)
        assert float(model.optimizer.learning_rate) == pytest.approx(0.2)
        session.follow(1280)
        assert float(model.optimizer.learning_rate) == pytest.approx(0.1)
    finally:
        keras.config.set_dtype_policy("float32")


def test_an_average_that_rounds_would_lose_is_refused(client: Client) -> None:
    import keras

    model = regression()
    model.compile(keras.optimizers.Adam(use_ema=True), "mse")
    x, y = np.zeros((64, 4), np.float32), np.zeros(64, np.float32)
    with pytest.raises(PotluckError, match="use_ema=True"):
        client.train(model, (x, y), epochs=1).wait(timeout=120)
