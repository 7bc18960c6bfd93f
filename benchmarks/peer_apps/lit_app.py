"""LitServe with the `.keras` file of the benchmark, batched: `lit_app.py MODEL PORT BATCH_WAIT_SECONDS`."""

import sys

import litserve as ls
import numpy as np

MODEL, PORT, BATCH_WAIT_SECONDS = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])


class KerasModel(ls.LitAPI):
    def setup(self, device: str) -> None:
        import keras
        import tensorflow as tf

        model = keras.saving.load_model(MODEL)
        specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in model.inputs]
        self._constant = tf.constant
        self._call = tf.function(lambda x: model(x, training=False), input_signature=specs).get_concrete_function()
        self._call(tf.zeros((1, *model.inputs[0].shape[1:])))

    def decode_request(self, request: dict) -> np.ndarray:
        asked = request["inputs"][0]
        return np.asarray(asked["data"], np.float32).reshape(asked["shape"][1:])

    def batch(self, inputs: list) -> np.ndarray:
        return np.stack(inputs)

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self._call(self._constant(x)).numpy()

    def unbatch(self, output: np.ndarray) -> list:
        return list(output)

    def encode_response(self, output: np.ndarray) -> dict:
        told = {"name": "output", "datatype": "FP32", "shape": [1, len(output)], "data": output.tolist()}
        return {"model_name": "mlp", "outputs": [told]}


if __name__ == "__main__":
    api = KerasModel(max_batch_size=32, batch_timeout=BATCH_WAIT_SECONDS)
    # As its documentation advises: requests over ZeroMQ, and as many servers of the API as there are processors to spare.
    ls.LitServer(api, accelerator="cpu", workers_per_device=1, fast_queue=True).run(
        host="127.0.0.1", port=PORT, num_api_servers=1, log_level="warning", generate_client_file=False
    )
