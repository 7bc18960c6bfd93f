"""Arrays become tensors without a copy where TensorFlow can take their memory, and with one where it cannot."""

from __future__ import annotations

import numpy as np
import pytest

from node.engine.keras_models import held
from node.engine.shards import ALIGNMENT, aligned

pytestmark = pytest.mark.tensorflow


def test_aligned_memory_is_shared() -> None:
    array = aligned((30, 7), np.float32)
    assert array.ctypes.data % ALIGNMENT == 0
    array[:] = 1
    tensor = held(array)
    array[2, 3] = 5  # only to see whether it is the same memory
    assert tensor.numpy()[2, 3] == 5
    del array
    assert tensor.numpy().sum() == 30 * 7 + 4


@pytest.mark.parametrize("kind", ["read-only", "not aligned", "not contiguous", "empty", "bool", "text"])
def test_other_memory_is_copied(kind: str) -> None:
    array = aligned((16, 16), np.float32)
    array[:] = np.arange(256).reshape(16, 16)
    match kind:
        case "read-only":
            array.flags.writeable = False
        case "not aligned":
            array = array.reshape(-1)[1:]
        case "not contiguous":
            array = array.T
        case "empty":
            array = array[:0]
        case "bool":
            array = array > 7
        case _:
            array = np.array([b"a", "größer".encode()], object)
    np.testing.assert_array_equal(held(array).numpy(), array)
