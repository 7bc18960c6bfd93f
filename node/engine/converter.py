"""The converter's process: `python -m node.engine.converter SAVEDMODEL SIGNATURE ITEMS TARGET NAME...`, started by `converting.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from node.engine.array_runtimes import left_out
from node.engine.wording import one_line

REFUSED = 3
"""Exit status of a conversion that is not possible and says why."""


def main() -> None:
    with left_out("matplotlib", "pandas", "sklearn"):
        import tensorflow as tf

    saved, signature, items, target, *names = sys.argv[1:]
    with np.load(items) as stored:
        columns = [stored[f"arr_{place}"] for place in range(len(names))]
    converter = tf.lite.TFLiteConverter.from_saved_model(saved, signature_keys=[signature])
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: (
        {name: column[row : row + 1] for name, column in zip(names, columns, strict=True)}
        for row in range(len(columns[0]))
    )
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8, tf.lite.OpsSet.TFLITE_BUILTINS]
    try:
        made = converter.convert()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is why
        sys.stdout.write(_reason(error))
        sys.stdout.flush()
        sys.exit(REFUSED)
    Path(target).write_bytes(made)


def _reason(error: Exception) -> str:
    text = str(error)
    if "neither a custom op nor a flex op" in text or "custom op" in text:
        return f"it has operations that LiteRT does not have: {one_line(text, 300)}"
    return one_line(text, 400)


if __name__ == "__main__":
    main()
