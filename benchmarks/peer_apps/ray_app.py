"""Ray Serve with the `.keras` file of the benchmark, batched by `serve.batch`: `ray_app.py MODEL PORT BATCH_WAIT_SECONDS`.

Says "ready" on its output, and serves until its input is closed.
"""

import sys

import numpy as np
import ray
from ray import serve
from ray.serve.schema import LoggingConfig
from starlette.requests import Request

MODEL, PORT, BATCH_WAIT_SECONDS = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])


@serve.deployment(max_ongoing_requests=256)
class KerasModel:
    def __init__(self, path: str) -> None:
        import keras
        import tensorflow as tf

        model = keras.saving.load_model(path)
        specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in model.inputs]
        self._constant = tf.constant
        self._call = tf.function(lambda x: model(x, training=False), input_signature=specs).get_concrete_function()
        self._call(tf.zeros((1, *model.inputs[0].shape[1:])))

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=BATCH_WAIT_SECONDS)
    async def predict(self, rows: list[np.ndarray]) -> list[np.ndarray]:
        return list(self._call(self._constant(np.stack(rows))).numpy())

    async def __call__(self, request: Request) -> dict:
        asked = (await request.json())["inputs"][0]
        output = await self.predict(np.asarray(asked["data"], np.float32).reshape(asked["shape"][1:]))
        told = {"name": "output", "datatype": "FP32", "shape": [1, len(output)], "data": output.tolist()}
        return {"model_name": "mlp", "outputs": [told]}


ray.init(include_dashboard=False, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": PORT}, logging_config=LoggingConfig(enable_access_log=False))
serve.run(KerasModel.bind(MODEL), logging_config=LoggingConfig(enable_access_log=False))
print("ready", flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
