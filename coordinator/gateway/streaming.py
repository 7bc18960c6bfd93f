"""Many rows in one request, each answered as soon as it is done: server-sent events (WHATWG HTML, 9.2)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import msgspec
from aiohttp import web

from coordinator.gateway import json_arrays
from coordinator.gateway.answers import Problem
from coordinator.gateway.asking import Asking
from potluck.errors import InvalidRequest, PotluckError
from potluck.wire.tensors import from_numpy, to_numpy
from potluck.wire.values import Tensor

CONTENT_TYPE = "text/event-stream"
ROWS_AT_ONCE = 32
"""Rows of one request that are under way at once, so that a long request leaves room for others."""


def wanted(request: web.Request) -> bool:
    """Whether the client asks for events."""
    return CONTENT_TYPE in request.headers.get("Accept", "")


async def stream(asking: Asking, request: web.Request, model: str, inputs: tuple[Tensor, ...]) -> web.StreamResponse:
    """Answer `inputs` row by row, in the order in which rows are done. The `id` of an event is the row's number.

    Its data is the answer for one row, or the error in an `event: error`. If the client leaves, unfinished rows are cancelled.
    Raises InvalidRequest if the inputs differ in their number of rows.
    """
    arrays = [(tensor.name, to_numpy(tensor)) for tensor in inputs]
    counts = {len(array) if array.ndim else 0 for _, array in arrays}
    if len(counts) != 1 or 0 in counts:
        raise InvalidRequest("the inputs of a request need the same number of rows, at least 1")
    (count,) = counts
    seconds = asking.seconds(request)
    response = web.StreamResponse(headers={"Content-Type": CONTENT_TYPE, "Cache-Control": "no-store"})
    await response.prepare(request)

    async def ask(numbers: Iterator[int]) -> None:
        for number in numbers:
            row = tuple([from_numpy(name, array[number : number + 1]) for name, array in arrays])
            try:
                answer = await asking.infer(request, model, row, seconds)
            except PotluckError as error:
                answered = event(number, msgspec.json.encode(Problem(error.message)), "error")
            else:
                outputs = {tensor.name: json_arrays.nested(tensor) for tensor in answer.outputs}
                answered = event(number, msgspec.json.encode({"model": answer.model, "outputs": outputs}))
            await response.write(answered)

    numbers = iter(range(count))
    async with asyncio.TaskGroup() as rows:
        for number in range(min(count, ROWS_AT_ONCE)):
            rows.create_task(ask(numbers), name=f"rows {number}")
    await response.write_eof()
    return response


def event(number: int, data: bytes, name: str = "") -> bytes:
    """An event as it is sent; its `id` is the number."""
    head = f"event: {name}\n" if name else ""
    return f"{head}id: {number}\n".encode() + b"data: " + data + b"\n\n"
