"""The rival of `training.py`: one worker of TensorFlow's MultiWorkerMirroredStrategy, in a custom loop (Keras 3 has no `fit` for it).

`python multiworker.py INDEX ADDRESSES MODEL DATA STEPS BATCH` trains on the class folders in DATA; each worker takes
every n-th image. Prints one JSON object: seconds per step, and with --accuracy the accuracy on all those images at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=int)
    parser.add_argument("addresses", help="host:port of each worker, with commas between")
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("batch", type=int)
    parser.add_argument("--accuracy", type=Path, help="class folders to measure on at the end")
    arguments = parser.parse_args()
    workers = arguments.addresses.split(",")
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ["TF_CONFIG"] = json.dumps(
        {"cluster": {"worker": workers}, "task": {"type": "worker", "index": arguments.index}}
    )
    import keras
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(2)
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        model = keras.saving.load_model(arguments.model)
    size = model.inputs[0].shape[1]
    images, labels = load(arguments.data, size)
    mine = np.arange(arguments.index, len(images), len(workers))
    rng = np.random.default_rng(arguments.index)
    order = np.concatenate([rng.permutation(mine) for _ in range(1 + arguments.steps * arguments.batch // len(mine))])
    everywhere = arguments.batch * len(workers)

    @tf.function
    def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        def on_replica(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
            with tf.GradientTape() as tape:
                losses = keras.losses.sparse_categorical_crossentropy(y, model(x, training=True))
                loss = tf.reduce_sum(losses) / everywhere
            gradients = tape.gradient(loss, model.trainable_variables)
            model.optimizer.apply(gradients, model.trainable_variables)
            return loss

        return strategy.reduce("SUM", strategy.run(on_replica, args=(x, y)), axis=None)

    seconds: list[float] = []
    loss = float("nan")
    for number in range(arguments.steps):
        picked = order[number * arguments.batch : (number + 1) * arguments.batch]
        x, y = decoded(images[picked]), tf.constant(labels[picked])
        started = time.perf_counter()
        loss = float(step(x, y))
        seconds.append(time.perf_counter() - started)
    found = {"seconds": seconds, "loss": loss}
    if arguments.accuracy is not None and arguments.index == 0:
        x, y = load(arguments.accuracy, size)
        plain = keras.saving.load_model(arguments.model)
        plain.set_weights([np.asarray(weight) for weight in model.get_weights()])
        outputs = np.concatenate([plain(decoded(x[at : at + 64])).numpy() for at in range(0, len(x), 64)])
        found["accuracy"] = float((outputs.argmax(axis=1) == y).mean())
    print(json.dumps(found))


def load(folder: Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (bytes of pixels) and labels, in the order of names."""
    from PIL import Image

    classes = sorted(path.name for path in folder.iterdir())
    files = sorted(folder.glob("*/*"), key=lambda path: path.name)
    images = np.stack([np.asarray(Image.open(path).convert("RGB").resize((size, size))) for path in files])
    return images, np.array([classes.index(path.parent.name) for path in files])


def decoded(images: np.ndarray) -> np.ndarray:
    return images.astype(np.float32) / 255


if __name__ == "__main__":
    main()
