"""Synchronous data parallelism in an engine: every step is one step of the whole group's batch.

TensorFlow makes the group (`tf.distribute.MultiWorkerMirroredStrategy`) and the all-reduce of the gradients. Each member applies
the sum of the gradients to its own model, so all members hold the same weights after each step. TensorFlow takes the members only
at its start. So a process forms one group, and an engine is started anew to join another group.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from node.engine import fusing, inputs, keras_models, keras_parts, shards, training
from node.engine.decoders import Decoder
from node.engine.gate import Gate
from node.engine.memory import shortage
from node.engine.shards import ShardPart
from node.engine.state import changing
from node.engine.training import PROGRESS_SECONDS
from node.engine.truth import truth_of
from node.engine.wording import one_line
from potluck.data.order import passes
from potluck.errors import Cancelled, InvalidModel, PeerLost
from potluck.weights import files as weights
from potluck.wire.tasks import SyncTask
from potluck.wording import counted

MEANS = ("sum_over_batch_size",)
"""Reductions of a loss whose parts, weighted by items, add up to that of the whole batch."""
STEPS_KEPT = 4
"""Compiled steps that a member keeps, for shares that come back."""
MEASURE_SECONDS = 20.0
"""How often a member measures how fast it is without the others."""
BATCHES_AHEAD = 2
"""Batches made ready while a step runs."""


class GroupMember:
    """One member of a group that trains a compiled model. Raises what `begin` does."""

    def __init__(self, task: SyncTask, paths: dict[str, Path], scratch: Path) -> None:
        self._strategy = _form(task)
        keras.utils.set_random_seed(task.seed)
        self.model = keras_models.load_model(paths[task.model.sha256], scratch, compiled=True)
        keras_models.need_trainable(self.model)
        _need_mean(self.model)
        _need_keras_step(self.model)
        if not self.model.optimizer.built:
            self.model.optimizer.build(self.model.trainable_variables)
        if task.weights is not None:
            keras_models.set_weights(self.model, paths[task.weights.sha256])
        if task.optimizer is not None:
            _set_optimizer(self.model.optimizer, paths[task.optimizer.sha256])
        self._load(task, [ShardPart(paths[shard.blob.sha256], 0, shard.count) for shard in task.data])
        self._steps: dict[tuple[int, int], Any] = {}
        """Compiled steps, by (items of this member, items of all)."""
        self._alone: Any = None
        self._measured_at = -math.inf
        self.rate = 0.0
        self.reduced_bytes = 0
        """The bytes that all members add up in a step."""

    def train(
        self,
        task: SyncTask,
        cancelled: threading.Event,
        progress: Callable[[int, dict[str, float]], None],
        gate: Gate | None = None,
    ) -> tuple[float, dict[str, float]]:
        """Run all steps of the task. Returns (seconds, metrics of this member's items). While the gate is shut, all members wait.

        Raises PeerLost if another member is gone, OutOfMemory, InvalidModel if the loss is not a number any more, Cancelled.
        """
        with closing(self._fetched(task)) as batches:
            return self._train(task, batches, cancelled, progress, gate)

    def _train(
        self,
        task: SyncTask,
        batches: Iterator[Any],
        cancelled: threading.Event,
        progress: Callable[[int, dict[str, float]], None],
        gate: Gate | None,
    ) -> tuple[float, dict[str, float]]:
        mine = task.batches[task.rank]
        shares = mine, sum(task.batches)
        if shares not in self._steps or time.perf_counter() - self._measured_at > MEASURE_SECONDS:
            first = next(batches)
            batches = itertools.chain([first], batches)
            if shares not in self._steps:
                while len(self._steps) >= STEPS_KEPT:
                    del self._steps[next(iter(self._steps))]
                self._steps[shares] = self._compile(task, first)
            self._measure(first, mine)
        run = self._steps[shares]
        self.model.reset_metrics()
        started, told_at = time.perf_counter(), -math.inf
        for step in range(1, task.steps + 1):
            if gate is not None:
                gate.wait(cancelled.is_set)
            if cancelled.is_set():
                raise Cancelled("the attempt was withdrawn")
            loss = _together(run, next(batches))
            if not math.isfinite(loss):
                raise InvalidModel(
                    f"training diverged: the loss became {loss} at step {task.first_step + step}; lower the learning rate, "
                    "or look for values in the data that are not finite"
                )
            now = time.perf_counter()
            if now - told_at >= PROGRESS_SECONDS:
                told_at = now
                progress(step * mine, self._metrics())
        return time.perf_counter() - started, self._metrics()

    def save(self, weights_path: Path, optimizer_path: Path) -> None:
        """Save the group's checkpoint. Raises InvalidModel if a weight is not a number. The loss may hide that: ReLU turns NaN to 0."""
        for weight in self.model.trainable_weights:
            if not np.isfinite(np.asarray(weight.value)).all():
                raise InvalidModel(
                    f"training diverged: weight '{weight.path}' is not finite any more; lower the learning rate, "
                    "or look for values in the data that are not finite"
                )
        keras_models.save_weights(self.model, weights_path)
        variables = self.model.optimizer.variables
        weights.save(optimizer_path, ((f"o{i:05}", np.asarray(value)) for i, value in enumerate(variables)))

    def _load(self, task: SyncTask, parts: Sequence[ShardPart]) -> None:
        """Load all data: any member may need any item."""
        source = inputs.source_for(self.model, task.format, task.image)
        self.image = source.image
        self._truth = truth_of(source, parts, "to train on", task.class_weight)
        self._count = len(self._truth)
        self._decoder: Decoder | None = None
        if source.decoded_bytes(parts) > training.memory_limit():
            encoded = [file for part in parts for file in shards.item_files(part)]
            self._decoder = source.decoder
            self._columns = [tf.constant(encoded)]
        else:
            self._columns = source.load(parts)
        self._rest = [tf.constant(column) for column in self._truth.columns]

    def _fetched(self, task: SyncTask) -> Generator[Any, None, None]:
        """This member's items of each step, from `first_step` on, made ready in a thread while the steps before them run.

        It is our own thread, not a `tf.data` pipeline: the group stood idle for seconds while a round's pipeline was freed, on an
        AMD EPYC (52 images/s of two nodes, 101 without).
        """
        whole, mine = sum(task.batches), task.batches[task.rank]
        before = sum(task.batches[: task.rank])

        order = passes(self._count, task.seed, skip=task.first_step * whole)

        @tf.function(input_signature=[tf.TensorSpec((mine,), tf.int64)])  # type: ignore[untyped-decorator]
        def pick(index: Any) -> tuple[Any, ...]:
            with tf.device("CPU"):  # where the items are: a GPU would copy all of them for each batch
                columns = [tf.gather(column, index) for column in self._columns]
                if self._decoder is not None:
                    columns = [tf.map_fn(self._decoder.decode, columns[0], fn_output_signature=self._decoder.dtype)]
                rest = [tf.gather(column, index) for column in self._rest]
                return (keras_models.packed(self.model, columns), *self._truth.packed(rest))

        def coming() -> Any:
            return pick(tf.constant(np.fromiter(order, np.int64, whole)[before : before + mine]))

        pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        try:
            ready = deque(pool.submit(coming) for _ in range(BATCHES_AHEAD))
            while True:
                yield ready.popleft().result()
                ready.append(pool.submit(coming))
        finally:
            pool.shutdown(cancel_futures=True)

    def _measure(self, batch: Any, mine: int) -> None:
        """Measure how fast this member is without the others. Nothing else changes."""
        variables = self.model.variables
        kept = [variable.numpy() for variable in variables]
        started = time.perf_counter()
        _, loss = self._alone(*batch)
        float(loss)
        self._measured_at = time.perf_counter()
        self.rate = mine / max(1e-9, self._measured_at - started)
        for variable, value in zip(variables, kept, strict=True):
            variable.assign(value)

    def _compile(self, task: SyncTask, batch: Any) -> Any:
        """The step for these shares."""
        model, strategy = self.model, self._strategy
        mine = task.batches[task.rank]
        share = mine / sum(task.batches)
        labels = self._truth.labels
        ignored = labels[0].ignored if len(labels) == 1 else None

        def part_of(y: Any) -> Any:
            """The weight of this member's loss (a mean over values with a class) in the batch's loss. The weights need not add up to 1."""
            return share if ignored is None else share * tf.reduce_mean(tf.cast(y != ignored, tf.float32))

        def gradients(x: Any, y: Any, weight: Any = None) -> tuple[list[Any], Any]:
            with tf.GradientTape() as tape:
                predicted = model(x, training=True)
                loss = model.compute_loss(x, y, predicted, weight, training=True)
                scaled = model.optimizer.scale_loss(loss) * tf.cast(part_of(y), loss.dtype)
            keras_parts.loss_mean(model).update_state(loss, sample_weight=mine)
            model.compute_metrics(x, y, predicted, weight)
            found = tape.gradient(scaled, [variable.value for variable in model.trainable_variables])
            # The gradient of an embedding has a row for each look-up. Such rows stay apart, as Keras's optimizers square each by itself.
            return found, loss

        self._alone = tf.function(gradients)
        floats = [
            variable for variable in model.non_trainable_weights if variable.dtype.startswith(("float", "bfloat"))
        ]
        moving = changing(self._alone.get_concrete_function(*batch).graph, floats)

        def summed(parts: list[Any]) -> Any:
            here = [_each(tf.identity, part) for part in parts]  # on this member's device, as the reduction requires
            return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, here)

        def step(batch: Any) -> Any:
            # In the strategy's context, Keras would divide losses by the number of members. But their shares are unequal here.
            found, loss = gradients(*batch)
            # Members have seen different items, so moving statistics are averaged by items. With 64 bits, equal values stay equal.
            means = [tf.cast(variable.value, tf.float64) * mine for variable in moving]
            part = tf.cast(part_of(batch[1]), tf.float32)
            known = [place for place, gradient in enumerate(found) if gradient is not None]
            parts = [*(found[place] for place in known), *means, tf.cast(loss, tf.float32) * part, part]
            if strategy is not None:
                parts = strategy.run(summed, args=(parts,))
            *rest, loss, whole = parts[len(known) :]
            for place, gradient in zip(known, parts, strict=False):
                found[place] = gradient
            if ignored is not None:
                found = [
                    _each(lambda part: tf.math.divide_no_nan(part, tf.cast(whole, part.dtype)), one) for one in found
                ]
                loss = tf.math.divide_no_nan(loss, whole)
            model.optimizer.apply(found, model.trainable_variables)
            for variable, mean in zip(moving, rest, strict=True):
                variable.assign(tf.cast(mean / sum(task.batches), variable.dtype))
            return loss

        variables = [*model.variables, *model.optimizer.variables]
        kept = [variable.numpy() for variable in variables]
        found, _ = self._alone(*batch)
        if not self._steps and fusing.fuse(model.optimizer):
            try:
                model.optimizer.apply(found, model.trainable_variables)
            except (ValueError, TypeError, tf.errors.OpError):  # XLA cannot compile this model
                fusing.unfuse(model.optimizer)
        for variable, value in zip(variables, kept, strict=True):
            variable.assign(value)
        self.reduced_bytes = sum(_bytes(part, 1 / share) for part in found) + sum(
            8 * math.prod(variable.shape) for variable in moving
        )
        return tf.function(step)

    def _metrics(self) -> dict[str, float]:
        results = {name: np.asarray(value) for name, value in self.model.get_metrics_result().items()}
        return {name: float(value) for name, value in results.items() if value.ndim == 0}


def _form(task: SyncTask) -> Any:
    """TensorFlow's group of these members; None: a single member needs none. Waits until all members are there."""
    if len(task.members) == 1:
        return None
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": list(task.members)}), task_type="worker", task_id=task.rank, rpc_layer="grpc"
    )
    try:
        return tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=resolver)
    except tf.errors.OpError as error:
        raise PeerLost(f"the group could not be formed: {one_line(error, 300)}") from error


def _each(change: Callable[[Any], Any], gradient: Any) -> Any:
    """The gradient with each value changed. It may be a gradient of some rows, or None."""
    if gradient is None:
        return None
    if not isinstance(gradient, tf.IndexedSlices):
        return change(gradient)
    return tf.IndexedSlices(change(gradient.values), gradient.indices, gradient.dense_shape)


def _bytes(gradient: Any, members: float) -> int:
    """The bytes of a gradient that all members add up. Rows come from each of the members."""
    if gradient is None:
        return 0
    if not isinstance(gradient, tf.IndexedSlices):
        return int(gradient.dtype.size) * math.prod(map(int, gradient.shape))
    rows = gradient.values
    # Giving all rows to all members takes half as many bytes as adding them up would.
    return round(members / 2 * int(rows.dtype.size) * math.prod(map(int, rows.shape)))


def _together(step: Any, batch: Any) -> float:
    """Run one step. Returns its loss."""
    try:
        return float(step(batch))
    except (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.DeadlineExceededError) as error:
        raise PeerLost(f"another member of the group is gone: {one_line(error, 300)}") from error
    except tf.errors.OpError as error:
        if (short := shortage(error)) is not None:
            raise short from error
        if "ollective" in str(error) or "worker" in str(error):
            raise PeerLost(f"another member of the group is gone: {one_line(error, 300)}") from error
        raise InvalidModel(f"the model cannot be trained on this data: {one_line(error, 400)}") from error


def _need_mean(model: Any) -> None:
    for loss in keras_models.output_losses(model):
        reduction = getattr(loss, "reduction", "sum_over_batch_size")
        if reduction not in MEANS:
            raise InvalidModel(
                f"strategy 'sync' needs losses that are means over a batch, and {type(loss).__name__} has "
                f"reduction={reduction!r}: compile it with 'sum_over_batch_size', or train with strategy 'local'"
            )


def _need_keras_step(model: Any) -> None:
    if type(model).train_step is not keras.Model.train_step:
        raise InvalidModel(
            f"strategy 'sync' takes Keras's own steps, and {type(model).__name__} has a train_step of its own: train with "
            "strategy 'local', or move what it does into layers, loss and metrics"
        )


def _set_optimizer(optimizer: Any, path: Path) -> None:
    stored = [value for _, value in sorted(dict(weights.load(path)).items())]
    if len(stored) != len(optimizer.variables):
        raise InvalidModel(
            f"the optimizer's state does not fit: it has {counted(len(stored), 'part')}, and the optimizer {len(optimizer.variables)}"
        )
    for variable, value in zip(optimizer.variables, stored, strict=True):
        variable.assign(value.reshape(variable.shape))
