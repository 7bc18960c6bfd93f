"""Requests against signatures: what fits, and the error for what does not."""

from __future__ import annotations

import pytest

from potluck.errors import InvalidRequest
from potluck.wire.specs import matched
from potluck.wire.values import Tensor, TensorSpec

IMAGE = TensorSpec(name="image", datatype="FP32", shape=(-1, 32, 32, 3))
FREE = TensorSpec(name="tokens", datatype="INT32", shape=(-1, -1))
WORD = TensorSpec(name="word", datatype="BYTES", shape=(-1, 1))


def given(name: str, *shape: int, datatype: str = "FP32") -> Tensor:
    return Tensor(name=name, datatype=datatype, shape=shape, data=b"")


@pytest.mark.parametrize(
    ("request_", "specs"),
    [
        ([given("any name", 2, 32, 32, 3)], [IMAGE]),
        ([given("tokens", 2, 9), given("image", 2, 32, 32, 3)], [IMAGE, FREE]),
        ([given("word", 4, datatype="BYTES")], [WORD]),
        ([given("word", 4, 1, datatype="BYTES")], [WORD]),
    ],
)
def test_what_fits_comes_in_the_order_of_the_inputs(request_: list[Tensor], specs: list[TensorSpec]) -> None:
    assert {tensor.name for tensor in matched(request_, specs)} == {tensor.name for tensor in request_}
    if len(specs) > 1:
        assert [tensor.name for tensor in matched(request_, specs)] == [spec.name for spec in specs]


@pytest.mark.parametrize(
    ("request_", "specs", "said"),
    [
        ([given("x", 2, 7)], [IMAGE], r"takes FP32 of shape \(any, 32, 32, 3\).*the request has \(2, 7\)"),
        ([given("x", 32, 32, 3)], [IMAGE], r"the request has \(32, 32, 3\)"),
        ([given("x")], [IMAGE], r"the request has \(\)"),
        ([given("x", 0, 32, 32, 3)], [IMAGE], "at least one"),
        ([given("word", 4)], [WORD], r"of shape \(any, 1\)"),
        ([given("image", 2, 32, 32, 3), given("tokens", 3, 9)], [IMAGE, FREE], "the same number of rows"),
        ([given("image", 2, 32, 32, 3)], [IMAGE, FREE], r"2 inputs \(image, tokens\), the request 1"),
        ([given("image", 1, 32, 32, 3), given("mask", 1, 9)], [IMAGE, FREE], "the request's image, mask"),
    ],
)
def test_what_does_not_fit_is_told_with_both(request_: list[Tensor], specs: list[TensorSpec], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        matched(request_, specs)
