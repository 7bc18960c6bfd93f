"""A client of paho's, which knows nothing of ours: what somebody with any MQTT library can try at a closed cluster's broker."""

from __future__ import annotations

import socket
import ssl

import paho.mqtt.client as mqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from support.eventually import eventually

DENIED, DONE = "Not authorized", "Success"


class Peer:
    """A client of paho's, on a thread of its own."""

    def __init__(
        self, context: ssl.SSLContext | None, client_id: str, port: int, will: str = "", version: int = 5
    ) -> None:
        self.got: list[tuple[str, bytes]] = []
        self.subscribed = 0
        self.ended = False
        self.published: dict[int, str] = {}
        self.answer = ""
        self.error = ""
        self._client = mqtt.Client(
            mqtt.CallbackAPIVersion.VERSION2,
            client_id,
            protocol=mqtt.MQTTProtocolVersion(version),
            reconnect_on_failure=False,
        )
        if context is not None:
            self._client.tls_set_context(context)
        if will:
            self._client.will_set(will, b"will", 1)
        self._client.on_connect = lambda c, u, f, reason, p: setattr(self, "answer", str(reason))
        self._client.on_disconnect = lambda *_: setattr(self, "ended", True)
        self._client.on_message = lambda c, u, message: self.got.append((message.topic, message.payload))
        self._client.on_subscribe = lambda *_: setattr(self, "subscribed", self.subscribed + 1)
        self._client.on_publish = lambda c, u, mid, reason, p: self.published.__setitem__(mid, str(reason))
        try:
            self._client.connect("127.0.0.1", port, 20)
        except OSError as error:
            self.error = str(error) or type(error).__name__
            self.ended = True
        else:
            self._client.loop_start()

    async def connected(self) -> Peer:
        await eventually(lambda: self.answer == DONE)
        return self

    async def publish(self, topic: str, payload: bytes = b"x", *, retain: bool = False, answer_to: str = "") -> str:
        """DONE or DENIED: what the broker answers. It takes a message also when nobody wants it, and says so.

        `answer_to`: the response topic of MQTT 5.
        """
        properties = None
        if answer_to:
            properties = Properties(PacketTypes.PUBLISH)
            properties.ResponseTopic = answer_to
        number = self._client.publish(topic, payload, 1, retain, properties).mid
        answer = await eventually(lambda: self.published.get(number))
        return DONE if answer == "No matching subscribers" else str(answer)

    def send(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """`publish` without waiting for an answer."""
        self._client.publish(topic, payload, 1, retain)

    async def subscribe(self, *filters: str) -> None:
        wanted = self.subscribed + len(filters)
        for one in filters:
            self._client.subscribe(one, 1)
        await eventually(lambda: self.subscribed == wanted)

    def drop(self) -> None:
        """Break the connection without a goodbye, so that the will is sent."""
        sock = self._client.socket()
        assert sock is not None
        # below TLS, which would first say goodbye
        socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()
