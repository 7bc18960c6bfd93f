"""Requests for inference that come over the bus, and their answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from coordinator.callers import Callers
from coordinator.serving.inference import Asked, Inference
from potluck.bus.exchange import Envelope
from potluck.bus.outbox import Outbox
from potluck.errors import InvalidRequest, NotAllowed, NotAuthenticated, PotluckError, TimedOut, Unavailable
from potluck.settings import CoordinatorSettings
from potluck.wire.deadlines import deadline, too_late
from potluck.wire.questions import CancelInfer, Infer, Inferred
from potluck.wire.topics import Topics


class BusRequests:
    """Gives the requests to `inference`, and publishes the answers through `outbox`."""

    def __init__(
        self,
        inference: Inference,
        *,
        topics: Topics,
        outbox: Outbox,
        settings: CoordinatorSettings,
        callers: Callers | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`callers`: the members of a closed cluster; None: the cluster is open, and everybody may ask."""
        self._inference = inference
        self._topics = topics
        self._outbox = outbox
        self._limit_seconds = settings.inference_seconds
        self._callers = callers
        self._clock = clock
        self._asked: dict[tuple[str, str], Asked] = {}
        """Requests without an answer yet, by the topic of the answer and the id of the request."""

    def on_infer(self, envelope: Envelope) -> None:
        """Handler for `models/<name>/infer`."""
        message = envelope.message
        if self._callers is not None:
            try:
                self._callers.check(envelope.caller, type(message))
            except (NotAuthenticated, NotAllowed) as denied:
                self._callers.note(envelope.caller, type(message).__name__, denied.code)
                self._outbox.refuse(envelope, denied)
                return
        if isinstance(message, CancelInfer):
            asked = self._asked.get((envelope.reply_to, message.id))
            if asked is not None:
                self._inference.cancel(asked)
            return
        if not isinstance(message, Infer):
            self._outbox.refuse(
                envelope, InvalidRequest(f"{type(message).__name__} is not Infer: see docs/protocol.md")
            )
            return
        if self._inference.stopping:
            return  # our clients ask the next coordinator again, and an error would end that
        if message.id and (envelope.reply_to, message.id) in self._asked:
            return  # it waits already: its client asks again what may be lost, and one answer is enough
        now = self._clock()
        until = min(deadline(message, now), now + self._limit_seconds)
        if until <= now:
            error = TimedOut(too_late(message, now, "the coordinator's"))
            self._inference.metrics.answered("", now, 0.0, error.code)
            self._outbox.refuse(envelope, error)
            return
        model = self._topics.segment(envelope.topic, 1)
        answer = partial(self._answer, envelope.without_payload())  # the envelope is kept until there is an answer
        asked = self._inference.ask(model, message.inputs, answer, now, until, message.priority, items=True)
        if message.id and asked.waits:
            self._asked[envelope.reply_to, message.id] = asked

    def _answer(self, envelope: Envelope, answer: Inferred | PotluckError) -> None:
        self._asked.pop((envelope.reply_to, envelope.message.id), None)
        if self._inference.stopping and isinstance(answer, Unavailable):
            return  # as in on_infer
        if isinstance(answer, PotluckError):
            self._outbox.refuse(envelope, answer)
        else:
            self._outbox.reply(envelope, answer)
