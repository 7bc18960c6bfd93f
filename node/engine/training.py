"""One job's training in an engine: model, optimizer and position in the data live on between rounds."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from node.engine import inputs
from potluck.errors import Cancelled, InvalidData, InvalidModel
from potluck.messages import ImageOptions, TrainTask

PROGRESS_SECONDS = 1.0
SHUFFLE_ITEMS = 4096
"""Window of the shuffle over images that are not kept decoded."""


@dataclass(frozen=True)
class Outcome:
    samples: int
    steps: int
    seconds: float
    metrics: dict[str, float]


class Session:
    """A compiled model in training. The step is Keras's own (`train_function`), so whatever was compiled holds."""

    def __init__(self, model: Any, seed: int) -> None:
        keras.utils.set_random_seed(seed)
        self.model = model
        self._seed = seed
        self._data_key: tuple[Any, ...] = ()
        self._iterator: Any = None
        self._batch = 0
        self._traced = False

    def use_data(self, task: TrainTask, parts: Sequence[inputs.Part]) -> None:
        """Train on these shards from now on; nothing happens when they are the same as before."""
        key = (tuple(shard.blob.sha256 for shard in task.data), task.batch_size)
        if key == self._data_key:
            return
        labels = inputs.labels_for(self.model, task.format.classes)
        count = sum(shard.count for shard in task.data)
        batch = min(task.batch_size, count)
        if task.format.kind == "images":
            options = inputs.options_for(self.model, task.image)
            if inputs.bytes_of(parts, options, [shard.count for shard in task.data]) > inputs.MEMORY_LIMIT_BYTES:
                dataset = self._streamed(parts, options, labels)
                dataset = dataset.batch(batch, drop_remainder=True).prefetch(2)
                self._begin(dataset, batch, key)
                return
            images, classes = inputs.load_images(parts, options)
            if int(classes.min(initial=0)) < 0:
                raise InvalidData("the data set has no labels to train on")
            arrays, target = [images], classes
        else:
            named, found = inputs.load_arrays(parts, task.format)
            if found is None:
                raise InvalidData("the data set has no target to train on: name one with --target when adding it")
            arrays, target = inputs.fit_inputs(self.model, named), found
        wanted = inputs.encode_targets(target, labels)
        self._begin(self._gathered(arrays, wanted, batch), batch, key)

    def train(
        self,
        samples: int,
        seconds: float,
        cancelled: threading.Event,
        progress: Callable[[int, dict[str, float]], None],
    ) -> Outcome:
        """Steps until `samples` are seen or `seconds` are over, one at least. Tracing the first step is not counted."""
        model, batch = self.model, self._batch
        steps_wanted = max(1, math.ceil(samples / batch))
        if not self._traced:
            self._trace()
        model.reset_metrics()
        steps = 0
        started = told = time.perf_counter()
        while steps < steps_wanted:
            if cancelled.is_set():
                raise Cancelled("the attempt was withdrawn")
            self._step()
            steps += 1
            now = time.perf_counter()
            if now - told > PROGRESS_SECONDS:
                told = now
                progress(steps * batch, self._read(steps))
            if now - started >= seconds:
                break
        metrics = self._read(steps)
        elapsed = time.perf_counter() - started
        return Outcome(samples=steps * batch, steps=steps, seconds=elapsed, metrics=metrics)

    def _begin(self, dataset: Any, batch: int, key: tuple[Any, ...]) -> None:
        options = tf.data.Options()
        options.autotune.enabled = True
        self._iterator = iter(dataset.with_options(options))
        self._data_key = key
        self._traced = self._traced and batch == self._batch
        self._batch = batch

    def _trace(self) -> None:
        """Compile the step, and take it once without keeping what it did: the first step of a round costs no more than others."""
        self.model.make_train_function(force=True)
        if not self.model.optimizer.built:
            self.model.optimizer.build(self.model.trainable_variables)
        kept = [variable.numpy() for variable in (*self.model.variables, *self.model.optimizer.variables)]
        self._step()
        for variable, value in zip((*self.model.variables, *self.model.optimizer.variables), kept, strict=True):
            variable.assign(value)
        self._traced = True

    def _step(self) -> None:
        try:
            self.model.train_function(self._iterator)
        except (ValueError, tf.errors.InvalidArgumentError) as error:
            raise InvalidModel(
                f"the model cannot be trained on this data: {' '.join(str(error).split())[:400]}"
            ) from error

    def _read(self, steps: int) -> dict[str, float]:
        metrics = {name: float(value) for name, value in _flat(self.model.get_metrics_result())}
        if not math.isfinite(metrics.get("loss", 0.0)):
            raise InvalidModel(
                f"training diverged: the loss is {metrics['loss']} after {steps} steps of this round; "
                "lower the learning rate, or look for values that are not finite in the data"
            )
        return metrics

    def _gathered(self, arrays: Sequence[Any], target: Any, batch: int) -> Any:
        """Batches by index from arrays in memory, shuffled anew in each pass."""
        held = [tf.constant(array) for array in arrays]
        wanted = tf.constant(target)
        count = len(target)

        def pick(index: Any) -> tuple[Any, Any]:
            picked = [tf.gather(array, index) for array in held]
            return (picked[0] if len(picked) == 1 else tuple(picked)), tf.gather(wanted, index)

        order = tf.data.Dataset.range(count).shuffle(count, seed=self._seed, reshuffle_each_iteration=True)
        return order.repeat().batch(batch, drop_remainder=True).map(pick, tf.data.AUTOTUNE).prefetch(2)

    def _streamed(self, parts: Sequence[inputs.Part], options: ImageOptions, labels: inputs.Labels) -> Any:
        """Items decoded as they are needed, for data that does not fit into memory."""

        def items() -> Any:
            order = np.random.default_rng(self._seed).permutation(len(parts))
            for number in order:
                yield from inputs.read_images(parts[number])

        signature = (tf.TensorSpec((), tf.string), tf.TensorSpec((), tf.int64))
        dataset = tf.data.Dataset.from_generator(items, output_signature=signature).repeat()
        dataset = dataset.shuffle(SHUFFLE_ITEMS, seed=self._seed)

        def ready(data: Any, label: Any) -> tuple[Any, Any]:
            image = inputs.decode(data, options)
            if labels.kind == "one_hot":
                return image, tf.one_hot(label, labels.units)
            if labels.kind == "binary":
                return image, tf.cast(tf.reshape(label, (1,)), tf.float32)
            return image, label

        return dataset.map(ready, tf.data.AUTOTUNE)


def _flat(metrics: dict[str, Any]) -> list[tuple[str, Any]]:
    """Metrics by name; those of a metric that reports several values (per class) are left out."""
    return [(name, value) for name, value in metrics.items() if np.ndim(value) == 0]
