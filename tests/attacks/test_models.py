"""Models made to harm the nodes that load them, by a user who may deploy. Their bytes are made by hand, as an attacker would.

What a model's graph may do, and what the sandbox keeps from an engine, is tested with them (README.md).
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import marshal
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import psutil
import pytest

from support import attackers
from support.attacked import Attacked
from support.eventually import eventually

BOMB_BYTES = 2**29
"""It is half a megabyte when it is packed."""
SECONDS = 60.0


class Evil:
    """What runs when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


def keras(config: Any, weights: bytes = b"", **more: bytes) -> bytes:
    """A `.keras` file: a zip, whose entries have these names."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": "3.0.0"}))
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("model.weights.h5", weights)
        for name, data in more.items():
            archive.writestr(name, data)
    return packed.getvalue()


def sequential(*layers: dict[str, Any]) -> dict[str, Any]:
    first = {
        "module": "keras.layers",
        "class_name": "InputLayer",
        "config": {"batch_shape": [None, 1], "dtype": "float32"},
    }
    return {"module": "keras", "class_name": "Sequential", "config": {"name": "m", "layers": [first, *layers]}}


def with_lambda(marker: Path) -> dict[str, Any]:
    code = compile(f"(lambda x: [open({str(marker)!r}, 'w').close(), x][1])", "x", "eval").co_consts[0]
    packed = base64.encodebytes(marshal.dumps(code)).decode()
    function = {"class_name": "__lambda__", "config": {"code": packed, "defaults": None, "closure": None}}
    return sequential({"module": "keras.layers", "class_name": "Lambda", "config": {"name": "l", "function": function}})


def with_function(module: str, name: str) -> dict[str, Any]:
    """As in CVE-2025-1550: a layer's activation is a function of any module, which Keras would call."""
    call = {"module": module, "class_name": "function", "config": name, "registered_name": "function"}
    layer = {"name": "d", "units": 1, "activation": call}
    return sequential({"module": "keras.layers", "class_name": "Dense", "config": layer})


def with_class(module: str, name: str, *given: str) -> dict[str, Any]:
    """A layer whose class is anything that can be imported."""
    return sequential({"module": module, "class_name": name, "registered_name": name, "config": {"args": given}})


def weights() -> bytes:
    """A good file of weights, for a model that has none."""
    packed = io.BytesIO()
    with h5py.File(packed, "w") as file:
        file.create_group("layers")
    return packed.getvalue()


def legacy(config: dict[str, Any]) -> bytes:
    """A model in HDF5, where Keras' safe mode was not looked at (CVE-2025-9905)."""
    packed = io.BytesIO()
    with h5py.File(packed, "w") as file:
        file.attrs["model_config"] = json.dumps(config)
        file.attrs["keras_version"] = "3.0.0"
        file.create_group("model_weights")
    return packed.getvalue()


def tar(*entries: tuple[str, bytes, bytes, str]) -> bytes:
    """A SavedModel as we pack it: entries are (name, type, data, target of a link)."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:") as archive:
        for name, kind, data, target in entries:
            entry = tarfile.TarInfo(name)
            entry.type, entry.size, entry.linkname = kind, len(data), target
            archive.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


def lying(data: bytes, said: int) -> bytes:
    """The zip, whose headers say that its largest entry is smaller."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        largest = max(archive.infolist(), key=lambda one: one.file_size)
    return data.replace(largest.file_size.to_bytes(4, "little"), said.to_bytes(4, "little"))


FILE = tarfile.REGTYPE
GRAPH = ("saved_model.pb", FILE, b"", "")
Make = Callable[[Path], bytes]
MODELS: dict[str, tuple[str, Make]] = {
    "Lambda": ("keras", lambda marker: keras(with_lambda(marker))),
    "Lambda in HDF5": ("h5", lambda marker: legacy(with_lambda(marker))),
    "os.system": ("keras", lambda marker: keras(with_function("os", "system"), weights())),
    "a file that is opened": ("keras", lambda marker: keras(with_function("builtins", "open"), weights())),
    "os.system in HDF5": ("h5", lambda marker: legacy(with_function("os", "system"))),
    "subprocess": ("keras", lambda marker: keras(with_class("subprocess", "Popen", "touch", str(marker)), weights())),
    "exec": ("keras", lambda marker: keras(with_class("builtins", "exec", f"open({str(marker)!r}, 'w')"), weights())),
    **{
        f"pickle as {kind}": (kind, lambda marker: pickle.dumps(Evil(f"touch {marker}")))
        for kind in ("keras", "h5", "savedmodel", "tflite")
    },
    "pickled weights": (
        "keras", lambda marker: keras(sequential(), pickle.dumps(Evil(f"touch {marker}")))
    ),
    "a path that climbs": ("keras", lambda marker: keras(sequential(), weights(), **{f"{'../' * 12}{marker}": b"x", f"assets/{'../' * 12}{marker}": b"x"})),
    "an absolute path": ("keras", lambda marker: keras(sequential(), weights(), **{str(marker): b"x"})),
    "a bomb": ("keras", lambda marker: keras(sequential(), bytes(BOMB_BYTES))),
    "a bomb that lies": ("keras", lambda marker: lying(keras(sequential(), bytes(BOMB_BYTES)), 1000)),
    "a tar that climbs": ("savedmodel", lambda marker: tar(GRAPH, (f"{'../' * 12}{marker}", FILE, b"x", ""))),
    "a tar with an absolute path": ("savedmodel", lambda marker: tar(GRAPH, (str(marker), FILE, b"x", ""))),
    "a link": ("savedmodel", lambda marker: tar(GRAPH, ("assets", tarfile.SYMTYPE, b"", str(marker.parent)), ("assets/harmed", FILE, b"x", ""))),
    "a graph that is a link": ("savedmodel", lambda marker: tar(("saved_model.pb", tarfile.SYMTYPE, b"", "/etc/passwd"))),
    "a hard link": ("savedmodel", lambda marker: tar(GRAPH, ("x", tarfile.LNKTYPE, b"", "/etc/passwd"))),
    "a device": ("savedmodel", lambda marker: tar(GRAPH, ("x", tarfile.CHRTYPE, b"", ""))),
    "a pipe": ("savedmodel", lambda marker: tar(GRAPH, ("x", tarfile.FIFOTYPE, b"", ""))),
    "nonsense": ("tflite", lambda marker: bytes(range(256)) * 40),
}  # fmt: skip


@pytest.mark.tensorflow
async def test_models_made_to_harm_are_refused_and_the_node_goes_on(home: Attacked, tmp_path: Path) -> None:
    marker = tmp_path / "harmed"
    node = psutil.Process(home.cluster.nodes[0].pid)
    jobs: dict[str, str] = {}

    def ask(question: dict[str, Any]) -> dict[str, Any]:
        status, answer = home.ask("carl", "/v1/control", question)
        assert status == 200, answer
        return dict(answer)

    def deploy(number: int, what: str) -> None:
        kind, make = MODELS[what]
        data = make(marker)
        sha256, name = hashlib.sha256(data).hexdigest(), f"evil-{number}"
        assert home.ask("carl", f"/blobs/{sha256}", data, method="PUT")[0] in (200, 201)
        ask({"type": "RegisterModel", "name": name, "model": {"sha256": sha256, "size": len(data)}, "format": kind})
        jobs[what] = ask({"type": "SubmitJob", "job": {"kind": "deploy", "model": f"{name}:1"}})["job_id"]

    def over(what: str) -> dict[str, Any] | None:
        found = ask({"type": "GetJob", "job_id": jobs[what]})
        return found if found["type"] == "JobEnded" else None

    for number, what in enumerate(MODELS):
        await asyncio.to_thread(deploy, number, what)
    for what in MODELS:
        ended = await eventually(lambda what=what: over(what), SECONDS)  # type: ignore[misc]
        assert ended is not None
        assert ended["state"] == "failed", (what, ended)
        assert ended["error"]["code"] in ("code_not_allowed", "invalid_model"), (what, ended)
    assert not marker.exists()
    # the node has fetched them: other nodes get them from there, and no client does, not even who has sent them
    sha256 = hashlib.sha256(MODELS["nonsense"][1](marker)).hexdigest()
    for who, status in (("mallory", 200), ("carl", 404), ("bob", 404), ("eve", 403)):
        assert attackers.ask(home.node_port, f"/blobs/{sha256}", home.tls(who))[0] == status, who
    assert node.is_running()
    assert home.states["node-1"] == "online"
