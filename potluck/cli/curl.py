"""Shell lines that ask a deployed model over HTTP; they work as they are (docs/http.md)."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from potluck.credentials import Credentials
from potluck.settings import GATEWAY_PORT
from potluck.wire.addresses import address
from potluck.wire.questions import DeploymentInfo, JobChanged, ModelInfo
from potluck.wire.values import TensorSpec
from potluck.wording import be

if TYPE_CHECKING:
    from potluck.client import Client

INLINE_VALUES = 100
"""An input with more values than this is made by shell commands, not written out."""
FREE_SIZE = 32
"""The size to use for a dimension of any size (not the batch): more than the window of a usual layer."""
_CONNECT_SECONDS = 0.5


def lines(client: Client, name: str) -> list[str]:
    """What to print when the deployment `name` is ready."""
    found = [one for one in client.deployments() if one.name == name]
    info = client.get_model(name)
    asked = [line for one in found for line in ask(client.gateway(), info, one, client.credentials)]
    return [f"\nask it, for instance{made_up(info)}:", *asked] if asked else []


class Early:
    """For a deployment that is being made: gives the lines once, when one replica is ready while others still load."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._seen = ""
        """The job's message when it was last looked at."""
        self._said = False

    def lines(self, state: JobChanged) -> list[str]:
        message, asked = state.progress.message, state.subject.model.partition(":")[0]
        if self._said or state.state != "running" or not message or message == self._seen:
            return []
        self._seen = message
        for one in self._client.deployments():
            some = any(replica.state == "ready" for replica in one.replicas)
            if one.state != "loading" or not some or one.name.partition(":")[0] != asked:
                continue
            self._said = True
            nodes = ", ".join(replica.node_id for replica in one.replicas if replica.state == "ready")
            info = self._client.get_model(one.name)
            how = ask(self._client.gateway(), info, one, self._client.credentials)
            return [f"{one.name} on {nodes} answers already{made_up(info)}:", *how]
        return []


def ask(addresses: Sequence[str], info: ModelInfo, deployment: DeploymentInfo, credentials: Credentials) -> list[str]:
    """The lines for a model: the first with a file of the user's, where it takes images or recordings; the last needs no file."""
    base, signature, curl = _reachable(addresses, credentials), info.signature, _curl(credentials)
    by_name = deployment.role in ("stable", "canary")
    inputs = signature.inputs if signature is not None else ()
    classify = shlex.quote(f"{base}/models/{info.name if by_name else deployment.name}/classify")
    scores = signature is not None and [len(one.shape) for one in signature.outputs] == [2]
    if scores and _takes_images(info, inputs):
        return [
            f"{curl} --data-binary @picture.jpg {classify}",
            f"echo {_pixel()} | base64 -d | {curl} --data-binary @- {classify}",
        ]
    version = "" if by_name else f"/versions/{info.version}"
    infer = shlex.quote(f"{base}/v2/models/{info.name}{version}/infer")
    lines = [f"{curl} --data-binary @sound.wav {classify}"] if info.rate and scores else []
    if not inputs:
        return lines
    if all(_count(spec) <= INLINE_VALUES for spec in inputs):
        body = json.dumps({"inputs": [_tensor(spec, [_value(spec)] * _count(spec)) for spec in inputs]})
        return [*lines, f"{curl} {infer} -d {shlex.quote(body)}"]
    parts = [_made(spec) for spec in inputs]
    between = "printf ', '; "
    return [*lines, f"""{{ printf '{{"inputs": ['; {between.join(parts)}printf ']}}'; }} | {curl} {infer} -d @-"""]


def _curl(credentials: Credentials) -> str:
    """curl with what a closed cluster asks for: its CA, and our certificate."""
    if credentials.where is None:
        return "curl"
    from potluck.security import folder

    files = (credentials.where / folder.CA_CERTIFICATE, folder.pair(credentials.where, "client"))
    return "curl --cacert {} --cert {}".format(*(shlex.quote(str(file.absolute())) for file in files))


def made_up(info: ModelInfo) -> str:
    """A remark that some values are made up (a model with a vocabulary may not know them); empty where the lines have none."""
    inputs = info.signature.inputs if info.signature is not None else ()
    if _takes_images(info, inputs):
        return ""
    values = dict.fromkeys(
        json.dumps(_value(spec)) for spec in inputs if spec.datatype.startswith(("BYTES", "INT", "UINT"))
    )
    return f" ({' and '.join(values)} {be(len(values))} made up: use values that the model knows)" if values else ""


def _takes_images(info: ModelInfo, inputs: Sequence[TensorSpec]) -> bool:
    if len(inputs) != 1:
        return False
    shape = inputs[0].shape
    return len(shape) == 4 and shape[3] in (1, 3, 4) and (info.image is not None or min(shape[1:3]) > 0)


def _tensor(spec: TensorSpec, data: list[Any]) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": _shape(spec), "data": data}


def _made(spec: TensorSpec) -> str:
    """Commands that write a tensor of many values."""
    head = json.dumps(_tensor(spec, []))[:-2]
    value = shlex.quote(json.dumps(_value(spec)))
    return f"printf %s {shlex.quote(head)}; yes {value} | head -n {_count(spec)} | paste -sd, -; printf ']}}'; "


def _shape(spec: TensorSpec) -> list[int]:
    free = 1 if spec.datatype == "BYTES" else FREE_SIZE
    return [1, *(free if size < 0 else size for size in spec.shape[1:])]


def _count(spec: TensorSpec) -> int:
    return math.prod(_shape(spec))


def _value(spec: TensorSpec) -> Any:
    if spec.datatype in ("BYTES", "BOOL"):
        return "a text" if spec.datatype == "BYTES" else True
    return 0.5 if spec.datatype.startswith(("FP", "BF")) else 0


def _pixel() -> str:
    """A PNG of one grey pixel, in base64."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("L", (1, 1), 128).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _reachable(addresses: Sequence[str], credentials: Credentials) -> str:
    """The first address that accepts a connection from here; else the first address."""
    from potluck.net.http_client import is_there  # HTTP is slow to import

    async def first() -> str:
        for one in addresses:
            if await is_there(one, credentials, _CONNECT_SECONDS):
                return one
        return addresses[0] if addresses else address("COORDINATOR", GATEWAY_PORT, credentials.scheme)

    return asyncio.run(first())
