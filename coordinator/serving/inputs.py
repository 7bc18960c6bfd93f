"""Inputs of a request: whether a model takes them, and how large they are. Pure."""

from __future__ import annotations

from msgspec.structs import replace

from potluck.errors import InvalidRequest, TooLarge
from potluck.wire.addresses import check_holders
from potluck.wire.specs import matched
from potluck.wire.tensors import plain
from potluck.wire.values import INLINE_LIMIT_BYTES, BlobRef, Signature, Tensor, TensorSpec

INPUT_LIMIT_BYTES = INLINE_LIMIT_BYTES - 16 * 1024
"""Limit of the inputs of one request, so that they fit into a message with the rest of it."""
ROWS_COUNTED = 1024
"""A request counts as at most this many rows. The shape that it gives for a blob is checked only once the blob is fetched."""


def batched(inputs: tuple[Tensor, ...], signature: Signature | None) -> tuple[Tensor, ...]:
    """Add the missing batch axis to all tensors of a single item."""
    if signature is None or len(signature.inputs) != len(inputs):
        return inputs
    alone = signature.inputs[0] if len(inputs) == 1 else None  # the name of a single input may be left out
    if alone is not None and len(inputs[0].shape) == len(alone.shape):  # the usual case
        return inputs
    specs = {spec.name: spec for spec in signature.inputs}
    for tensor in inputs:
        spec = alone or specs.get(tensor.name)
        # If an item is one text, a list of texts is a batch.
        if spec is None or len(tensor.shape) != len(spec.shape) - 1 - _is_one_text(spec):
            return inputs
    return tuple([replace(tensor, shape=(1, *tensor.shape)) for tensor in inputs])


def as_sent(inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], int]:
    """The inputs as they are sent to a replica, and their largest size in a message. Raises InvalidRequest, TooLarge."""
    if not inputs:
        raise InvalidRequest("a request needs at least one input tensor")
    for tensor in inputs:
        if isinstance(tensor.data, BlobRef):
            check_holders(tensor.data.holders, f"input {tensor.name[:80]!r}")
    # Lists become bytes here. An error then fails only its own request, and the size does not grow later.
    inputs = tuple([plain(tensor) if isinstance(tensor.data, list) else tensor for tensor in inputs])
    size = sum([size_bytes(tensor) for tensor in inputs])
    if size > INPUT_LIMIT_BYTES:
        raise TooLarge(
            f"the inputs are {size} bytes, and {INPUT_LIMIT_BYTES} go into a message: send fewer rows at once, or a blob"
        )
    return inputs, size


def taken(inputs: tuple[Tensor, ...], signature: Signature | None) -> bool:
    """Whether the model is known to take these inputs."""
    if signature is None:
        return False
    try:
        matched(inputs, signature.inputs)
    except InvalidRequest:
        return False
    return True


def size_bytes(tensor: Tensor) -> int:
    """The largest size of a tensor in a message. If a batch were too large, all its requests would be lost."""
    data = tensor.data
    rest = 64 + len(tensor.name.encode()) + len(tensor.datatype.encode()) + 9 * len(tensor.shape)
    if isinstance(data, bytes):
        return len(data) + rest
    if isinstance(data, list):
        return sum([5 + len(text if isinstance(text, bytes) else text.encode()) for text in data]) + rest
    return rest + sum([5 + len(holder.encode()) for holder in data.holders]) + 120


def rows_of(tensor: Tensor) -> int:
    """How many rows a tensor counts as, whatever its shape says: the waits of other requests depend on this."""
    data = tensor.data
    most = len(data) if isinstance(data, bytes | list) else data.size
    return min(tensor.shape[0], most, ROWS_COUNTED) or 1 if tensor.shape else 1


def _is_one_text(spec: TensorSpec) -> bool:
    return spec.datatype == "BYTES" and tuple(spec.shape[1:]) == (1,)
