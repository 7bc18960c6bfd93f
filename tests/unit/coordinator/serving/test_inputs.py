"""Inputs of a request: the batch axis, what a model takes, and what they weigh."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.serving.inputs import (
    INPUT_LIMIT_BYTES,
    ROWS_COUNTED,
    as_sent,
    batched,
    rows_of,
    size_bytes,
    taken,
)
from potluck.errors import InvalidRequest, TooLarge
from potluck.wire import codec
from potluck.wire.questions import Infer
from potluck.wire.tensors import from_numpy
from potluck.wire.values import BlobRef, Signature, Tensor, TensorSpec

PAIRS = Signature(inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 2)),), outputs=())
PAIR = from_numpy("x", np.float32([1, 2]))
BATCH = from_numpy("x", np.float32([[1, 2], [3, 4]]))


def test_a_single_item_gets_its_axis_and_a_batch_is_left_alone() -> None:
    assert [tensor.shape for tensor in batched((PAIR,), PAIRS)] == [(1, 2)]
    assert batched((BATCH,), PAIRS) == (BATCH,)
    assert batched((PAIR,), None) == (PAIR,)
    assert batched((PAIR, PAIR), PAIRS) == (PAIR, PAIR)


def test_what_a_model_takes() -> None:
    assert [taken((BATCH,), PAIRS), taken((PAIR,), PAIRS), taken((BATCH,), None)] == [True, False, False]


def test_lists_go_as_bytes_and_what_nobody_can_fetch_goes_nowhere() -> None:
    listed = Tensor(name="x", datatype="FP32", shape=(2,), data=[1.0, 2.0])
    assert as_sent((listed, PAIR))[0] == (PAIR, PAIR)
    with pytest.raises(InvalidRequest, match="at least one"):
        as_sent(())
    held = BlobRef(sha256="0" * 64, size=8, holders=("http://a/path",))
    with pytest.raises(InvalidRequest, match="holder"):
        as_sent((Tensor(name="x", datatype="FP32", shape=(2,), data=held),))


@pytest.mark.parametrize("datatype", ["FP32", "BYTES"])
def test_a_size_is_never_less_than_what_the_message_takes(datatype: str) -> None:
    texts = Tensor(name="ä" * 50, datatype="BYTES", shape=(3,), data=["", "ü", "text"])
    tensor = texts if datatype == "BYTES" else BATCH
    grown = len(codec.encode(Infer(inputs=(tensor,)))) - len(codec.encode(Infer(inputs=())))
    assert grown <= size_bytes(tensor) == as_sent((tensor,))[1]
    with pytest.raises(TooLarge, match="fewer rows"):
        as_sent((from_numpy("x", np.zeros(INPUT_LIMIT_BYTES, np.uint8)),))


def test_rows_are_never_more_than_there_can_be() -> None:
    claimed = Tensor(name="x", datatype="FP32", shape=(10**9, 2), data=BlobRef(sha256="0" * 64, size=8))
    assert [rows_of(tensor) for tensor in (PAIR, BATCH, claimed)] == [2, 2, 8]
    many = Tensor(name="x", datatype="UINT8", shape=(10**9,), data=BlobRef(sha256="0" * 64, size=10**9))
    assert rows_of(many) == ROWS_COUNTED
    assert rows_of(Tensor(name="x", datatype="FP32", shape=(), data=b"1234")) == 1
