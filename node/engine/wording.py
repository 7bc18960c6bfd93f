"""Makes errors of Keras and TensorFlow readable for people."""

from __future__ import annotations

import re

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


_GRAPH_ERROR = re.compile(r"^Node: '[^']*'\n(.+?)(?:\n\t ?\[\[|\Z)", re.MULTILINE | re.DOTALL)
"""In an error of a graph, the reason comes after the whole stack."""

_PLACE = re.compile(r"\{\{function_node [^}]*\}\}\s*|\s*\[\[\{\{node [^}]*\}\}\]\]|\s*\[Op:\w+\](?: name: ?\w*)?")
"""The place in TensorFlow's graph, which the author of the model has never seen."""


_USER_CODE = re.compile(r"\Ain user code:\n.*\n    File \"[^\n]*\n[^\n]*\n\n(?P<reason>.*)\Z", re.DOTALL)
"""AutoGraph's form of an error while a graph is made: places in the code, most of it ours, and below them the error itself."""


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """The text without line breaks, colours and names of TensorFlow's nodes; of an error in a TensorFlow graph, what is wrong.

    A text longer than `limit` loses its middle: the reason is at the end, or at the beginning.
    """
    text = _COLOURS.sub("", str(error))
    if (found := _USER_CODE.match(text)) is not None:
        text = found["reason"]
    if "Graph execution error" in text:
        inside = _GRAPH_ERROR.search(text)
        text = inside[1] if inside is not None else text.rstrip().rpartition("\n\n")[2]
    text = " ".join(_PLACE.sub(" ", text).split())
    if len(text) > limit:  # Keras lists the arguments of the layer after the reason
        text = text.partition(" Arguments received by ")[0]
    return text if len(text) <= limit else f"{text[: limit // 3]} ... {text[limit // 3 - limit :]}"
