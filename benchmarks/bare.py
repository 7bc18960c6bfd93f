"""A bare TensorFlow process, to show what serving costs: `bare.py MODEL CORE ROWS SECONDS`.

On one core, it runs the model on batches in its memory, one after the other. It begins at a line on its input, and prints rows
per second.
"""

from __future__ import annotations

import os
import sys
import time


def main(path: str, core: int, rows: int, seconds: float) -> None:
    os.sched_setaffinity(0, {core})
    os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", KERAS_BACKEND="tensorflow", OMP_NUM_THREADS="1")
    import keras
    import numpy as np
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    model = keras.saving.load_model(path)
    specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in model.inputs]
    call = tf.function(lambda x: model(x, training=False), input_signature=specs).get_concrete_function()
    batch = np.random.default_rng(core).random((rows, *model.inputs[0].shape[1:]), np.float32)
    for _ in range(3):
        call(tf.constant(batch)).numpy()
    print("ready", flush=True)
    sys.stdin.readline()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        call(tf.constant(batch)).numpy()
        count += rows
    print(count / (time.perf_counter() - started), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
