"""kserve's REST client against a gateway: `kserve_client.py PACKAGES URL MODEL INPUT`. Prints one JSON object.

kserve's package imports its whole server (Kubernetes, Ray, metrics) before its client, and needs an older psutil than ours. So this
imports only the modules of the client, unchanged.
"""

from __future__ import annotations

import asyncio
import json
import sys
import types
from pathlib import Path
from typing import Any

import httpx
import numpy as np


def client_modules(packages: str) -> tuple[Any, Any]:
    """`kserve.inference_client` and `kserve.protocol.infer_type`, without `kserve/__init__.py`."""
    sys.path.insert(0, packages)
    package = types.ModuleType("kserve")
    package.__path__ = [str(Path(packages) / "kserve")]
    sys.modules["kserve"] = package
    from kserve import inference_client
    from kserve.protocol import infer_type

    return inference_client, infer_type


async def main(packages: str, url: str, model: str, name: str) -> None:
    clients, types_ = client_modules(packages)
    found: dict[str, Any] = {}
    rows = np.float32([[0.1, 0.2, 0.3, 0.4], [1, 2, 3, 4]])
    v2 = clients.InferenceRESTClient(clients.RESTConfig(protocol="v2", retries=0))
    found["live"] = await v2.is_server_live(url)
    found["ready"] = await v2.is_server_ready(url)
    found["model_ready"] = await v2.is_model_ready(url, model)
    found["unknown_ready"] = await v2.is_model_ready(url, "nothing")
    for binary in (False, True):
        tensor = types_.InferInput(name, list(rows.shape), "FP32")
        tensor.set_data_from_numpy(rows, binary_data=binary)
        asked = types_.InferRequest(model, [tensor], request_id="seven", parameters={"binary_data_output": binary})
        answer = await v2.infer(url, asked, model_name=model)
        output = answer.outputs[0]
        found[f"infer_{binary}"] = output.as_numpy().tolist()
        found[f"id_{binary}"] = answer.id
    try:
        await v2.infer(url, {"inputs": []}, model_name=model)
    except httpx.HTTPStatusError as error:
        found["refused"] = [error.response.status_code, str(error)]
    v1 = clients.InferenceRESTClient(clients.RESTConfig(protocol="v1", retries=0))
    found["v1_live"] = await v1.is_server_live(url)
    found["v1_model_ready"] = await v1.is_model_ready(url, model)
    found["v1"] = (await v1.infer(url, {"instances": rows.tolist()}, model_name=model))["predictions"]
    print(json.dumps(found))


asyncio.run(main(*sys.argv[1:]))
