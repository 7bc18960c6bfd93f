"""Which errors mean that memory ran out, and whose memory."""

from __future__ import annotations

import pytest

from node.engine.memory import shortage
from potluck.errors import OutOfMemory


class ResourceExhaustedError(Exception):
    """An error with the name of TensorFlow's."""


class InternalError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "whose"),
    [
        (MemoryError(), "this node has not enough memory for the model and its data (it was refused)"),
        (MemoryError("Unable to allocate 9 TiB for an array"), "this node has not enough memory"),
        (ResourceExhaustedError("OOM when allocating tensor on /device:CPU:0 by allocator cpu"), "this node has not"),
        (ResourceExhaustedError("OOM when allocating tensor on /device:GPU:0 by allocator GPU_0_bfc"), "this node's GPU"),
        (InternalError("Failed copying input tensor to device:GPU:0: Dst tensor is not initialized."), "this node's GPU"),
        (InternalError("CUDNN_STATUS_ALLOC_FAILED in cudnn_frontend"), "this node's GPU"),
    ],
)  # fmt: skip
def test_what_means_that_memory_ran_out(error: Exception, whose: str) -> None:
    found = shortage(error)
    assert isinstance(found, OutOfMemory)
    assert found.message.startswith(whose)
    assert "batch_size" in found.message
    assert shortage(found) is found


def test_what_does_not() -> None:
    assert shortage(ValueError("shapes (3,) and (4,) do not fit")) is None
    assert shortage(InternalError("GPU sync failed")) is None
