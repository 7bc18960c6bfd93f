"""What several messages are made of: limits, kinds of names and numbers, and maps inside messages."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

INLINE_LIMIT_BYTES = 256 * 1024
"""Largest message on the bus; larger tensors and files travel as blobs."""
INPUT_BLOB_LIMIT_BYTES = 64 * 2**20
"""Largest blob that can be an input of an inference."""
SHARDS_LIMIT = 500
"""Most shards of a data set: a lease that names them all, with their holders, must fit into a message."""
NODE_DATA_LIMIT = 64
"""How many data sets a node may have: the coordinator lists no more, and all must fit into a message with the reasons of those missing."""
CLASS_NAMES_LIMIT_BYTES = 112 * 1024
"""Total size of a data set's class names: every lease and listing has them."""

Name = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z",
        extra_json_schema={
            "description": "letters, digits, '.', '_' and '-', beginning with a letter or digit, at most 128"
        },
    ),
]
"""A name that a user gives to a model or data set."""
Source = Annotated[str, Meta(max_length=256)]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Count = Annotated[int, Meta(ge=0, le=2**53)]
"""At most what JavaScript holds: sums of counts then fit into the 64 bits of msgpack."""
Positive = Annotated[int, Meta(ge=1, le=2**53)]
AXES_LIMIT = 64
"""How many axes a tensor may have: numpy has no more."""
Shape = Annotated[tuple[Count, ...], Meta(max_length=AXES_LIMIT)]
FreeShape = Annotated[tuple[Annotated[int, Meta(ge=-1, le=2**53)], ...], Meta(max_length=AXES_LIMIT)]
"""-1: an axis of any length."""
Seconds = Annotated[float, Meta(ge=0)]
UnixTime = Annotated[float, Meta(ge=0, le=1e11)]
"""0: unknown."""
Epoch = Annotated[int, Meta(ge=0, le=2**53)]
"""The epoch of a coordinator's journal: a higher one is newer."""
Percent = Annotated[int, Meta(ge=0, le=100)]
Objective = Annotated[float, Meta(ge=0, le=3600)]

Compression = Literal["auto", "none", "int8", "int4"]
Quantization = Literal["none", "int8"]
ModelFormat = Literal["keras", "h5", "savedmodel", "tflite"]
"""The format of a model's blob: a `.keras` or `.h5` file, a tar of a SavedModel folder, or a LiteRT `.tflite` file."""


class Part(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A map inside a message."""


class Message(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="type", tag=True):
    """The fields that every message may have. `expires` 0: never."""

    id: str = ""
    reply_to: str = ""
    expires: UnixTime = 0.0


class BlobRef(Part, frozen=True):
    """Bytes named by their SHA-256, and the base URLs of their holders (`GET <holder>/blobs/<sha256>`)."""

    sha256: Sha256
    size: Count
    holders: tuple[str, ...] = ()


class Tensor(Part, frozen=True):
    """A tensor, named as in the Open Inference Protocol. `data` is bytes (little-endian, C order), a (nested) list, or a blob."""

    name: str
    datatype: str
    shape: Shape
    data: bytes | list[Any] | BlobRef


class TensorSpec(Part, frozen=True):
    """One input or output of a model; -1 in `shape` is the batch or another free dimension."""

    name: str
    datatype: str
    shape: FreeShape


class Signature(Part, frozen=True):
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    pixel_scale: float = 0.0
    """The factor that the model's first layers expect for pixels of 0 to 255 (1: they scale pixels themselves); 0: they do not say."""


class ErrorInfo(Part, frozen=True):
    """An error on the wire; `code` is one of those in `potluck.errors`."""

    code: str
    message: str
    retryable: bool = False
    retry_after_seconds: float | None = None


class Gpu(Part, frozen=True):
    name: str
    memory_bytes: Count


class Capacity(Part, frozen=True):
    """What a node has, and its measured speed (`gflops`: float32 matrix product, 0 until measured)."""

    hostname: str
    system: str
    cores: Annotated[int, Meta(ge=1, le=1_000_000)]
    memory_bytes: Count
    gpus: tuple[Gpu, ...] = ()
    runtimes: dict[str, str] = {}
    gflops: Annotated[float, Meta(ge=0, le=1e9)] = 0.0


Side = Annotated[int, Meta(ge=1, le=4096)]
"""Height or width in pixels of an image for a model: with four channels of float32, an image has at most 256 MiB."""


class ImageOptions(Part, frozen=True):
    """How images become tensors: decoded to `channels`, resized bilinearly to height x width, multiplied by `scale`.

    `scale` None: as the model's own layers expect, 1 (pixels 0 to 255) or 1/255 (docs/data.md, "What the model sees").
    """

    height: Side
    width: Side
    channels: Literal[1, 3, 4] = 3
    scale: float | None = None


class DataShard(Part, frozen=True):
    """One content-addressed piece of a data set: `count` items, shuffled by class when it was packed."""

    blob: BlobRef
    count: Positive


class DataFormat(Part, frozen=True):
    """How to read the items in a data set's shards.

    `images`, `texts`, `audio`: a WebDataset tar with `<key>.<png|jpg|...>`, `<key>.txt` (UTF-8) or `<key>.wav` (16-bit PCM, at
    `rate` samples a second), and `<key>.cls` (class index as text).
    `arrays`: a safetensors file with one tensor per input name and, if there is a target, one named `target`.
    For a model with several outputs, there is one for each of `targets` instead: the names of the outputs, or
    `y_0`, `y_1`, ... for targets in order. `weight` names a tensor with the weight of each item in the loss.
    """

    kind: Literal["images", "arrays", "texts", "audio"]
    classes: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    target: str = ""
    targets: tuple[str, ...] = ()
    weight: str = ""
    places: tuple[Count, ...] = ()
    """Where these shards number classes differently: their class i is class `places[i]` of `classes`."""
    rate: Count = 0


class Dataset(Part, frozen=True):
    """A data set as the coordinator keeps it. Items are in the order of `shards`; `keys` names each item (a blob of JSON).

    `skipped` names items that could not be used; `remarks` are sentences about other data left out, or about likely mistakes.
    """

    name: Name
    format: DataFormat
    count: Count
    shards: tuple[DataShard, ...]
    class_counts: tuple[Count, ...] = ()
    skipped: tuple[str, ...] = ()
    keys: BlobRef | None = None
    remarks: tuple[str, ...] = ()


class NodeData(Part, frozen=True):
    """What a node tells of a data set that lives on it: everything except the items."""

    name: Name
    format: DataFormat
    count: Positive


class Privacy(Part, frozen=True):
    """How training on nodes' own data hides single examples, or whole nodes (differential privacy).

    `unit` `example`: the gradient of each example is clipped to the norm `l2_norm_clip`, and normal noise of `noise_multiplier` times
    that norm is added to their sum (DP-SGD, Abadi et al., 2016); `node`: the same happens to each node's update in each round
    (McMahan et al., 2018). `delta` is the delta of (epsilon, delta).
    """

    l2_norm_clip: Annotated[float, Meta(gt=0)]
    noise_multiplier: Annotated[float, Meta(ge=0)] = 0.0
    unit: Literal["example", "node"] = "example"
    delta: Annotated[float, Meta(gt=0, lt=1)] = 1e-5


class Step(Part, frozen=True):
    """Another way to get a round's weights, for a node that has the weights before the round: apply `update` to `base`.

    `update` is a file as in `potluck.weights.updates`; the result is exactly the file of the weights, bit for bit.
    """

    base: BlobRef
    update: BlobRef


class DataSlice(Part, frozen=True):
    """Items `start` to `stop` (exclusive) of one data shard."""

    blob: BlobRef
    start: Count
    stop: Count
