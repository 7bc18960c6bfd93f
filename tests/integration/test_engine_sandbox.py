"""The engine's sandbox around real models: what they need works, and what they must not reach they do not reach."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from msgspec.structs import replace

from node.engine.process import Engine
from node.engine.watch import Limits
from node.sandbox import landlock
from node.sandbox.policy import Confinement
from potluck.errors import EngineFailed
from potluck.wire.reports import RequestOutcome
from potluck.wire.tasks import ConvertTask
from potluck.wire.tensors import from_numpy, to_numpy
from potluck.wire.values import Tensor
from support.allowing import X, Y, dense, own_code
from support.engine_lab import Lab, engine_lab, evaluation, prediction, training
from support.models import ARRAYS, converted, exported, saved, whole

pytestmark = [
    pytest.mark.tensorflow,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(landlock.abi() < landlock.ABI_SCOPES, reason="needs Landlock of Linux 6.12"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    """An engine that runs whatever a model brings: only the sandbox holds."""
    with own_code():
        async with engine_lab(tmp_path_factory.mktemp("engine"), ["own_code", "lambda"], sandbox="required") as lab:
            yield lab


async def answer(lab: Lab, path: Path, model_format: Any, *inputs: Tensor) -> RequestOutcome:
    """What a model says to these inputs, which get the names of its own."""
    signature, _, _ = await lab.engine.load_model("r", path, model_format)
    request = tuple(replace(one, name=spec.name) for one, spec in zip(inputs, signature.inputs, strict=True))
    try:
        [outcome], _ = await lab.engine.infer("r", [request])
    finally:
        await lab.engine.unload_model("r")
    return outcome


async def test_an_engine_says_what_it_is_kept_from(tmp_path: Path) -> None:
    for asked, held in (
        (Confinement(mode="required"), ("files", "calls", "network")),
        (Confinement(mode="required", network=True), ("files", "calls")),
        (Confinement(mode="off"), ()),
    ):
        engine = Engine(tmp_path / "scratch", threads=1, limits=Limits(60, 20), confinement=asked)
        info = await engine.start()
        await engine.stop()
        assert (info.sandbox, info.unconfined) == (held, ())


async def test_it_trains_evaluates_and_predicts_with_code_of_the_owner(lab: Lab) -> None:
    import own_code as own

    blob, data = lab.files.model(dense(own.Scale())), lab.files.arrays(1, x=X, y=Y)
    result = await lab.run(training(blob, data))
    scored = await lab.run(evaluation(blob, whole(data), weights=lab.after(result)))
    assert scored.count == len(X)
    assert (await lab.run(prediction(blob, whole(data)))).count == len(X)


async def test_it_compiles_and_converts_and_runs_litert(lab: Lab, tmp_path: Path) -> None:
    import tensorflow as tf

    compiled = tf.function(lambda x: {"y": x * x + 1}, jit_compile=True)
    folder = saved(tmp_path / "xla", compiled, tf.TensorSpec((None, 2), tf.float32, name="x"))
    ones = np.ones((1, 2), np.float32)
    found = await answer(
        lab, lab.files.paths[lab.files.saved_model(folder).sha256], "savedmodel", from_numpy("x", ones)
    )
    np.testing.assert_allclose(to_numpy(found.outputs[0]), ones * 2)
    lite = lab.files.put(converted(exported(tmp_path / "m", dense())))
    found = await answer(lab, lab.files.paths[lite.sha256], "tflite", from_numpy("x", X[:1]))
    assert to_numpy(found.outputs[0]).shape == (1, 1)
    task = ConvertTask(
        model=lab.files.model(dense()), slices=whole(lab.files.arrays(1, x=X, y=Y)), format=ARRAYS, image=None
    )
    made = await lab.run(task)
    assert (lab.scratch / made.model.sha256).stat().st_size == made.model.size


async def test_a_graph_reads_and_writes_no_files_of_the_machine(lab: Lab, tmp_path: Path) -> None:
    import tensorflow as tf

    # An engine tries a model with empty inputs when it loads it.
    def each(x: Any, do: Any) -> Any:
        return {"y": tf.map_fn(lambda path: tf.cond(tf.equal(path, ""), lambda: path, lambda: do(path)), x)}

    def reads(x: Any) -> Any:
        return each(x, tf.io.read_file)

    def writes(x: Any) -> Any:
        def write(path: Any) -> Any:
            tf.io.write_file(path, "x")
            return path

        return each(x, write)

    (tmp_path / "secret").write_text("secret")
    spec = tf.TensorSpec((None,), tf.string, name="x")
    for name, function, path in (
        ("reads", reads, "/etc/passwd"),
        ("reads", reads, str(tmp_path / "secret")),
        ("writes", writes, str(tmp_path / "written")),
    ):
        ref = lab.files.saved_model(saved(tmp_path / name, function, spec))
        given = Tensor(name="x", datatype="BYTES", shape=(1,), data=[path.encode()])
        outcome = await answer(lab, lab.files.paths[ref.sha256], "savedmodel", given)
        assert outcome.error is not None, name
        assert "Permission denied" in outcome.error.message
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("mode", ["auto", "required"])
async def test_an_engine_on_a_kernel_that_has_nothing(
    mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so, or does not start."""
    (tmp_path / "sitecustomize.py").write_text(
        "from node.sandbox import landlock, namespace, seccomp\n"
        "def refuse(): raise OSError(1, 'Operation not permitted')\n"
        "landlock.abi = lambda: 0\nnamespace.leave_network = refuse\nseccomp.known = lambda machine: False\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path.cwd()}")
    engine = Engine(tmp_path / "scratch", threads=1, limits=Limits(60, 20), confinement=Confinement(mode=mode))
    if mode == "required":
        with pytest.raises(
            EngineFailed, match=r"the sandbox is required, but this machine cannot keep engines from files \("
        ):
            await engine.start()
        return
    info = await engine.start()
    await engine.stop()
    assert info.sandbox == ()
    assert [one.partition(" ")[0] for one in info.unconfined] == ["files", "calls", "network"]
