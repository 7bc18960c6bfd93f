"""Bodies of HTTP requests, as the gateway reads them: JSON of three protocols, tensors behind it, forms, files, compression."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from typing import Any

import msgspec

from coordinator.gateway import binary, forms, inferring, json_arrays, tensorflow_inputs
from coordinator.gateway import plain as plain_routes
from coordinator.gateway.bodies import _Inflate, decoded, plain
from coordinator.gateway.open_inference import IndexRequest
from fuzz import mutators
from fuzz.judging import Target, hold
from potluck.errors import InvalidData, InvalidRequest
from potluck.wire.questions import ModelInfo
from potluck.wire.tensors import packed, to_numpy
from potluck.wire.values import BlobRef, Signature, Tensor, TensorSpec

SPECS = {
    "x": TensorSpec(name="x", datatype="FP32", shape=(-1, 4)),
    "half": TensorSpec(name="half", datatype="FP16", shape=(-1, 2, -1)),
    "count": TensorSpec(name="count", datatype="INT64", shape=(-1,)),
    "small": TensorSpec(name="small", datatype="UINT8", shape=(-1, 2, 2)),
    "flag": TensorSpec(name="flag", datatype="BOOL", shape=(-1, 1)),
    "text": TensorSpec(name="text", datatype="BYTES", shape=(-1, 1)),
}
SIGNATURES = (
    *(Signature(inputs=(spec,), outputs=()) for spec in SPECS.values()),
    Signature(inputs=(SPECS["x"], SPECS["text"]), outputs=()),
)


def _whole(tensors: tuple[Tensor, ...]) -> None:
    for tensor in tensors:
        hold(to_numpy(tensor).shape == tensor.shape, "an array has the shape of its tensor")
        packed(tensor)
        msgspec.json.encode({"outputs": json_arrays.nested(tensor)})


def _signature(argument: bytes) -> Signature:
    return SIGNATURES[(argument[0] if argument else 0) % len(SIGNATURES)]


def open_inference(data: bytes) -> None:
    """A request of V2. First a line with the header for the length of the JSON (empty: not given), then the body."""
    header, _, body = data.partition(b"\n")
    text, tail = binary.split(body, header.decode(errors="surrogateescape") if header else None)
    asked = decoded(text, inferring._decode, inferring.InferRequest, "an inference request")
    inferring._Wanted(asked)
    inferring._timeout_seconds(asked.parameters)
    inferring._priority(asked.parameters)
    inputs = inferring._inputs(asked, tail)
    _whole(inputs)
    inferring.check("m", SIGNATURES[0], inputs)


def open_inferences() -> Iterator[bytes]:
    flat = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,4],"data":[1,2.5,3,4]}],"id":"7","outputs":[{"name":"y"}]}'
    yield b"\n" + flat
    yield b'\n{"inputs":[{"name":"t","datatype":"BYTES","shape":[2],"data":["a","b"]}],"parameters":{"timeout":5000,"priority":1}}'
    yield b'\n{"inputs":[{"name":"x","datatype":"INT64","shape":[1,2],"data":[[1,2]]}],"outputs":[{"name":"y","parameters":{"classification":2,"binary_data":true}}]}'
    head = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,2],"parameters":{"binary_data_size":8}},{"name":"t","datatype":"BYTES","shape":[1],"parameters":{"binary_data_size":5}}],"parameters":{"binary_data_output":true}}'
    yield b"%d\n" % len(head) + head + bytes(8) + b"\1\0\0\0a"


def index(data: bytes) -> None:
    decoded(data, msgspec.json.Decoder(IndexRequest).decode, IndexRequest, "an index request")


def _json(body: bytes) -> Any:
    try:
        return plain(body)
    except (ValueError, RecursionError) as error:  # as the routes do
        raise InvalidRequest(f"JSON Parse error: Invalid value: {error}") from error


def tensorflow(data: bytes) -> None:
    """A request of TensorFlow Serving. The first line chooses the signature."""
    which, _, body = data.partition(b"\n")
    asked, signature = _json(body), _signature(which)
    if not isinstance(asked, dict):
        raise InvalidRequest("not an object")
    if "instances" in asked:
        _whole(tensorflow_inputs.from_rows(signature, asked["instances"]))
    if "inputs" in asked:
        _whole(tensorflow_inputs.from_columns(signature, asked["inputs"]))
    if "examples" in asked:
        _whole(tensorflow_inputs.from_examples(signature, asked, "classify"))


def plain_arrays(data: bytes) -> None:
    """A request of the plain routes. The first line chooses the signature."""
    which, _, body = data.partition(b"\n")
    _whole(plain_routes._arrays("m", _signature(which), _json(body)))


_VALUES = (
    *(b"[[1,2.5,-3,4e5]]", b"[[[1,2,3],[4,5,6]]]", b"[1,2,3]", b"[[[1,2],[3,255]]]", b"[[true],[false]]"),
    *(b'[["a"],["b"]]', b'{"x":[[1,2,3,4]],"text":[["a"]]}'),
)


def tensorflows() -> Iterator[bytes]:
    for at, value in enumerate(_VALUES):
        if at < 6:
            yield b'%d\n{"signature_name":"serving_default","instances":%s}' % (at, value)
            yield b'%d\n{"inputs":%s}' % (at, value)
    yield b'6\n{"instances":[{"x":[1,2,3,4],"text":["a"]},{"x":[1,2,3,4],"text":["b"]}]}'
    yield b'6\n{"inputs":{"x":[[1,2,3,4]],"text":[[{"b64":"YQ=="}]]}}'
    yield b'6\n{"examples":[{"x":[1,2,3,4]},{"x":[4,3,2,1],"text":"b"}],"context":{"text":"a"}}'
    yield b'6\n{"instances":[{"x":[1,2,3],"text":["a"]},{"x":[1,NaN,3,1e999],"text":["b"]}]}'


def plains() -> Iterator[bytes]:
    for at, value in enumerate(_VALUES):
        yield b"%d\n%s" % (at, value)
    yield b"0\n[1,2,3,4]"


def form(data: bytes) -> None:
    """A form. The first line is the request's Content-Type."""
    header, _, body = data.partition(b"\n")
    kind, found = forms.first_file(header.decode("latin-1"), body)
    hold(found in body, "the file is a piece of the body")
    hold(len(kind) <= forms.HEAD_LIMIT_BYTES, "a type is short")


def forms_made() -> Iterator[bytes]:
    part = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\nContent-Type: image/png\r\n\r\nabc\r\n'
    )
    yield b"multipart/form-data; boundary=b\n" + part % b"a.png" + b"--b--\r\n"
    field = b'--b\r\nContent-Disposition: form-data; name="top"\r\n\r\n5\r\n'
    yield b'multipart/form-data; boundary="b"\nbefore\r\n' + field * 2 + part % b"\xc3\xa9.png" + b"--b--"
    yield b"multipart/form-data; boundary=b\n--b\r\nContent-Disposition: form-data; filename*=UTF-8''%C3%A9.png\r\nContent-Transfer-Encoding: base64\r\n\r\nYWJj\r\n--b--"


def inflated(data: bytes) -> None:
    """A compressed body, in pieces. The first byte chooses the coding, the second the size of pieces."""
    coding = "gzip" if data[:1] in (b"\0", b"g") else "deflate"
    step, body, limit = (data[1] if len(data) > 1 else 0) + 1, data[2:], 1 << 20
    inflate, size = _Inflate(coding), 0
    for place in range(0, len(body), step):
        size += len(inflate(body[place : place + step], limit - size + 1))
        if size > limit:
            break
    hold(size <= limit + 1, "no more than the limit is unpacked")


def bodies() -> Iterator[bytes]:
    text = b'{"instances":[[1,2,3,4]]}' * 20
    yield b"\0\x40" + gzip.compress(text, mtime=0)
    yield b"\1\x07" + zlib.compress(text)
    raw = zlib.compressobj(wbits=-15)
    yield b"\1\xff" + raw.compress(text) + raw.flush()
    yield b"\0\xff" + gzip.compress(bytes(3_000_000), mtime=0)


def info(*specs: TensorSpec) -> ModelInfo:
    """A registered model with these inputs."""
    blob = BlobRef(sha256="0" * 64, size=1)
    return ModelInfo(name="m", version=1, model=blob, created_at=0.0, signature=Signature(inputs=specs, outputs=()))


_FILES = {
    b"i": info(TensorSpec(name="x", datatype="FP32", shape=(-1, 8, 8, 3))),
    b"a": info(TensorSpec(name="x", datatype="FP32", shape=(-1, 100, 2))),
    b"t": info(TensorSpec(name="x", datatype="BYTES", shape=(-1, 1))),
}


def posted(data: bytes) -> None:
    """A file for `classify`: a letter for the model, the content type, and the file."""
    head, _, body = data.partition(b"\n")
    found = plain_routes._item(head[1:].decode("latin-1"), body, _FILES.get(head[:1], _FILES[b"i"]))
    hold(len(found) == 1, "one item is a batch of one")


def files() -> Iterator[bytes]:
    from fuzz.of_files import images, recordings

    for one in images():
        yield b"i\n" + one
    for one in recordings():
        yield b"aaudio/wav\n" + one
    yield b"ttext/plain\nhello"
    yield b"t\nh\xc3\xa9llo"


OURS = (InvalidRequest, InvalidData)

TARGETS = (
    Target(
        "open_inference", open_inference, OURS, open_inferences, mutators.in_parts(mutators.plain, mutators.of_json)
    ),
    Target("index", index, OURS, lambda: [b'{"ready":true}', b"{}"], mutators.of_json),
    Target("tensorflow", tensorflow, OURS, tensorflows, mutators.in_parts(mutators.plain, mutators.of_json)),
    Target("plain_arrays", plain_arrays, OURS, plains, mutators.in_parts(mutators.plain, mutators.of_json)),
    Target("form", form, OURS, forms_made, mutators.in_parts(mutators.plain, mutators.plain)),
    Target("inflated", inflated, OURS, bodies, mutators.plain),
    Target("posted", posted, OURS, files, mutators.in_parts(mutators.plain, mutators.of_png), peak_bytes=2**30),
)
