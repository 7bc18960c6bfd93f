"""What all protocols of the gateway share: which model is meant, how long its answer may take, and the request itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext

from aiohttp import web

from coordinator.gateway.answers import Handler, compressed, guarded
from coordinator.gateway.bodies import Bodies
from coordinator.gateway.catalog import Catalog
from coordinator.gateway.shelf import Shelf
from coordinator.serving.inference import Inference
from coordinator.serving.inputs import INPUT_LIMIT_BYTES, size_bytes
from potluck.errors import InvalidRequest
from potluck.settings import CoordinatorSettings
from potluck.wire.questions import Inferred
from potluck.wire.values import BlobRef, Signature, Tensor

TIMEOUT_HEADER = "Request-Timeout"
"""How many seconds the client waits; then the request is given up. (No protocol here has its own header for this.)"""


class Asking:
    """`signatures` gives the inputs of a deployed model, `shelf` carries tensors that do not fit into a message."""

    def __init__(
        self,
        catalog: Catalog,
        inference: Inference,
        signatures: Callable[[str], Signature | None],
        settings: CoordinatorSettings,
        shelf: Shelf,
    ) -> None:
        self.catalog = catalog
        self.bodies = Bodies(settings.http_body_limit_bytes)
        self._inference = inference
        self._signatures = signatures
        self._settings = settings
        self._shelf = shelf

    @property
    def stopping(self) -> bool:
        """Whether no more requests are taken."""
        return self._inference.stopping

    def deployed(self, model: str) -> tuple[str, Signature | None]:
        """The deployment that `name`, `name:version` or `name:alias` means, and its signature once it is known.

        Raises NotFound.
        """
        name = self._inference.router(model).name
        return name, self._signatures(name)

    async def infer(
        self,
        request: web.Request,
        model: str,
        inputs: tuple[Tensor, ...],
        timeout_seconds: float | None = None,
        priority: int = 0,
    ) -> Inferred:
        """The answer of `model`, with the data of all its tensors. Of `timeout_seconds` and the header's time, the shorter holds.

        Raises as `Inference.infer`, and as `Shelf` for large tensors.
        """
        lent: AbstractAsyncContextManager[tuple[Tensor, ...]] = nullcontext(inputs)
        if sum([size_bytes(tensor) for tensor in inputs]) > INPUT_LIMIT_BYTES:
            lent = self._shelf.lent(inputs)
        seconds = self.seconds(request, timeout_seconds)
        async with lent as sent:
            answer = await self._inference.infer(model, sent, seconds, priority=priority)
            if any(isinstance(tensor.data, BlobRef) for tensor in answer.outputs):
                outputs = [await self._shelf.fetched(tensor) for tensor in answer.outputs]
                answer = Inferred(model=answer.model, outputs=tuple(outputs))
        return answer

    def seconds(self, request: web.Request, asked: float | None = None) -> float:
        """How long the answer may take: the least of the times asked for and allowed. Raises InvalidRequest."""
        limits = [self._settings.inference_seconds]
        if asked is not None:
            limits.append(asked)
        text = request.headers.get(TIMEOUT_HEADER)
        if text is not None:
            try:
                header = float(text)
            except ValueError:
                header = math.nan
            if not (math.isfinite(header) and header > 0):
                raise InvalidRequest(f"{TIMEOUT_HEADER} is {text[:40]!r}: expected a number of seconds, such as 0.5")
            limits.append(header)
        return min(limits)

    def answering(self, handler: Handler) -> Handler:
        """`handler` of requests to models, with its errors as answers, its answer compressed, and its body released."""
        inner = guarded(handler)

        async def answered(request: web.Request) -> web.StreamResponse:
            try:
                response = await inner(request)
            finally:
                self.bodies.release(request)
            return await compressed(request, response) if isinstance(response, web.Response) else response

        return answered
