"""The gateway does what its OpenAPI description says: schemathesis makes the requests."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema_rs

from support.serving_lab import Lab

Http = tuple[str, aiohttp.ClientSession]
SECONDS = 90
CONFIGURATION = """
[parameters]
"path.model" = "m"
"header.Request-Timeout" = "20"
"""
TENSOR = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}
EXAMPLES = {"examples": [{"x": [1, 2]}]}
GOOD: dict[str, Any] = {
    "/v2/repository/index": {"ready": True},
    "/v2/models/{model}/infer": {"inputs": [TENSOR], "id": "7"},
    "/v1/models/{model}:predict": {"instances": [[1, 2]]},
    "/v1/models/{model}:classify": EXAMPLES,
    "/models/{model}/infer": [1, 2],
    "/v1/control": {"type": "ListNodes", "id": "7"},
}


async def test_every_route_is_documented(http: Http) -> None:
    base, session = http
    async with session.get(f"{base}/openapi.json") as response:
        paths = (await response.json())["paths"]
    text = (Path(__file__).parents[3] / "docs" / "http.md").read_text(encoding="utf-8")
    for path, operations in paths.items():
        told = path.replace("/versions/{version}", "").replace("/labels/{label}", "").replace("{model}", "<name>")
        for method in operations:
            assert f"`{method.upper()} {told}`" in text, (method, path)


async def test_answers_are_as_they_are_described(http: Http) -> None:
    base, session = http
    async with session.get(f"{base}/openapi.json") as response:
        document = await response.json()
    for path, body in GOOD.items():
        answer = document["paths"][path]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
        async with session.post(base + path.replace("{model}", "m"), json=body) as response:
            assert response.status == 200, path
            jsonschema_rs.validate(answer | {"components": document["components"]}, await response.json())
        jsonschema_rs.validate(
            document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
            | {"components": document["components"]},
            body,
        )


async def test_schemathesis_finds_nothing(lab: Lab, http: Http, tmp_path: Path) -> None:
    """All its checks except one: the gateway may refuse what a schema allows, as no schema knows what the model takes.

    Paths with a version or a label are left out, as they have the same handlers; and so are events, which never end.
    """
    base, _ = http
    (tmp_path / "schemathesis.toml").write_text(CONFIGURATION, encoding="utf-8")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "schemathesis.cli", "run", f"{base}/openapi.json", "--seed", "1", "--no-color",
        "--checks", "all", "--exclude-checks", "positive_data_acceptance", "--exclude-path-regex", "versions|labels|events",
        "--phases", "coverage,fuzzing", "--max-examples", "5",
        cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        async with asyncio.timeout(SECONDS):
            said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, said.decode()[-6000:]
    assert b"Tested: 17" in said, said.decode()[-1000:]
