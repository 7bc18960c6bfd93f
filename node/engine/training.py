"""One job's training in an engine: model, optimizer and position in the data live on between rounds."""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import psutil
import tensorflow as tf

from node.engine import decoders, fusing, inputs, keras_models, keras_parts, privacy, shards, state
from node.engine.decoders import Decoder
from node.engine.gate import Gate
from node.engine.loaded import FAILURES
from node.engine.memory import shortage
from node.engine.shards import ShardPart
from node.engine.truth import Truth, truth_of
from node.engine.wording import one_line
from potluck.errors import Cancelled, InvalidModel, PotluckError
from potluck.wire.tasks import TrainTask
from potluck.wire.values import ImageOptions

PROGRESS_SECONDS = 1.0
MEMORY_LIMIT_BYTES = 2 * 2**30
MEMORY_SHARE = 1 / 4
"""Decoded items are kept in memory up to this size, or this share of the free memory. With more, items are decoded in each epoch."""
SHUFFLE_ITEMS = 4096
"""Window of the shuffle over items that are not kept decoded."""
GPU_CHECK_STEPS = 20
"""On a GPU, the loss is looked at once in this many steps, as that waits for the GPU. On a CPU it costs nothing."""
REHEARSED_STEPS = 5
REHEARSED_SECONDS = 0.5
"""To measure a node's speed, this many steps are taken, and no new one after this many seconds."""
AHEAD_SHARE = 0.2
"""A node trains ahead for at most this share of a round: those steps begin from weights that are not the newest."""


@dataclass(frozen=True)
class Outcome:
    samples: int
    steps: int
    seconds: float
    seconds_ahead: float
    metrics: dict[str, float]
    weights: list[Any]


@dataclass
class _Ahead:
    """Steps after the end of a round, which count for the next round. They began at `weights`, the weights of the result."""

    weights: list[Any]
    steps_limit: int
    steps: int = 0
    seconds: float = 0.0


class TrainingSession:
    """A compiled model in training. The step is Keras's own (`train_function`), so whatever was compiled holds."""

    def __init__(self, model: Any, seed: int) -> None:
        keras.utils.set_random_seed(seed)
        model.steps_per_execution = 1  # rounds end by the clock, after any step
        self.model = model
        self.roles = state.roles(model)
        self.image: ImageOptions | None = None
        """How images of the data in use become its input."""
        self._seed = seed
        self._beginning: list[Any] = []
        self._data_key: tuple[Any, ...] = ()
        self._decoded_as: tuple[Any, Any] = (None, None)
        self._decoded: dict[ShardPart, Any] = {}
        """Decoded items of the parts in use. When shares change, the node gets other parts, but most of them are the same."""
        self._batches: Callable[[], Any] = list
        self._iterator: Any = None
        self._batch = 0
        self._noisy: privacy.NoisyStep | None = None
        self._hidden = False
        """Whether only the update may tell about the data."""
        self._traced = False
        self.begun = False
        """Whether its weights differ, or may differ, from those of the model's file."""
        self._fused: bool | None = None
        """Whether the optimizer's step is fused; None: not tried yet."""
        self._ahead: _Ahead | None = None
        self._check_every = GPU_CHECK_STEPS if tf.config.list_logical_devices("GPU") else 1

    def use_data(self, task: TrainTask, parts: Sequence[ShardPart]) -> None:
        """Train on these shards from now on. Does nothing if they are the same as before.

        Raises InvalidData, InvalidRequest, InvalidModel.
        """
        key = (
            tuple(shard.blob.sha256 for shard in task.data),
            task.batch_size,
            task.image,
            task.format,
            tuple(task.class_weight.items()),
            task.privacy,
        )
        if key == self._data_key:
            return
        source = inputs.source_for(self.model, task.format, task.image)
        whole = source.decoder is None or source.decoded_bytes(parts) <= memory_limit()
        # From the second round on, the task says how images are decoded. In the first round we find it out, with the same result.
        if (source.image, task.format) != self._decoded_as or not whole:
            self._decoded.clear()
        self._data_key, self._iterator, self._decoded_as = (), None, (source.image, task.format)
        self.image = source.image
        truth = truth_of(source, parts, "to train on", task.class_weight)
        count = len(truth)
        batch = min(task.batch_size, count)
        self._noisy, self._hidden = None, task.privacy is not None and task.privacy.noise_multiplier > 0
        if task.privacy is not None:
            privacy.check(self.model)
        if task.privacy is not None and task.privacy.unit == "example":
            self._noisy = privacy.NoisyStep(self.model, task.privacy, batch, source.load(parts), truth)
            self._data_key, self._traced, self._batch = key, False, batch
            return
        if whole:
            dataset = self._gathered(source.load(parts, self._decoded), truth)
        else:
            assert source.decoder is not None
            dataset = self._streamed(source.decoder, parts, truth)
        # Each batch is whole: it may go on from the end of one pass over the data into the next pass.
        self._batches = lambda: dataset(batch).prefetch(2)
        self._iterator = iter(self._batches())
        self._data_key = key
        self._traced = self._traced and batch == self._batch
        self._batch = batch

    def begin_anew(self, seed: int, round: int, part: int) -> None:
        """Forget all that earlier rounds left, except weights and data. What follows depends only on these numbers and the task.

        Call it when the data are in use.
        """
        tf.config.experimental.enable_op_determinism()
        # XLA's rounding depends on what the process did before: two equal jobs in one engine would differ in the last bits.
        self.model.jit_compile = False
        self.forget_moments()
        model = self.model
        random = [variable for variable in model.variables if variable.name == "seed_generator_state"]
        own, *drawn = np.random.SeedSequence([seed, round, part]).generate_state(1 + len(random)).tolist()
        for variable, number in zip(random, drawn, strict=True):
            variable.assign(np.full(variable.shape, number).astype(variable.dtype))
        self._seed, self._ahead = own, None
        keras.utils.set_random_seed(own)
        self._iterator = iter(self._batches())

    def forget_moments(self) -> None:
        """Reset the optimizer to its state in the model's file. Call it when the data are in use."""
        if not self._traced:
            self._trace()
        variables = self.model.optimizer.variables
        self._beginning = self._beginning or [variable.numpy() for variable in variables]
        for variable, value in zip(variables, self._beginning, strict=True):
            variable.assign(value)

    def begin(self, path: Path) -> None:
        """Begin a round from the weights in a file, and add the steps that were trained ahead.

        So updates travel while nodes compute (CoCoD-SGD, Shen et al., 2019). Raises InvalidModel.
        """
        ahead = self._ahead

        def moved(place: int, value: Any) -> Any:
            if ahead is None or not ahead.steps or self.roles[place] != "trained":
                return value
            return value + (keras_models.value_of(self.model.weights[place]) - ahead.weights[place])

        keras_models.set_weights(self.model, path, moved)

    def train_ahead(self, until: Callable[[], bool]) -> None:
        """Go on after a round that allows it, until `until()` is true or AHEAD_SHARE of the round is done."""
        ahead = self._ahead
        if ahead is None:
            return
        self.model.reset_metrics()
        started = time.perf_counter()
        try:
            while ahead.steps < ahead.steps_limit and not until():
                self._step()
                ahead.steps += 1
        except Exception as error:  # noqa: BLE001 - nobody asked for these steps: the next round will fail alike, and report it
            self._ahead = None
            if not isinstance(error, PotluckError) and shortage(error) is None:
                traceback.print_exc()
        ahead.seconds = time.perf_counter() - started

    def follow(self, seen: int) -> None:
        """Set the schedule of the learning rate to the position of the whole cluster, which has trained on `seen` samples."""
        optimizer = self.model.optimizer
        # An optimizer that scales the loss wraps another one.
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        if keras_parts.schedule(optimizer) is not None:
            steps, every = keras_parts.steps(optimizer), optimizer.gradient_accumulation_steps or 1
            # Accumulated gradients keep their position.
            steps.assign(seen // self._batch // every * every + int(steps.numpy()) % every)

    def train(
        self,
        samples: int,
        seconds: float,
        cancelled: threading.Event,
        progress: Callable[[int, dict[str, float]], None],
        *,
        overlap: bool = False,
        gate: Gate | None = None,
    ) -> Outcome:
        """Take steps until `samples` are seen or `seconds` are over, but at least one. The time to trace a step does not count.

        While the gate is shut, training stands still, and that time counts. So a round ends in time, and the node gets only as
        much to do as it can do beside inference. Raises InvalidModel if the loss is not finite any more, and Cancelled at the
        step after `cancelled` was set.
        """
        model, batch = self.model, self._batch
        self.begun = True
        steps_wanted = max(1, math.ceil(samples / batch))
        if not self._traced:
            self._trace()
        ahead, self._ahead = self._ahead, None
        if ahead is None or not ahead.steps:
            ahead = _Ahead([], 0)
            model.reset_metrics()
            if self._noisy is not None:  # noisy training does not train ahead
                self._noisy.reset_metrics()
        steps, told_at = ahead.steps, -math.inf
        started = time.perf_counter()

        def over() -> bool:
            return steps > 0 and time.perf_counter() - started >= seconds

        while steps < steps_wanted:
            if gate is not None:
                gate.wait(lambda: cancelled.is_set() or over())
            if cancelled.is_set():
                raise Cancelled("the attempt was withdrawn")
            if over():
                break
            logs = self._step()
            steps += 1
            if steps % self._check_every == 0 and not math.isfinite(loss := float(logs["loss"])):
                raise _diverged(loss, steps)
            now = time.perf_counter()
            if now - told_at >= PROGRESS_SECONDS:
                told_at = now
                progress(steps * batch, self._metrics(steps))
            if now - started >= seconds:
                break
        metrics = self._metrics(steps)
        elapsed = time.perf_counter() - started
        weights = keras_models.weights_of(model)
        if overlap:
            self._ahead = _Ahead(weights, int(steps * AHEAD_SHARE))
        return Outcome(
            samples=steps * batch,
            steps=steps,
            seconds=elapsed,
            seconds_ahead=ahead.seconds,
            metrics=metrics,
            weights=weights,
        )

    def rehearse(self, cancelled: threading.Event, beside: Callable[[], None]) -> tuple[float, float]:
        """Take steps that change nothing. Returns (items a second, seconds of `beside()` after them). Raises as `train`.

        `beside()` sets the weights back.
        """
        if not self._traced:
            self._trace()
        begun, self.begun = self.begun, True  # if this ends half-way, the weights are not set back
        with self._unchanged(weights=False):
            started, steps = time.perf_counter(), 0
            while steps < REHEARSED_STEPS and (not steps or time.perf_counter() - started < REHEARSED_SECONDS):
                if cancelled.is_set():
                    raise Cancelled("the attempt was withdrawn")
                float(self._step()["loss"])
                steps += 1
            seconds = time.perf_counter() - started
            ended = time.perf_counter()
            beside()
            beside_seconds = time.perf_counter() - ended
        if self._noisy is None:
            self._iterator = iter(self._batches())  # as if no item had been seen
        self.begun = begun
        return steps * self._batch / max(seconds, 1e-9), beside_seconds

    def close(self) -> None:
        """Free its memory. It cannot be used any more.

        TensorFlow keeps the variables that an optimizer has assigned in a graph (tensorflow#62854), so they are emptied.
        """
        for variable in [*self.model.variables, *self.model.optimizer.variables]:
            empty = tf.zeros((0,), variable.value.dtype)
            tf.raw_ops.AssignVariableOp(resource=variable.value.handle, value=empty)

    def _trace(self) -> None:
        """Compile the step, and take it once without effect, so that the first step of a round costs no more than others."""
        model = self.model
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        if self._noisy is None:
            if self._fused is None:
                self._fused = fusing.fuse(model.optimizer)
            model.make_train_function(force=True)
        with self._unchanged():
            self._first_step()
        self._traced = True

    @contextmanager
    def _unchanged(self, *, weights: bool = True) -> Iterator[None]:
        """Undo at the end what steps do to model and optimizer; weights are set back only if asked."""
        variables = [*self.model.variables, *self.model.optimizer.variables]
        if not weights:
            others = {id(variable) for variable in self.model.weights}
            variables = [variable for variable in variables if id(variable) not in others]
        kept = [tf.identity(variable.value) for variable in variables]
        try:
            yield
        finally:
            for variable, value in zip(variables, kept, strict=True):
                variable.assign(value)

    def _first_step(self) -> None:
        try:
            self._step()
        except (InvalidModel, tf.errors.OpError):
            if not self._fused:
                raise
            fusing.unfuse(self.model.optimizer)
            self._fused = False
            self.model.make_train_function(force=True)
            self._step()

    def _step(self) -> Any:
        try:
            if self._noisy is not None:
                return {"loss": self._noisy()}
            return self.model.train_function(self._iterator)
        except PotluckError:
            raise
        except FAILURES as error:
            if decoders.is_undecodable(error):
                raise decoders.undecodable(error, "while training") from error
            raise InvalidModel(f"the model cannot be trained on this data: {one_line(error, 400)}") from error

    def _metrics(self, steps: int) -> dict[str, float]:
        """Metrics by name, without those of several values (per class). Empty if they would tell too much about the data."""
        if self._noisy is not None:
            return self._noisy.metrics()
        results = {name: np.asarray(value) for name, value in self.model.get_metrics_result().items()}
        metrics = {name: float(value) for name, value in results.items() if value.ndim == 0}
        if not math.isfinite(metrics.get("loss", 0.0)):
            raise _diverged(metrics["loss"], steps)
        return {} if self._hidden else metrics

    def _gathered(self, held: Sequence[Any], truth: Truth) -> Callable[[int], Any]:
        """Batches by index from tensors in memory, shuffled anew in each pass."""
        rest = [tf.constant(column) for column in truth.columns]

        def pick(index: Any) -> tuple[Any, ...]:
            inputs = keras_models.packed(self.model, [tf.gather(array, index) for array in held])
            return (inputs, *truth.packed([tf.gather(column, index) for column in rest]))

        def batches(batch: int) -> Any:
            order = tf.data.Dataset.range(len(truth)).shuffle(len(truth), seed=self._seed).repeat()
            picked = order.batch(batch, drop_remainder=True).map(pick, tf.data.AUTOTUNE)
            return picked.with_options(_options())

        return batches

    def _streamed(self, decoder: Decoder, parts: Sequence[ShardPart], truth: Truth) -> Callable[[int], Any]:
        """Items decoded as they are needed, for data that does not fit into memory."""
        starts = np.cumsum([0, *(part.count for part in parts)])
        rest = truth.columns

        def items(passes: Any) -> Any:
            for number in passes.permutation(len(parts)):
                columns = [array[starts[number] : starts[number + 1]] for array in rest]
                yield from zip(shards.item_files(parts[number]), *columns, strict=True)

        signature = (tf.TensorSpec((), tf.string), *(tf.TensorSpec(array.shape[1:], array.dtype) for array in rest))

        def batches(batch: int) -> Any:
            passes = np.random.default_rng(self._seed)
            dataset = tf.data.Dataset.from_generator(lambda: items(passes), output_signature=signature).repeat()
            dataset = dataset.shuffle(SHUFFLE_ITEMS, seed=self._seed)
            dataset = dataset.map(
                lambda data, *rest: (decoder.decode(data), *truth.packed(rest)), tf.data.AUTOTUNE, deterministic=False
            )
            return dataset.batch(batch, drop_remainder=True).with_options(_options())

        return batches


def _options() -> Any:
    found = tf.data.Options()
    # Rewriting the graph would copy all held data each time an iterator begins.
    found.experimental_optimization.apply_default_optimizations = False
    # Freeing an iterator waits for its tuning thread, which sleeps: for seconds, and longer the older the iterator is.
    found.autotune.enabled = False
    return found


def memory_limit() -> int:
    """Bytes that decoded items may take now."""
    return min(MEMORY_LIMIT_BYTES, int(MEMORY_SHARE * psutil.virtual_memory().available))


def _diverged(loss: float, steps: int) -> InvalidModel:
    return InvalidModel(
        f"training diverged: the loss became {loss} at step {steps} of this round; lower the learning rate, "
        "or look for values in the data that are not finite"
    )
