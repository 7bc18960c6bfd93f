"""The binary tensor extension of the Open Inference Protocol: tensors as bytes after the JSON of a request or an answer.

As in KServe and Triton: `Inference-Header-Content-Length` is the length of the JSON. The tensors follow in its order. The
parameter `binary_data_size` is the length of a tensor, little-endian in C order. An item of BYTES has its length as 4 bytes before it.
"""

from __future__ import annotations

from typing import Any

from potluck.errors import InvalidRequest
from potluck.wire.tensors import unpacked
from potluck.wording import counted

EXTENSION = "binary_tensor_data"
HEADER = "Inference-Header-Content-Length"
SIZE = "binary_data_size"


def split(body: bytes, header_length: str | None) -> tuple[bytes, bytes]:
    """(the JSON, the tensors after it); without the header, all is JSON. Raises InvalidRequest."""
    if header_length is None:
        return body, b""
    digits = header_length.isascii() and header_length.isdigit() and len(header_length) <= 12
    length = int(header_length) if digits else -1
    if not 0 <= length <= len(body):
        raise InvalidRequest(
            f"{HEADER} is {header_length[:20]!r}: expected a number up to {len(body)}, the body's length"
        )
    return body[:length], body[length:]


class TensorReader:
    """Returns the tensors after the JSON, in order. Raises InvalidRequest if a size is wrong."""

    def __init__(self, tail: bytes) -> None:
        self._tail = tail
        self._at = 0

    def take(self, name: str, datatype: str, size: Any) -> bytes | list[Any]:
        """The data of an input tensor, as in `Tensor`."""
        left = len(self._tail) - self._at
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= left:
            raise InvalidRequest(f"tensor '{name}': {SIZE} is {size!r:.40}, and {left} bytes are left after the JSON")
        data = self._tail[self._at : self._at + size]
        self._at += size
        return unpacked(name, datatype, data)

    def close(self) -> None:
        """Raises InvalidRequest if bytes are left."""
        if self._at != len(self._tail):
            raise InvalidRequest(
                f"{counted(len(self._tail) - self._at, 'byte')} after the JSON belong to no input ({SIZE})"
            )
