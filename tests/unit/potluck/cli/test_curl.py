"""The line that asks a deployed model: its body, for models with any inputs."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any, Literal

import pytest
from msgspec.structs import replace

from potluck.cli import curl
from potluck.credentials import Credentials
from potluck.wire.jobs import JobProgress
from potluck.wire.questions import DeploymentInfo, JobChanged, JobSubject, ModelInfo, ReplicaInfo
from potluck.wire.values import BlobRef, ImageOptions, Signature, TensorSpec

SCORES = TensorSpec(name="scores", datatype="FP32", shape=(-1, 3))
STABLE = DeploymentInfo(name="m:2", wanted=1, replicas=(), role="stable")
NOWHERE = ("http://127.0.0.1:1",)


def model(*inputs: TensorSpec, **more: Any) -> ModelInfo:
    signature = Signature(inputs=inputs, outputs=(SCORES,))
    return ModelInfo(
        name="m", version=2, model=BlobRef(sha256="0" * 64, size=1), created_at=1.0, signature=signature, **more
    )


def spec(name: str, datatype: str, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, datatype=datatype, shape=(-1, *shape))


def sent(line: str, folder: Path) -> tuple[list[str], Any]:
    """curl's arguments, and the JSON that it sends."""
    program = folder / "curl"
    program.write_text('#!/bin/sh\necho "$1"\n[ "$3" = @- ] && cat || printf %s "$3"\n')
    program.chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-c", line], env=environment, capture_output=True, text=True, timeout=30, check=True)
    url, _, body = done.stdout.partition("\n")
    return [url], json.loads(body)


@pytest.mark.parametrize(
    ("inputs", "shapes", "values"),
    [
        ((spec("x", "FP32", 4),), [[1, 4]], [0.5]),
        ((spec("it's x", "INT64", -1),), [[1, curl.FREE_SIZE]], [0]),
        ((spec("t", "BYTES"), spec("b", "BOOL", 2)), [[1], [1, 2]], ["a text", True]),
        ((spec("large", "FP16", 224, 224, 2), spec("t", "BYTES", 1)), [[1, 224, 224, 2], [1, 1]], [0.5, "a text"]),
    ],
)
def test_names_shapes_and_values_are_those_of_the_signature(
    inputs: tuple[TensorSpec, ...], shapes: list[list[int]], values: list[Any], tmp_path: Path
) -> None:
    [line] = curl.ask(NOWHERE, model(*inputs), STABLE, Credentials())
    assert len(line) < 2000, "a person looks at it"
    [url], body = sent(line, tmp_path)
    assert url == "http://127.0.0.1:1/v2/models/m/infer"
    assert body == {
        "inputs": [
            {"name": one.name, "datatype": one.datatype, "shape": shape, "data": [value] * math.prod(shape)}
            for one, shape, value in zip(inputs, shapes, values, strict=True)
        ]
    }


def test_what_takes_files_is_asked_with_one_and_as_it_is(tmp_path: Path) -> None:
    image = spec("pixels", "FP32", -1, -1, 3)
    with_a_file, as_it_is = curl.ask(
        NOWHERE, model(image, image=ImageOptions(height=8, width=8)), STABLE, Credentials()
    )
    assert with_a_file == "curl --data-binary @picture.jpg http://127.0.0.1:1/models/m/classify"
    assert as_it_is.startswith("echo iVBOR")
    with_a_file, as_it_is = curl.ask(NOWHERE, model(spec("samples", "FP32", 16), rate=8000), STABLE, Credentials())
    assert with_a_file == "curl --data-binary @sound.wav http://127.0.0.1:1/models/m/classify"
    assert as_it_is.startswith("curl http://127.0.0.1:1/v2/models/m/infer")
    [line] = curl.ask(NOWHERE, model(image), STABLE, Credentials())
    assert "/v2/" in line, "of images of any size it is not known how large they may be"


@pytest.mark.parametrize(
    ("inputs", "remark"),
    [
        ((spec("colour", "BYTES"),), ' ("a text" is made up: use values that the model knows)'),
        ((spec("code", "INT64", 1), spec("more", "UINT8")), " (0 is made up: use values that the model knows)"),
        ((spec("a", "FP32", 4), spec("b", "INT32"), spec("c", "BYTES")),
         ' (0 and "a text" are made up: use values that the model knows)'),
        ((spec("x", "FP32", 4), spec("flag", "BOOL")), ""),
        ((spec("pixels", "UINT8", 8, 8, 3),), ""),
    ],
)  # fmt: skip
def test_what_a_model_may_not_know_is_said_to_be_made_up(inputs: tuple[TensorSpec, ...], remark: str) -> None:
    client = FakeClient("ready")
    client.inputs = inputs
    said, *_ = curl.lines(client, "m:2")  # type: ignore[arg-type]
    assert said == f"\nask it, for instance{remark}:"
    client.states = ("ready", "loading")
    state = JobChanged(
        job_id="j", kind="deploy", state="running", created_at=1.0,
        progress=JobProgress(message="m:2 on n1 is ready"), subject=JobSubject(model="m"),
    )  # fmt: skip
    said, *_ = curl.Early(client).lines(state)  # type: ignore[arg-type]
    assert said == f"m:2 on n1 answers already{remark}:"


def test_what_does_not_answer_to_the_plain_name_is_asked_by_version() -> None:
    [line] = curl.ask(NOWHERE, model(spec("x", "FP32", 4)), replace(STABLE, role="shadow"), Credentials())
    assert shlex.split(line)[1] == "http://127.0.0.1:1/v2/models/m/versions/2/infer"


def test_in_a_closed_cluster_the_line_shows_our_certificate(tmp_path: Path) -> None:
    where = tmp_path / "ann's"
    [line] = curl.ask(NOWHERE, model(spec("x", "FP32", 4)), STABLE, Credentials(where=where))
    assert shlex.split(line)[:5] == ["curl", "--cacert", str(where / "ca.crt"), "--cert", str(where / "client.pem")]
    image = spec("pixels", "UINT8", 8, 8, 3)
    for line in curl.ask(NOWHERE, model(image), STABLE, Credentials(where=where)):
        assert "client.pem" in line


def test_the_address_is_one_that_can_be_reached_from_here(unused_tcp_port_factory: Any) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        [line] = curl.ask((*NOWHERE, address), model(spec("x", "FP32", 4)), STABLE, Credentials())
    assert f"{address}/" in line


class FakeClient:
    """A cluster with one deployment, of which some replicas are ready."""

    def __init__(self, *states: Literal["loading", "ready"]) -> None:
        self.states = states
        self.inputs: tuple[TensorSpec, ...] = (spec("x", "FP32", 2),)

    def deployments(self) -> tuple[DeploymentInfo, ...]:
        replicas = tuple(
            ReplicaInfo(replica_id=f"m:2/n{number}/1", node_id=f"n{number}", state=state)
            for number, state in enumerate(self.states, 1)
        )
        ready = self.states and all(state == "ready" for state in self.states)
        return (replace(STABLE, replicas=replicas, state="ready" if ready else "loading"),)

    credentials = Credentials()

    def gateway(self) -> tuple[str, ...]:
        return NOWHERE

    def get_model(self, name: str) -> ModelInfo:
        return model(*self.inputs)


def test_how_to_ask_is_said_once_the_first_replica_is_ready() -> None:
    client = FakeClient("loading", "loading")
    early = curl.Early(client)  # type: ignore[arg-type]

    def said(message: str, asked: str = "m") -> list[str]:
        progress, subject = JobProgress(message=message), JobSubject(model=asked)
        state = JobChanged(
            job_id="j", kind="deploy", state="running", created_at=1.0, progress=progress, subject=subject
        )
        return early.lines(state)

    assert said("loading the model on n1, n2") == []
    client.states = ("ready", "loading")
    assert said("something else", asked="other") == []
    told, line = said("m:2 on n1 is ready and answers to m; loading the model on n2")
    assert told == "m:2 on n1 answers already:"
    assert "/v2/models/m/infer" in line
    assert said("and again") == []
