"""Items of data shards as the tensors that a model takes: files decoded in tf.data, arrays by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from node.engine import keras_models, pixels, shards
from node.engine.decoders import Decoder, ImageDecoder, decoder_for, item_bytes, undecodable
from node.engine.shards import Array, ShardPart
from potluck.data.folders import Unusable
from potluck.data.items import are_pixels
from potluck.errors import InvalidRequest
from potluck.wire.specs import shown
from potluck.wire.values import DataFormat, ImageOptions
from potluck.wording import counted

ROWS_AT_ONCE = 256
GROUP_BYTES = 32 * 2**20
"""Size of the files that are in memory at once, besides the decoded ones."""


@dataclass(frozen=True)
class Source:
    """How the items of one data format become inputs of one model."""

    model: Any
    data: DataFormat
    decoder: Decoder | None
    """Makes files into tensors; None: arrays need no decoder."""
    pixel_scale: float = 1.0
    """The factor for pixels in arrays; 0: not given."""

    @property
    def image(self) -> ImageOptions | None:
        """How images become the model's input; None for other data."""
        return self.decoder.options if isinstance(self.decoder, ImageDecoder) else None

    def decoded_bytes(self, parts: Sequence[ShardPart]) -> int:
        """Memory of all items that have to be decoded."""
        if self.decoder is None:
            return 0
        each = item_bytes(self.decoder)
        return sum(each * part.count if each else shards.files_bytes(part) for part in parts)

    def targets(self, parts: Sequence[ShardPart]) -> dict[str, Array]:
        """The targets by name, with class numbers as `data` counts classes; empty unless each item has a target.

        Raises InvalidData.
        """
        places = np.array(self.data.places, np.int64)
        found = self._stored_targets(parts)
        return {name: places[target] for name, target in found.items()} if len(places) else found

    def _stored_targets(self, parts: Sequence[ShardPart]) -> dict[str, Array]:
        if self.decoder is None:
            names = self.data.targets or ((self.data.target,) if self.data.target else ())
            return shards.load_arrays(parts, names)
        classes = np.concatenate([shards.item_classes(part) for part in parts]) if parts else np.zeros(0, np.int64)
        return {} if len(classes) and classes.min() < 0 else {"class": classes}

    def weights(self, parts: Sequence[ShardPart]) -> Array | None:
        """Weights of the items in the loss; None: the data has none. Raises InvalidData."""
        return shards.load_arrays(parts, [self.data.weight])[self.data.weight] if self.data.weight else None

    def batches(self, parts: Sequence[ShardPart], batch_size: int) -> Iterator[list[Any]]:
        """Tensors in the order of the model's inputs, `batch_size` items at a time (the last may be fewer). Raises InvalidData."""
        if self.decoder is not None:
            for encoded in _groups(parts):
                yield from ([items] for items in self._decoded(self.decoder, encoded, batch_size))
            return
        arrays = self._arrays(parts)
        for start in range(0, len(arrays[0]), batch_size):
            yield [tf.convert_to_tensor(array[start : start + batch_size]) for array in arrays]

    def load(self, parts: Sequence[ShardPart], known: dict[ShardPart, Array] | None = None) -> list[Any]:
        """All items as tensors in the host's memory, in the order of the model's inputs. Raises InvalidData, InvalidRequest.

        `known`: decoded items of earlier parts, which need not be decoded again. They are replaced by those of `parts`.
        """
        if self.decoder is None:
            return [keras_models.held(array) for array in self._arrays(parts)]
        shape = (sum(part.count for part in parts), *self.decoder.shape)
        dtype = self.decoder.dtype.as_numpy_dtype
        items = np.empty(shape, dtype) if self.decoder.dtype == tf.string else shards.aligned(shape, dtype)
        position = 0
        found: dict[ShardPart, Array] = {}
        for part in parts:
            mine = found[part] = items[position : position + part.count]
            if known is not None and part in known:
                mine[:] = known[part]
            else:
                self._fill(self.decoder, mine, part)
            position += part.count
        if known is not None:
            known.clear()
            known.update(found)
        return [keras_models.held(items)]

    def _arrays(self, parts: Sequence[ShardPart]) -> list[Array]:
        return fit(self.model, shards.load_arrays(parts, self.data.inputs), self.pixel_scale)

    def _fill(self, decoder: Decoder, rows: Array, part: ShardPart) -> None:
        """Decode all items of a part into these rows."""
        done = 0
        for encoded in _groups([part]):
            if isinstance(decoder, ImageDecoder):
                _images(decoder, rows[done : done + len(encoded)], encoded)
                done += len(encoded)
                continue
            for batch in self._decoded(decoder, encoded, ROWS_AT_ONCE):
                rows[done : done + len(batch)] = batch.numpy()
                done += len(batch)

    def _decoded(self, decoder: Decoder, encoded: list[bytes], batch_size: int) -> Iterator[Any]:
        if isinstance(decoder, ImageDecoder):
            yield from _batches_of_images(decoder, encoded, batch_size)
            return
        dataset = tf.data.Dataset.from_tensor_slices(tf.constant(encoded))
        dataset = dataset.map(decoder.decode, tf.data.AUTOTUNE, deterministic=True).batch(batch_size).prefetch(2)
        done = 0
        try:
            for batch in dataset:
                yield batch
                done += len(batch)
        except tf.errors.InvalidArgumentError as error:
            raise undecodable(error, f"among {len(encoded) - done} after {done}") from error


def _batches_of_images(decoder: ImageDecoder, encoded: list[bytes], batch_size: int) -> Iterator[Any]:
    """Each batch is decoded while the one before it is in use."""

    def batch(start: int) -> Array:
        files = encoded[start : start + batch_size]
        rows = shards.aligned((len(files), *decoder.shape), decoder.dtype.as_numpy_dtype)
        _images(decoder, rows, files, start)
        return rows

    starts = range(0, len(encoded), batch_size)
    with ThreadPoolExecutor(1, "next batch") as ahead:
        coming = ahead.submit(batch, 0)
        for start in starts:
            rows = coming.result()
            if start + batch_size < len(encoded):
                coming = ahead.submit(batch, start + batch_size)
            yield keras_models.held(rows)


def _images(decoder: ImageDecoder, rows: Array, files: Sequence[bytes], before: int = 0) -> None:
    """Decode files into rows, on all processors of the engine. A graph would take twice as long on one processor.

    `before`: how many files of the same group were decoded before. Raises InvalidData.
    """
    threads = max(1, tf.config.threading.get_intra_op_parallelism_threads())
    each = max(1, -(-len(files) // threads))
    starts = range(0, len(files), each)

    def fill(start: int) -> None:
        decoder.fill(rows[start : start + each], files[start : start + each])

    try:
        if threads == 1:
            fill(0)
            return
        with ThreadPoolExecutor(threads, "decoding") as pool:
            for done in [pool.submit(fill, start) for start in starts]:
                done.result()
    except Unusable as error:
        raise undecodable(error, f"among {len(files)} after {before}") from error


def source_for(model: Any, data: DataFormat, image: ImageOptions | None) -> Source:
    """Raises InvalidModel and InvalidRequest if data and model do not fit."""
    decoder = decoder_for(model, data, image)
    if decoder is not None or image is None:
        return Source(model, data, decoder)
    return Source(model, data, None, pixels.expected(model) if image.scale is None else image.scale)


def fit(model: Any, inputs: dict[str, Array], pixel_scale: float = 1.0) -> list[Array]:
    """The arrays in the order of the model's inputs, in their dtypes. Raises InvalidRequest naming both shapes.

    Pixels are multiplied by `pixel_scale`, as in a request, and refused if that is 0.
    """
    specs = keras_models.signature(model).inputs
    wanted = [spec.name for spec in specs]
    if len(inputs) != len(wanted):
        raise InvalidRequest(
            f"the model has {counted(len(wanted), 'input')} ({', '.join(wanted)}), the data {len(inputs)} ({', '.join(inputs)})"
        )
    if len(wanted) > 1 and set(wanted) != set(inputs):
        raise InvalidRequest(
            f"the model's inputs are named {', '.join(wanted)}, the data's {', '.join(inputs)}: name the arrays as the inputs"
        )
    ordered = [inputs[name] for name in wanted] if len(wanted) > 1 else list(inputs.values())
    found: list[Array] = []
    for spec, tensor, array in zip(specs, model.inputs, ordered, strict=True):
        given = array.shape[1:]
        if len(spec.shape) == 2 and spec.shape[1] == 1 and not given:
            array, given = array[:, None], (1,)
        if len(spec.shape) != array.ndim or any(w >= 0 and w != h for w, h in zip(spec.shape[1:], given, strict=True)):
            raise InvalidRequest(
                f"the model's input '{spec.name}' has shape {shown(spec.shape[1:])}, but the data has {shown(given)} per item"
            )
        if spec.datatype == "BYTES":
            raise InvalidRequest(
                f"the model's input '{spec.name}' takes text, but the data has numbers: give a folder of .txt files"
            )
        if pixel_scale != 1.0 and are_pixels(array, tf.as_dtype(tensor.dtype).as_numpy_dtype):
            array = _scaled(array, pixel_scale, spec.name)
        found.append(array.astype(tensor.dtype, copy=False) if array.dtype.kind in "fiub" else array)
    return found


def _scaled(array: Array, pixel_scale: float, name: str) -> Array:
    if not pixel_scale:
        raise InvalidRequest(
            f"the data has pixels of 8 bits for the model's input '{name}', and nothing says whether the model takes them as 0 to 255 "
            "or as 0 to 1: give floats, as in its training, or register it with image options that name the scale "
            "(ImageOptions(..., scale=...), --image HxW:SCALE)"
        )
    found: Array = array * np.float32(pixel_scale)
    return found


def _groups(parts: Sequence[ShardPart]) -> Iterator[list[bytes]]:
    group: list[bytes] = []
    size = 0
    for part in parts:
        for data in shards.item_files(part):
            group.append(data)
            size += len(data)
            if size >= GROUP_BYTES:
                yield group
                group, size = [], 0
    if group:
        yield group
