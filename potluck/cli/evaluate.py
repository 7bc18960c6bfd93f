"""`potluck evaluate`."""

from __future__ import annotations

from typing import Annotated

import typer

from potluck.cli import completion
from potluck.cli.session import ImageSize, Json, image_size, session


def evaluate(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(help="A .keras file, or a registered model.", autocompletion=completion.model_files),
    ],
    data: Annotated[
        str,
        typer.Argument(
            help="A folder of images, .txt or .wav files, an .npz, .csv, .parquet or TFRecord file, a registered data set, or node:NAME.",
            autocompletion=completion.data,
        ),
    ],
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    image: ImageSize = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="The label's column or array, for tables and .npz. Repeat it for more outputs."),
    ] = None,
    sample_weight: Annotated[str | None, typer.Option(help="The column or array with the weight of each item.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a model on the nodes: accuracy, precision, recall, F1, confusion matrix."""
    from potluck.cli import following, output

    size = image_size(image)
    with session(context).client() as client:
        with following.waiting("packing and sending the data", quiet=as_json):
            job = client.evaluate(
                model, data, batch_size=batch_size, image=size, target=target or None, sample_weight=sample_weight
            )
        if not as_json:
            following.name_data(job, data)
        following.ended(job, as_json, verbose=session(context).verbose)
        evaluation = job.evaluation
    if as_json:
        output.emit(evaluation)
    else:
        output.show(output.evaluation_report(evaluation))
