"""Helps people call the clients' methods: whole signatures for `help`, and a suggestion for an unknown argument."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from potluck.errors import InvalidRequest

ELSEWHERE = {
    ("train", "deploy"): "give a name, and client.deploy(job.registered) deploys the result",
    ("train", "output"): "job.model(path) saves the result",
    ("train", "detach"): "it returns at once, and job.wait() waits",
    ("predict", "output"): "job.predictions has the arrays",
}
"""Options that the command line has, but a method has not; and what to use instead."""

C = TypeVar("C", bound=type)
F = TypeVar("F", bound=Callable[..., Any])


class UnexpectedArgument(InvalidRequest, TypeError):
    """An unknown keyword argument. It is also a TypeError, as Python raises for one."""


class _Hint(str):
    """An annotation that `help` shows as it is written."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def with_options(options: type, defaults: Mapping[str, object]) -> Callable[[F], F]:
    """For a method with `**options` of a TypedDict: its signature then names each option, its docstring describes each."""

    def told(method: F) -> F:
        whole = inspect.signature(method)
        named = [one for one in whole.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        named += [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=defaults.get(name), annotation=hint.__forward_arg__
            )
            for name, hint in options.__annotations__.items()
        ]
        method.__signature__ = whole.replace(parameters=named)  # type: ignore[attr-defined]
        method.__doc__ = f"{inspect.cleandoc(method.__doc__ or '')}\n\n{inspect.cleandoc(options.__doc__ or '')}"
        return method

    return told


def told_by(other: Callable[..., Any]) -> Callable[[F], F]:
    """For a method that does the same as another: it gets the other's docstring and signature."""

    def told(method: F) -> F:
        method.__doc__ = other.__doc__
        mine, whole = inspect.signature(method), inspect.signature(other)
        method.__signature__ = whole.replace(return_annotation=mine.return_annotation)  # type: ignore[attr-defined]
        return method

    return told


def suggesting(kind: C) -> C:
    """Decorate a class: its public methods refuse an unknown keyword, and suggest the one that was meant."""
    for name, method in list(vars(kind).items()):
        if inspect.isfunction(method) and not name.startswith("_"):
            setattr(kind, name, _checked(method))
    return kind


def _checked(method: Callable[..., Any]) -> Callable[..., Any]:
    signature = _readable(inspect.signature(method))
    takes = [one.name for one in signature.parameters.values() if one.kind is not inspect.Parameter.POSITIONAL_ONLY][1:]
    known = frozenset(takes)

    def check(given: Mapping[str, object]) -> None:
        for unknown in given.keys() - known:
            near = difflib.get_close_matches(unknown, takes, n=1)
            meant = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(takes) or 'none'}"
            meant = ELSEWHERE.get((method.__name__, unknown), meant)
            raise UnexpectedArgument(f"{method.__name__}() got an unexpected keyword argument {unknown!r}: {meant}")

    if inspect.iscoroutinefunction(method):

        @functools.wraps(method)
        async def call(*args: Any, **kwargs: Any) -> Any:
            check(kwargs)
            return await method(*args, **kwargs)

    else:

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            check(kwargs)
            return method(*args, **kwargs)

    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


def _readable(signature: inspect.Signature) -> inspect.Signature:
    """The same signature, with annotations as the source writes them."""

    def hint(annotation: Any) -> Any:
        return _Hint(annotation) if isinstance(annotation, str) else annotation

    return signature.replace(
        parameters=[one.replace(annotation=hint(one.annotation)) for one in signature.parameters.values()],
        return_annotation=hint(signature.return_annotation),
    )
