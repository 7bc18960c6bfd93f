"""BentoML with the `.keras` file of the benchmark, batched: `bentoml serve bento_app:Mlp`, with MODEL in the environment."""

import os

import bentoml
import numpy as np


@bentoml.service(workers=1, traffic={"timeout": 60, "max_concurrency": 256}, logging={"access": {"enabled": False}})
class Mlp:
    def __init__(self) -> None:
        import keras
        import tensorflow as tf

        model = keras.saving.load_model(os.environ["MODEL"])
        specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in model.inputs]
        self._constant = tf.constant
        self._call = tf.function(lambda x: model(x, training=False), input_signature=specs).get_concrete_function()
        self._call(tf.zeros((1, *model.inputs[0].shape[1:])))

    @bentoml.api(batchable=True, max_batch_size=32, max_latency_ms=1000)
    def predict(self, inputs: np.ndarray) -> np.ndarray:
        return self._call(self._constant(inputs.astype(np.float32))).numpy()
