"""MLServer's custom runtime for the `.keras` file of the benchmark: one graph for any batch size, made and tried at load."""

import keras
import numpy as np
import tensorflow as tf
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class KerasModel(MLModel):
    async def load(self) -> bool:
        model = keras.saving.load_model(self.settings.parameters.uri)
        specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in model.inputs]
        self._call = tf.function(lambda x: model(x, training=False), input_signature=specs).get_concrete_function()
        self._call(tf.zeros((1, *model.inputs[0].shape[1:])))
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        rows = NumpyCodec.decode_input(payload.inputs[0]).astype(np.float32, copy=False)
        outputs = self._call(tf.constant(rows)).numpy()
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("output", outputs)])
