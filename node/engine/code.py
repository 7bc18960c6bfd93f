"""Code of users: what the node's configuration (`allow_code`) lets its engine run, and how other code is refused."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import Any

import keras

from potluck.errors import CodeNotAllowed, PotluckError
from potluck.settings import LAMBDA

_OWN = re.compile(r"Could not locate (class|function) '([^']*)'")
_FILES = re.compile(
    "Requested the loading of a vocabulary file|deserialization of a `TFSMLayer`|Not allowed: H5 file with (external|External|Soft|virtual)"
)

_allowed: tuple[str, ...] = ()


def allow(names: Sequence[str]) -> None:
    """Import modules, so that Keras knows what they register. `lambda` is not a module: it allows Lambda layers.

    Ends the process with a text for the log if a module cannot be imported.
    """
    global _allowed  # one engine, one configuration
    for name in names:
        if name == LAMBDA:
            continue
        try:
            importlib.import_module(name)
        except Exception as error:
            raise SystemExit(
                f"allow_code names the module {name!r}, which cannot be imported: {type(error).__name__}: {error}: "
                "install it in potluck's environment, or take it out of allow_code"
            ) from error
    _allowed = tuple(names)


def safe_mode() -> bool:
    """Whether Keras must refuse code inside a model's file."""
    return LAMBDA not in _allowed


def runs_users() -> bool:
    """Whether models may have layers that are not Keras's own."""
    return bool(_allowed)


def refusal(text: str) -> PotluckError | None:
    """The refusal of a model, from the text of the error that Keras raised when loading it; None: code is not the reason."""
    if safe_mode() and "Lambda" in text and ("lambda" in text or "unsafe" in text.lower()):
        return CodeNotAllowed(
            "the model holds a Lambda layer, which is code, and this node does not allow that: use keras.ops or other layers, or "
            f'let nodes run any code that models bring ("{LAMBDA}" in allow_code of their configuration)'
        )
    if _FILES.search(text):
        return CodeNotAllowed(
            "the model names files of the machine it runs on (a vocabulary, a SavedModel, or weights beside the model's own file), and "
            "nodes do not allow that: give layers their vocabulary as a list, and save the model with model.save('name.keras')"
        )
    own = _OWN.search(text)
    if own is None:
        return None
    modules = ", ".join(name for name in _allowed if name != LAMBDA)
    return CodeNotAllowed(
        f"the model has a {own[1]} of its own, '{own[2]}', which this node does not know (its allow_code is {modules or 'empty'}): "
        "decorate it with @keras.saving.register_keras_serializable() in a module, install that on the nodes, and name it in "
        "allow_code of their configuration; or build the model of Keras's own layers, losses and metrics"
    )


def describe(model: Any) -> None:
    """Give a loaded subclassed model the `inputs` and `outputs` of a Functional one, from the shapes that it was built with.

    Does nothing if these are not known.
    """
    if getattr(model, "inputs", None) or not isinstance(model, keras.Model):
        return
    shapes = (model.get_build_config() or {}).get("input_shape")
    struct = _tensors(shapes)
    if struct is None:
        return
    outputs = model(struct)
    # Not by setattr: Keras would track them as parts of the model.
    vars(model).update(
        inputs=keras.tree.flatten(struct),
        outputs=keras.tree.flatten(outputs),
        _inputs_struct=struct,
        _outputs_struct=outputs,
    )


def _tensors(shapes: Any, name: str = "input") -> Any:
    """Symbolic inputs in the same structure as the shapes; None: these are not shapes.

    Inputs of a map are named by its keys, those of a list `input_0`, `input_1`, ...
    """
    if isinstance(shapes, dict):
        found = {key: _tensors(shape, str(key)) for key, shape in shapes.items()}
        return None if None in found.values() else found
    if not isinstance(shapes, list | tuple) or not shapes:
        return None
    if isinstance(shapes[0], list | tuple):
        several = [_tensors(shape, f"{name}_{place}") for place, shape in enumerate(shapes)]
        return None if None in several else several
    return keras.Input(tuple(shapes[1:]), name=name)
