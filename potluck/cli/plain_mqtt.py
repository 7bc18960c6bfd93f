"""An inference over MQTT with nothing of potluck in it: `plain_mqtt.py HOST PORT CLUSTER MODEL < request.json`.

Any MQTT library in any language does the same: subscribe to a topic of your own, publish the question with `id` and
`reply_to`, and read the answer there.
"""

import json
import sys
import threading
import uuid

from paho.mqtt import client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

host, port, cluster, model = sys.argv[1:5]
name = uuid.uuid4().hex
inbox = f"potluck/v1/{cluster}/clients/{name}/inbox"
answered = threading.Event()
answers: list[bytes] = []


def on_message(client, userdata, message):  # type: ignore[no-untyped-def]
    answers.append(message.payload)
    answered.set()


def on_subscribe(client, userdata, mid, codes, properties):  # type: ignore[no-untyped-def]
    question = {"type": "Infer", "id": "1", "reply_to": inbox, **json.load(sys.stdin)}
    client.publish(f"potluck/v1/{cluster}/models/{model}/infer", json.dumps(question), qos=1)


client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=name, protocol=mqtt.MQTTv311)
client.on_message = on_message
client.on_subscribe = on_subscribe
client.on_connect = lambda client, *_: client.subscribe(inbox, qos=1)
client.connect(host, int(port))
client.loop_start()
if not answered.wait(30):
    sys.exit(f"no answer from {host}:{port} within 30 s")
client.disconnect()
client.loop_stop()
sys.stdout.buffer.write(answers[0])
