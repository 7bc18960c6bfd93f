"""An inference over MQTT without any potluck code: `plain_mqtt.py HOST PORT CLUSTER MODEL < request.json`.

Any MQTT library in any language can do the same: subscribe to a topic of your own, publish the question with `id` and `reply_to`,
and wait for the message with that `id`. Ignore other messages: some brokers send what nobody asked for.
"""

import json
import queue
import sys
import time
import uuid

from paho.mqtt import client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

SECONDS = 30

host, port, cluster, model = sys.argv[1:5]
name = uuid.uuid4().hex
inbox = f"potluck/v1/{cluster}/clients/{name}/inbox"
question = {"type": "Infer", "id": uuid.uuid4().hex, "reply_to": inbox, **json.load(sys.stdin)}
answers: queue.Queue[bytes] = queue.Queue()


def on_connect(client, *_):  # type: ignore[no-untyped-def]
    client.subscribe(inbox, qos=1)


def on_subscribe(client, *_):  # type: ignore[no-untyped-def]
    client.publish(f"potluck/v1/{cluster}/models/{model}/infer", json.dumps(question), qos=1)


def on_message(client, userdata, message):  # type: ignore[no-untyped-def]
    if message.topic == inbox:
        answers.put(message.payload)


def is_answer(payload: bytes) -> bool:
    """Whether this message has our question's id and the type of an answer. The answer is JSON, as the question was."""
    try:
        message = json.loads(payload)
    except ValueError:
        return False
    return (
        isinstance(message, dict)
        and message.get("id") == question["id"]
        and message.get("type") in ("Inferred", "RequestFailed")
    )


client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=name, protocol=mqtt.MQTTv311)
client.on_connect = on_connect
client.on_subscribe = on_subscribe
client.on_message = on_message
client.connect(host, int(port))
client.loop_start()
deadline = time.monotonic() + SECONDS
answer = b""
while not is_answer(answer):
    try:
        answer = answers.get(timeout=max(0.0, deadline - time.monotonic()))
    except queue.Empty:
        sys.exit(f"no answer from {host}:{port} within {SECONDS} s")
client.disconnect()
client.loop_stop()
sys.stdout.buffer.write(answer)
if json.loads(answer)["type"] == "RequestFailed":
    sys.exit(1)
