"""Training updates: differences of weights, quantised by blocks; and the weights that they lead to.

An update of a large tensor travels as one scale per BLOCK values (the largest of them by size), and 8 or 4 bits per value,
symmetric and rounded to nearest. This is blockwise quantisation (Dettmers et al., "8-bit Optimizers via Block-wise
Quantization", 2022), as DiLoCo's followers use it for outer gradients. Small tensors (biases, normalisation) travel unquantised.

State that is not trained (moving statistics, counters) may only have certain values. A quantised difference, or momentum, could give
it others. So it travels as its new values, exactly. Weights that have not changed (frozen layers) do not travel at all.

A file of updates is safetensors. The difference of the weight `w00000` is stored as `w00000` (unquantised), or as `w00000.int8` or
`w00000.int4` (two values per byte, the first in the low bits, each plus 8) together with `w00000.scale`. New values are stored as
`s00001.mean` where the mean over several nodes makes sense, and as `s00001.value` where one node's values hold for all (also under
the plain name, for a weight that is not floating-point).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from potluck.errors import Diverged, InvalidModel
from potluck.weights.files import Array, Reader, Spec, Writer
from potluck.wire.values import Compression

Kind = Literal["none", "int8", "int4"]
Role = Literal["trained", "mean", "value"]
"""The role of a weight: "trained"; or state that becomes the "mean" of the nodes' values, or one node's "value"."""
Travel = Literal["none", "int8", "int4", "mean", "value"]
"""How a weight is stored in a file: its difference, quantised or not, or its new values."""

BLOCK = 256
PIECE = 512 * BLOCK
"""How many values are worked on at once: memory does not depend on the size of the model."""
SMALL = 4096
"""A tensor with fewer values is not quantised: the error is not worth the saving."""
ERROR_LIMIT = 0.3
"""`auto` uses 8 bits where 4 bits have a larger relative error (RMS of the error over RMS of the values)."""
SAMPLED_BLOCKS = 512
_DIVERGED = (
    "training diverged: the update holds values that are not finite; lower the learning rate, "
    "or look for values in the data that are not finite"
)
_LEVELS = {"int8": 127, "int4": 7}
_BYTES = np.arange(256, dtype=np.uint8)
_PAIRS = np.stack([_BYTES & 15, _BYTES >> 4], axis=1).astype(np.int8) - np.int8(8)
"""The two 4-bit values of each byte."""
_PAIRS_FLOAT = _PAIRS.astype(np.float32).view(np.uint64).reshape(-1)
"""Both values as one 64-bit number, so that one look-up gives both."""
_SQUARES = {
    "int8": (_BYTES.view(np.int8).astype(np.int16) ** 2).astype(np.uint16),
    "int4": np.square(_PAIRS).sum(axis=1).astype(np.uint16),
}
"""For each byte: the sum of the squares of its values."""


def quantise(values: Array, kind: Literal["int8", "int4"]) -> tuple[Array, Array]:
    """(codes, scales) of float values: codes int8, or uint8 with two values each; scales float32, one per block.

    Raises Diverged where a value is not finite.
    """
    count = len(values)
    padded = values.astype(np.float32, copy=False)
    if count % BLOCK:
        padded = np.concatenate([padded, np.zeros(-count % BLOCK, np.float32)])
    blocks = padded.reshape(-1, BLOCK)
    scales = np.abs(blocks).max(axis=1) / np.float32(_LEVELS[kind])
    if not np.isfinite(scales).all():
        raise Diverged(_DIVERGED)
    # Values so small that their scale has no inverse become 0.
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > np.finfo(np.float32).tiny)
    levels = blocks * inverse[:, None]
    np.rint(levels, out=levels)
    if kind == "int8":
        return levels.astype(np.int8).reshape(-1)[:count], scales
    levels += np.float32(8)
    pairs = levels.astype(np.uint8).view("<u2").reshape(-1)[: -(-count // 2)]
    return (pairs | pairs >> np.uint16(4)).astype(np.uint8), scales


def dequantise(codes: Array, scales: Array, kind: Literal["int8", "int4"], count: int) -> Array:
    """The `count` float32 values of the codes: the same bits on every machine."""
    values = np.empty(len(scales) * BLOCK, np.float32)
    if kind == "int8":
        values[:count] = codes
    else:
        np.take(_PAIRS_FLOAT, codes, out=values.view(np.uint64)[: len(codes)], mode="wrap")
    values[count:] = 0
    blocks = values.reshape(-1, BLOCK)
    np.multiply(blocks, scales[:, None], out=blocks)
    return values[:count]


def error(values: Array, kind: Literal["int8", "int4"]) -> float:
    """Relative error of quantising: RMS of the error over RMS of the values."""
    lost = dequantise(*quantise(values, kind), kind, len(values)) - values
    norm = float(np.linalg.norm(values))
    return float(np.linalg.norm(lost)) / norm if norm else 0.0


def choose(spec: Spec, compression: Compression, read: Callable[[int, int], Array]) -> Kind:
    """How a tensor's difference travels: by its size, and the error measured on some blocks. `read` gives values by position."""
    if compression == "none" or spec.dtype.kind != "f" or spec.count < SMALL:
        return "none"
    if compression != "auto":
        return compression
    blocks = spec.count // BLOCK
    places = np.linspace(0, blocks - 1, min(blocks, SAMPLED_BLOCKS // 32)).astype(int) * BLOCK
    sample = np.concatenate([read(place, min(place + 32 * BLOCK, spec.count)) for place in places.tolist()])
    return "int4" if error(sample, "int4") <= ERROR_LIMIT else "int8"


class UpdateWriter:
    """Writes a file of updates for the weights in `plan`; a context manager. Differences (or values) follow in order, in whole blocks."""

    def __init__(self, path: Path, plan: Sequence[tuple[Spec, Travel]]) -> None:
        specs: list[Spec] = []
        for spec, kind in plan:
            if kind not in _LEVELS:
                specs.append(spec if kind == "none" else Spec(f"{spec.name}.{kind}", spec.dtype, spec.shape))
                continue
            codes = spec.count if kind == "int8" else -(-spec.count // 2)
            specs.append(Spec(f"{spec.name}.{kind}", np.dtype(np.int8 if kind == "int8" else np.uint8), (codes,)))
            specs.append(Spec(f"{spec.name}.scale", np.dtype(np.float32), (-(-spec.count // BLOCK),)))
        self._writer = Writer(path, specs)

    def __enter__(self) -> UpdateWriter:
        self._writer.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._writer.__exit__(*error)

    def write(self, kind: Travel, pieces: Iterable[Array]) -> None:
        """Write one weight's difference or values."""
        for _ in self._written(kind, pieces):
            pass

    def write_and_read(self, kind: Travel, pieces: Iterable[Array]) -> Iterator[Array]:
        """Write one weight's difference or values; yields each piece as a reader will get it. Must be used to its end."""
        for piece, quantised in self._written(kind, pieces):
            yield dequantise(*quantised, kind, len(piece)) if kind == "int8" or kind == "int4" else piece

    def _written(self, kind: Travel, pieces: Iterable[Array]) -> Iterator[tuple[Array, tuple[Array, Array]]]:
        scales: list[Array] = []
        for piece in pieces:
            codes, scale = quantise(piece, kind) if kind == "int8" or kind == "int4" else (piece, piece[:0])
            self._writer.write(codes)
            scales.append(scale)
            yield piece, (codes, scale)
        for scale in scales:
            self._writer.write(scale)


class UpdateReader:
    """Reads a file of updates for weights; a context manager. Raises InvalidModel for another file."""

    def __init__(self, path: Path, weights: Reader) -> None:
        """`weights`: the weights before the update."""
        self._file = Reader(path)
        self._weights = weights
        self.travels: dict[str, Travel] = {}
        """How each weight travels; a weight that is not here stays as it is."""

    def __enter__(self) -> UpdateReader:
        self._file.__enter__()
        try:
            self.travels = {
                name: travel for name, spec in self._weights.specs.items() if (travel := self._travel(spec)) is not None
            }
            if len(self._file.specs) != len(self.travels) + sum(kind in _LEVELS for kind in self.travels.values()):
                raise InvalidModel(f"the update {self._file.path.name[:12]} is for other weights: it does not fit")
        except InvalidModel:
            self._file.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def role(self, name: str) -> Role | None:
        """The role of a weight: "trained" where its difference travels; None where it stays as it is."""
        travel = self.travels.get(name)
        return travel if travel is None or travel == "mean" or travel == "value" else "trained"

    def read(self, name: str, start: int, stop: int) -> Array:
        """A piece of the flattened weight, `start` at a block's beginning: differences where it is trained, else its values after the update."""
        travel = self.travels.get(name)
        stop = min(stop, self._weights.specs[name].count)
        if travel is None:
            return self._weights.read(name, start, stop)
        if travel == "int8" or travel == "int4":
            return dequantise(*self._quantised(name, travel, start, stop), travel, stop - start)
        key = f"{name}.{travel}" if f"{name}.{travel}" in self._file.specs else name
        return self._file.read(key, start, stop)

    def square(self, name: str, start: int, stop: int) -> float:
        """The sum of the squares of these differences, from their codes; 0 for state. Raises Diverged where one is not finite."""
        travel = self.travels.get(name)
        if travel is None or travel == "value":
            return 0.0
        if travel == "none":
            return square(self.read(name, start, stop))
        if travel == "mean":
            if not np.isfinite(self.read(name, start, stop)).all():
                raise Diverged(_DIVERGED)
            return 0.0
        codes, scales = self._quantised(name, travel, start, min(stop, self._weights.specs[name].count))
        squares = np.zeros((len(scales), BLOCK if travel == "int8" else BLOCK // 2), np.uint16)
        np.take(_SQUARES[travel], codes.view(np.uint8), out=squares.reshape(-1)[: len(codes)], mode="wrap")
        return square(np.sqrt(squares.sum(axis=1, dtype=np.float64)) * scales)

    def _quantised(self, name: str, kind: Kind, start: int, stop: int) -> tuple[Array, Array]:
        each = 1 if kind == "int8" else 2
        codes = self._file.read(f"{name}.{kind}", start // each, -(-stop // each))
        return codes, self._file.read(f"{name}.scale", start // BLOCK, -(-stop // BLOCK))

    def _travel(self, spec: Spec) -> Travel | None:
        found = self._file.specs
        plain: dict[str, Travel] = {spec.name: "none" if spec.dtype.kind == "f" else "value"}
        for key, travel in (plain | {f"{spec.name}.mean": "mean", f"{spec.name}.value": "value"}).items():
            if (entry := found.get(key)) is not None:
                if (entry.dtype, entry.shape) == (spec.dtype, spec.shape):
                    return travel
                raise self._unfit(spec)
        if (scale := found.get(f"{spec.name}.scale")) is None:
            return None
        for kind, dtype, each in (("int8", np.int8, 1), ("int4", np.uint8, 2)):
            codes = found.get(f"{spec.name}.{kind}")
            if codes is None or (codes.dtype, codes.count) != (np.dtype(dtype), -(-spec.count // each)):
                continue
            if (scale.dtype, scale.count) == (np.dtype(np.float32), -(-spec.count // BLOCK)):
                return kind  # type: ignore[return-value]
        raise self._unfit(spec)

    def _unfit(self, spec: Spec) -> InvalidModel:
        return InvalidModel(f"the update {self._file.path.name[:12]} does not fit weight {spec.name}")


def spans(spec: Spec) -> Iterator[tuple[int, int]]:
    """(start, stop) of the pieces of a flattened weight."""
    for start in range(0, spec.count, PIECE):
        yield start, min(start + PIECE, spec.count)


def roles_by_name(names: Iterable[str]) -> list[Role]:
    """Roles by the names in a file: w00000 is trained, s00001 becomes the mean."""
    return ["trained" if name.startswith("w") else "mean" for name in names]


def write_update(
    path: Path, before: Path, after: Sequence[Array], compression: Compression, roles: Sequence[Role] | None = None
) -> None:
    """Write the update from the weights in the file `before` to the weights `after`, which are in memory.

    `roles` are in the order of `after`; None: by the names in the file. Raises InvalidModel where the weights do not fit, Diverged
    where they are not finite.
    """
    with Reader(before) as base:
        specs = sorted(base.specs.values(), key=lambda spec: spec.name[1:])  # whatever order they were written in
        if [spec.shape for spec in specs] != [array.shape for array in after]:
            raise InvalidModel("the weights before and after the round do not fit")
        flat = {
            spec.name: array.reshape(-1).astype(spec.dtype, copy=False)
            for spec, array in zip(specs, after, strict=True)
        }
        given = dict(zip(flat, roles_by_name(flat) if roles is None else roles, strict=True))

        def difference(name: str, start: int, stop: int) -> Array:
            return flat[name][start:stop] - base.read(name, start, stop)

        def changed(spec: Spec) -> bool:
            values = flat[spec.name]
            return any(values[a:b].tobytes() != base.read(spec.name, a, b).tobytes() for a, b in spans(spec))

        plan: list[tuple[Spec, Travel]] = []
        for spec in base.specs.values():
            role = given[spec.name] if spec.dtype.kind == "f" else "value"
            if role == "trained":
                plan.append((spec, choose(spec, compression, partial(difference, spec.name))))
            elif changed(spec):
                plan.append((spec, role))
        with UpdateWriter(path, plan) as writer:
            for spec, travel in plan:
                values = travel == "mean" or travel == "value"
                pieces = (flat[spec.name][a:b] if values else difference(spec.name, a, b) for a, b in spans(spec))
                writer.write(travel, pieces if travel == "value" else map(_finite, pieces))


def _finite(piece: Array) -> Array:
    """`piece` itself. Raises Diverged where a value is not finite."""
    if piece.dtype.kind == "f" and not np.isfinite(piece).all():
        raise Diverged(_DIVERGED)
    return piece


def norm(path: Path, weights: Path) -> float:
    """The L2 norm of an update for these weights, over all trained weights. Raises InvalidModel, Diverged."""
    with Reader(weights) as base, UpdateReader(path, base) as update:
        return math.sqrt(
            math.fsum(update.square(name, *span) for name, spec in base.specs.items() for span in spans(spec))
        )


def square(piece: Array) -> float:
    """The sum of the squares of differences. Raises Diverged where it is not finite."""
    if piece.dtype.kind != "f":
        return 0.0
    flat = piece.astype(np.float64, copy=False) if piece.dtype.itemsize < 4 else piece
    with np.errstate(over="ignore"):
        found = float(np.dot(flat, flat))
    if not math.isfinite(found):
        raise Diverged(_DIVERGED)
    return found


def apply_update(before: Path, update: Path, target: Path) -> None:
    """Write the weights after an update: the same bytes on every machine. Raises InvalidModel."""
    with (
        Reader(before) as base,
        UpdateReader(update, base) as step,
        Writer(target, list(base.specs.values())) as writer,
    ):
        for name, spec in base.specs.items():
            for start, stop in spans(spec):
                found = step.read(name, start, stop)
                writer.write(base.read(name, start, stop) + found if step.role(name) == "trained" else found)
