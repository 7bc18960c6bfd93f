"""What the Python API tells about itself: `dir`, `help`, and a suggestion for a name that does not exist."""

from __future__ import annotations

import inspect
import pydoc
from typing import Any

import pytest

import potluck
from potluck.client.deploying import DeployOptions
from potluck.client.training import TrainOptions
from potluck.errors import InvalidRequest


def test_the_package_says_what_is_in_it() -> None:
    assert {"Client", "AsyncClient", "Job", "AsyncJob", "errors", "__version__"} <= set(dir(potluck))
    assert not [name for name in dir(potluck) if name.startswith("_") and not name.startswith("__")]
    for name in potluck.__all__:
        assert getattr(potluck, name) is not None
    with pytest.raises(AttributeError, match="'potluck' has no attribute 'Clint'"):
        potluck.Clint  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("client", [potluck.Client, potluck.AsyncClient])
@pytest.mark.parametrize(("method", "options"), [("train", TrainOptions), ("deploy", DeployOptions)])
def test_help_shows_every_option_with_type_default_and_meaning(client: Any, method: str, options: type) -> None:
    told = pydoc.plain(pydoc.render_doc(getattr(client, method)))
    head = told[: told.index("->")]
    for name, hint in options.__annotations__.items():
        assert f" {name}: {hint.__forward_arg__} = " in head, name
        assert f"`{name}" in told[len(head) :], name
    assert "options" not in head
    assert head.strip().split("\n")[-1].startswith(f"{'async ' if client is potluck.AsyncClient else ''}{method}(")


def test_both_clients_take_the_same() -> None:
    for name, method in inspect.getmembers(potluck.Client, inspect.isfunction):
        other = getattr(potluck.AsyncClient, name, None)
        if not name.startswith("_") and other is not None:
            assert inspect.signature(method).parameters == inspect.signature(other).parameters, name
            assert method.__doc__, name
            assert inspect.iscoroutinefunction(other), "to whoever asks it still is one"


@pytest.mark.parametrize(
    ("method", "given", "meant"),
    [
        (potluck.Client.train, "epoch", "'epochs'"),
        (potluck.Client.train, "validation_data", "'validation'"),
        (potluck.Client.train, "stratgy", "'strategy'"),
        (potluck.Client.deploy, "replica", "'replicas'"),
        (potluck.Client.evaluate, "batchsize", "'batch_size'"),
        (potluck.Client.add_data, "sampleweight", "'sample_weight'"),
        (potluck.Job.wait, "time_out", "'timeout'"),
    ],
)
def test_a_name_that_is_near_is_what_was_meant(method: Any, given: str, meant: str) -> None:
    said = rf"{method.__name__}\(\) got an unexpected keyword argument '{given}': did you mean {meant}\?"
    for kind in (TypeError, InvalidRequest):
        with pytest.raises(kind, match=said):
            method(None, **{given: 1})


def test_an_option_of_the_command_line_is_said_to_be_elsewhere() -> None:
    for name, said in (
        ("deploy", r"give a name, and client\.deploy\(job\.registered\)"),
        ("output", r"job\.model\(path\)"),
    ):
        with pytest.raises(InvalidRequest, match=rf"unexpected keyword argument '{name}': {said}"):
            potluck.Client.train(None, "m", "d", **{name: 1})  # type: ignore


def test_where_none_is_near_all_are_named() -> None:
    with pytest.raises(TypeError, match=r"nodes\(\) got an unexpected keyword argument 'colour': it takes none"):
        potluck.Client.nodes(None, colour=1)  # type: ignore
    with pytest.raises(TypeError, match=r"'xyz': it takes model, inputs, .*timeout, priority"):
        potluck.Client.infer(None, xyz=1)  # type: ignore


async def test_it_is_the_same_for_asyncio() -> None:
    with pytest.raises(TypeError, match="did you mean 'epochs'"):
        await potluck.AsyncClient.train(None, "m", "d", epoch=1)  # type: ignore
