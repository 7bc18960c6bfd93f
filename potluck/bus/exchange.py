"""Messages on the bus, over any transport: envelopes, questions and answers, and messages that could not be read."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import msgspec

from potluck.bus.filters import FilterTable
from potluck.bus.properties import Mirrored, mirror
from potluck.errors import BadMessage, Conflict, InvalidRequest, Overloaded, PotluckError, TimedOut, TooLarge
from potluck.logs import Seldom, fields
from potluck.surviving import as_defect, surviving
from potluck.wire import codec
from potluck.wire.codec import Encoding
from potluck.wire.commands import Sealed
from potluck.wire.failures import as_error, error_info
from potluck.wire.questions import Inferred, JobEnded, RequestFailed
from potluck.wire.seals import SealRefused
from potluck.wire.topics import Topics
from potluck.wire.values import INLINE_LIMIT_BYTES, Message
from potluck.wording import counted

log = logging.getLogger(__name__)

_SALVAGE_LIMIT_BYTES = 2 * 2**20
_LOG_SECONDS = 5.0
"""After a malformed message or a failed handler, nothing more is logged about the topic for this long."""
_PENDING_LIMIT = 10_000
_SEALED_LIMIT_BYTES = INLINE_LIMIT_BYTES + 8 * 1024
"""A sealed message may be larger than others, by its seal: what fits into a message in an open cluster also fits in a closed one."""


class Envelope(msgspec.Struct, frozen=True):
    """A message as it came. `reply_to` and `message.id` come from the body, else from the MQTT 5 properties.

    One is made for each message: a struct of msgspec takes an eighth of a dataclass's time.
    """

    topic: str
    message: Message
    encoding: Encoding = "msgpack"
    retained: bool = False
    reply_to: str = ""
    correlation: bytes | None = None
    qos: int = 1
    payload: bytes = b""
    """The bytes that `message` was read from."""
    caller: str = ""
    """The identity of the client of a closed cluster that asks, which the topic has proved; `topic` is then as in an open cluster."""

    def without_payload(self) -> Envelope:
        """A copy to keep until it is answered: a queue of envelopes should not hold every message twice."""
        return msgspec.structs.replace(self, payload=b"")


@dataclass(frozen=True)
class Will:
    """What the broker publishes (retained, QoS 1) if this client leaves without a goodbye."""

    topic: str
    message: Message


Handler = Callable[[Envelope], None]
"""A synchronous, quick function, called in the order of arrival. Its errors are logged. It may see a message twice."""

Seal = Callable[[str, bytes], Sealed | None]
"""Seals the bytes of a message (msgpack) to a topic, anew for each sending; None: it must not be sent."""

Open = Callable[[str, Sealed], bytes]
"""The bytes of a message (msgpack) that came to a topic under a seal. Raises SealRefused if it is not to be taken."""


def request_failed(error: PotluckError, request_id: str = "") -> RequestFailed:
    """The answer that carries `error`."""
    return RequestFailed(id=request_id, error=error_info(error))


class Bus(ABC):
    """What each part of a daemon or client gets to send and receive messages. Transports implement the abstract methods."""

    def __init__(self, topics: Topics, client_id: str) -> None:
        self.topics = topics
        self.client_id = client_id
        self.counters: dict[str, int] = dict.fromkeys(
            (
                "received",
                "published",
                "malformed",
                "handler_errors",
                "unexpected_answers",
                "refused_replies",
                "refused_seals",
                "connects",
            ),
            0,
        )
        self._subscriptions: FilterTable[tuple[int, tuple[Handler, ...]]] = FilterTable()
        self._asked: FilterTable[tuple[int, tuple[Handler, ...]]] = FilterTable()
        """Handlers of questions of a closed cluster's clients, by their topic in an open one."""
        self._seals: FilterTable[Seal] = FilterTable()
        self._opens: FilterTable[Open] = FilterTable()
        self._pending: dict[str, asyncio.Future[Message]] = {}
        self._failures: asyncio.Queue[tuple[Envelope, PotluckError]] = asyncio.Queue(100)
        self.on_refused: Callable[[str, PotluckError], None] = lambda topic, error: None
        """Called with the topic of a message that could not be read, and the reason."""
        self._refused_logs = Seldom(_LOG_SECONDS)
        self._withheld_logs = Seldom(_LOG_SECONDS)
        self._fault_logs = Seldom(_LOG_SECONDS)
        self._seal_logs = Seldom(_LOG_SECONDS)

    @abstractmethod
    async def run(self) -> None:
        """Connect, dispatch and reconnect until cancelled; then leave cleanly, without the will."""

    @abstractmethod
    async def connected(self, timeout_seconds: float) -> None:
        """Return once connected and subscribed. Raises Unavailable, which names what was tried and why it failed."""

    @abstractmethod
    def on_connect(self, callback: Callable[[], Awaitable[None]]) -> None:
        """Call `callback` after each (re)connect, once subscriptions are made. Use it to publish births."""

    @property
    def address(self) -> tuple[str, int] | None:
        """The address of the broker that this is connected to; None: not connected."""
        return None

    @property
    def place(self) -> str:
        """`host:port` of that broker; "": not connected."""
        return "{}:{}".format(*self.address) if self.address else ""

    def trouble(self) -> str:
        """Why no messages come or go now; "": no trouble is known."""
        return ""

    def stalled_seconds(self) -> float:
        """By how much the next step towards a connection is late; 0: connected, or on time. Much more: this has stopped trying."""
        return 0.0

    @abstractmethod
    async def _send(
        self, topic: str, payload: bytes, qos: int, retain: bool, mirrored: Mirrored | None = None
    ) -> None: ...

    @abstractmethod
    def _send_now(self, topic: str, payload: bytes, qos: int, retain: bool, mirrored: Mirrored | None) -> bool:
        """Send if the connection takes it now; False: nothing was sent.

        A message at QoS 1 that is not acknowledged when the connection is lost is sent again on the next one.
        """

    @abstractmethod
    async def room(self) -> None:
        """Return when the connection may take more. Raises Unavailable if it does not within a bounded time."""

    @abstractmethod
    def _subscribe_now(self, topic_filter: str, qos: int) -> None: ...

    @abstractmethod
    def _unsubscribe_now(self, topic_filter: str) -> None: ...

    def subscribe(self, topic_filter: str, handler: Handler, *, qos: int = 1) -> None:
        """Call it at any time; the subscription survives reconnects. Handlers may share a filter. Raises ValueError."""
        _, handlers = self._subscriptions.get(topic_filter) or (0, ())
        self._subscriptions[topic_filter] = (qos, (*handlers, handler))
        self._subscribe_now(topic_filter, qos)

    def unsubscribe(self, topic_filter: str) -> None:
        """Forget the filter and all of its handlers."""
        if self._subscriptions.pop(topic_filter) is not None:
            self._unsubscribe_now(topic_filter)

    def subscribe_asked(self, handlers: Mapping[str, Handler], *, qos: int = 1) -> None:
        """Take the questions of a closed cluster's clients. `handlers`: by filters of topics as in an open cluster.

        An envelope names its `caller`. A question whose answer may not go to `reply_to` is logged and counted, and not handled.
        """
        for topic_filter, handler in handlers.items():
            self._asked[topic_filter] = (qos, (handler,))
        self._subscriptions[self.topics.asked] = (qos, ())
        self._subscribe_now(self.topics.asked, qos)

    def seal_on(self, topic_filter: str, seal: Seal) -> None:
        """Send nothing to these topics but under a seal, from now on."""
        self._seals[topic_filter] = seal

    def open_on(self, topic_filter: str, opens: Open) -> None:
        """Take nothing from these topics but what `opens` opens, from now on. What it refuses is dropped, counted and logged."""
        self._opens[topic_filter] = opens

    async def publish(
        self,
        topic: str,
        message: Message,
        *,
        qos: int = 1,
        retain: bool = False,
        encoding: Encoding = "msgpack",
        expiry_seconds: float | None = None,
    ) -> None:
        """Send `message`. Waits for the connection, and at QoS 1 for the broker's receipt, for a bounded time.

        `expiry_seconds` also sets `expires` in the body. Raises Unavailable, TooLarge, and Overloaded if too many messages
        wait to be sent.
        """
        packed = self._packed(topic, message, encoding, expiry_seconds)
        if packed is not None:
            await self._send(topic, packed[0], qos, retain, packed[1])

    def publish_now(
        self,
        topic: str,
        message: Message,
        *,
        qos: int = 1,
        retain: bool = False,
        encoding: Encoding = "msgpack",
        expiry_seconds: float | None = None,
    ) -> bool:
        """`publish` without waiting, if the connection takes the message now. False: it does not.

        At QoS 1 the broker's receipt comes later. If the broker refuses the message, this is logged.
        """
        packed = self._packed(topic, message, encoding, expiry_seconds)
        return packed is None or self._send_now(topic, packed[0], qos, retain, packed[1])

    def _packed(
        self, topic: str, message: Message, encoding: Encoding, expiry_seconds: float | None
    ) -> tuple[bytes, Mirrored] | None:
        """The bytes to send; None: nothing may be sent there."""
        if expiry_seconds is not None and not message.expires:
            message = msgspec.structs.replace(message, expires=time.time() + expiry_seconds)
        if self._seals and (seals := self._seals.find(topic)):
            sealed = seals[0](topic, codec.encode(message))
            if sealed is None:
                return None
            return codec.encode(sealed, limit=_SEALED_LIMIT_BYTES), mirror(message, "msgpack", expiry_seconds)
        return codec.encode(message, encoding), mirror(message, encoding, expiry_seconds)

    async def clear(self, topic: str) -> None:
        """Remove the retained message of `topic`."""
        await self._send(topic, b"", 1, True)

    def clear_now(self, topic: str) -> bool:
        """`clear` without waiting, if possible, as in `publish_now`. False: it is not."""
        return self._send_now(topic, b"", 1, True, None)

    async def reply(self, to: Envelope, message: Message, *, qos: int | None = None) -> None:
        """Answer in the encoding of the question, with its id and QoS. Does nothing if no answer was asked for.

        An answer that is too large becomes RequestFailed. A forbidden `reply_to` is logged and counted.
        """
        answer = self._answer(to, message)
        if answer is not None:
            payload, mirrored = answer
            await self._send(to.reply_to, payload, to.qos if qos is None else qos, False, mirrored)

    def reply_now(self, to: Envelope, message: Message) -> bool:
        """`reply` without waiting, if possible, as in `publish_now`. False: it is not."""
        answer = self._answer(to, message)
        return answer is None or self._send_now(to.reply_to, answer[0], to.qos, False, answer[1])

    def _answer(self, to: Envelope, message: Message) -> tuple[bytes, Mirrored] | None:
        """The bytes to send; None: no answer was asked for, or it may not be sent."""
        if not to.reply_to or not self._may_answer(to):
            return None
        if message.id != to.message.id:
            message = msgspec.structs.replace(message, id=to.message.id)
        if to.encoding == "json" and isinstance(message, Inferred | JobEnded):
            from potluck.wire.tensors import readable  # imports numpy, which a daemon at rest does not need

            message = readable(message)
        try:
            payload = codec.encode(message, to.encoding)
        except TooLarge as error:
            message = request_failed(error, to.message.id)
            payload = codec.encode(message, to.encoding)
        correlation = message.id.encode() if to.correlation is None else to.correlation
        return payload, mirror(message, to.encoding, correlation=correlation)

    def _may_answer(self, to: Envelope) -> bool:
        """Whether an answer may go where the question wants it; if not, this is counted and logged."""
        try:
            self.topics.check_reply_to(to.reply_to, to.caller)
        except InvalidRequest as error:
            self.counters["refused_replies"] += 1
            if (more := self._withheld_logs.due(f"{to.topic} {to.caller}")) is not None:
                shown = fields(topic=to.topic, caller=to.caller or None, reason=error.message, more=more or None)
                log.warning("answer withheld %s", shown)
            return False
        return True

    async def request(
        self, topic: str, message: Message, *, timeout_seconds: float, qos: int = 1, encoding: Encoding = "msgpack"
    ) -> Message:
        """Ask `message` and return the answer, which comes to this client's inbox. An empty `id` gets a fresh one.

        Raises the error that the answer carries, TimedOut, Unavailable, TooLarge, or Conflict if a request with this `id` waits.
        """
        inbox = self.topics.client_inbox(self.client_id)
        if self._subscriptions.get(inbox) is None:
            self.subscribe(inbox, self._on_answer)
        request_id = message.id or uuid.uuid4().hex
        if request_id in self._pending:
            raise Conflict(f"a request with the id {request_id!r} is under way: use a fresh one")
        if len(self._pending) >= _PENDING_LIMIT:
            raise Overloaded(f"{counted(len(self._pending), 'request')} without an answer yet: try again later")
        message = msgspec.structs.replace(message, id=request_id, reply_to=inbox)
        answered: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._pending[request_id] = answered
        mirrored = mirror(message, encoding, timeout_seconds)
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._send(topic, codec.encode(message, encoding), qos, False, mirrored)
                answer = await answered
        except TimeoutError:
            why = self.trouble() or "is whoever serves it running?"
            raise TimedOut(
                f"no answer to {type(message).__name__} on {topic} within {round(timeout_seconds, 2):g} s: {why}"
            ) from None
        finally:
            self._pending.pop(request_id, None)
        if isinstance(answer, RequestFailed):
            raise as_error(answer.error)
        return answer

    def give_up(self, request_id: str, error: PotluckError) -> None:
        """End a waiting request with this error. Does nothing if it does not wait any more."""
        pending = self._pending.get(request_id)
        if pending is not None and not pending.done():
            pending.set_exception(error)

    def _on_answer(self, envelope: Envelope) -> None:
        answered = self._pending.pop(envelope.message.id, None)
        if answered is None or answered.done():
            self.counters["unexpected_answers"] += 1
        else:
            answered.set_result(envelope.message)

    def _dispatch(
        self, topic: str, payload: bytes, qos: int, retained: bool, response_topic: str, correlation: bytes | None
    ) -> None:
        """Decode what arrived and call the handlers. Never raises."""
        with surviving("message received"):
            self._decode(topic, payload, qos, retained, response_topic, correlation)

    def _decode(
        self, topic: str, payload: bytes, qos: int, retained: bool, response_topic: str, correlation: bytes | None
    ) -> None:
        subscribed = self._subscriptions.find(topic)
        if not payload or not subscribed:  # a retained message was cleared, or we just unsubscribed
            return
        self.counters["received"] += 1
        opens, caller = self._opens.find(topic) if self._opens else (), ""
        if self._asked:
            name, inner = self.topics.asked_by(topic)
            if inner != topic:
                topic, caller, subscribed = inner, f"client:{name}", self._asked.find(inner)
                if not name or not subscribed:  # nothing of this kind is asked
                    return
        try:
            if opens:
                message, encoding, payload = _opened(opens[0], topic, payload)
                response_topic, correlation = "", None  # the seal does not cover them
            else:
                message, encoding = codec.decode(payload)
        except SealRefused as error:
            self._refuse_seal(topic, error)
            return
        except (BadMessage, TooLarge) as error:
            unread = Envelope(
                topic, Message(), "msgpack", retained, response_topic, correlation, qos, payload, caller=caller
            )
            self._on_malformed(unread, error)
            return
        if correlation is not None and not message.id:
            message = msgspec.structs.replace(message, id=_text(correlation))
        reply_to = message.reply_to or response_topic
        envelope = Envelope(topic, message, encoding, retained, reply_to, correlation, qos, payload, caller)
        if caller and reply_to and not self._may_answer(envelope):
            return
        for _, handlers in subscribed:
            for handler in handlers:
                try:
                    handler(envelope)
                except Exception:
                    self.counters["handler_errors"] += 1
                    kind = type(message).__name__
                    if (more := self._fault_logs.due(f"{topic} {kind}")) is not None:
                        log.exception("handler failed %s", fields(topic=topic, type=kind, more=more or None))
                    fault = PotluckError(f"{type(message).__name__} met a fault of {self.client_id}: its log says more")
                    self._answer_later(envelope, fault)

    def _refuse_seal(self, topic: str, error: SealRefused) -> None:
        self.counters["refused_seals"] += 1
        if (more := self._seal_logs.due(topic)) is not None:
            log.warning("message not taken %s", fields(topic=topic, reason=error.message[:300], more=more or None))

    def _on_malformed(self, envelope: Envelope, error: PotluckError) -> None:
        payload = envelope.payload
        self.counters["malformed"] += 1
        if (more := self._refused_logs.due(envelope.topic)) is not None:
            shown = fields(topic=envelope.topic, bytes=len(payload), error=error.message[:300], more=more or None)
            log.warning("message refused %s", shown)
        self.on_refused(envelope.topic, error)
        if not self.topics.is_question(envelope.topic):
            return
        request_id, reply_to, encoding = "", "", None
        if len(payload) <= _SALVAGE_LIMIT_BYTES:
            request_id, reply_to, encoding = codec.salvage(payload)
        if envelope.correlation is not None and not request_id:
            request_id = _text(envelope.correlation)
        if encoding is None:  # JSON can be read by people, and by senders that meant to send JSON
            encoding = "json" if not 0x80 <= payload[0] <= 0xDF else "msgpack"
        answer_to = Envelope(
            envelope.topic,
            Message(id=request_id),
            encoding,
            reply_to=reply_to or envelope.reply_to,
            correlation=envelope.correlation,
            qos=envelope.qos,
            caller=envelope.caller,
        )
        self._answer_later(answer_to, error)

    def _answer_later(self, envelope: Envelope, error: PotluckError) -> None:
        """Refuse a question that no handler answers. If too many wait, or it is not a question, it gets no answer."""
        if envelope.reply_to and self.topics.is_question(envelope.topic) and not self._failures.full():
            self._failures.put_nowait((envelope.without_payload(), error))

    async def _answer_malformed(self) -> None:
        """Send the answers that `_answer_later` queued, until cancelled."""
        while True:
            envelope, error = await self._failures.get()
            try:
                await self.reply(envelope, request_failed(error))
            except Exception as failure:  # noqa: BLE001 - whatever an odd question leads to, the next one has its answer
                reason = as_defect(failure, "answering").message
                log.warning("answer lost %s", fields(topic=envelope.reply_to[:300], reason=reason))


def _text(correlation: bytes) -> str:
    try:
        return correlation.decode()
    except UnicodeDecodeError:
        return correlation.hex()


def _opened(opens: Open, topic: str, payload: bytes) -> tuple[Message, Encoding, bytes]:
    """(the message under the seal, its encoding, its bytes).

    Raises SealRefused, and BadMessage or TooLarge for bytes that cannot be read.
    """
    sealed, _ = codec.decode(payload, limit=_SEALED_LIMIT_BYTES)
    if not isinstance(sealed, Sealed):
        raise SealRefused(f"{type(sealed).__name__} is not sealed")
    body = opens(topic, sealed)
    return *codec.decode(body), body
