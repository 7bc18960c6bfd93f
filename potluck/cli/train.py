"""`potluck train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from potluck.cli import completion
from potluck.cli.session import ImageSize, Json, check_output, image_size, same_cluster, session


def train(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(help="A compiled .keras file, or a registered model.", autocompletion=completion.model_files),
    ],
    data: Annotated[
        str,
        typer.Argument(
            help="A folder of images, .txt or .wav files, an .npz, .csv, .parquet or TFRecord file, a registered data set, or node:NAME.",
            autocompletion=completion.data,
        ),
    ],
    validation: Annotated[
        str | None, typer.Option(help="Data to measure the model on after each epoch.", autocompletion=completion.data)
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data by the whole cluster.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in a step, on each node.")] = 32,
    image: ImageSize = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="The label's column or array, for tables and .npz. Repeat it for more outputs."),
    ] = None,
    sample_weight: Annotated[str | None, typer.Option(help="The column or array with the weight of each item.")] = None,
    name: Annotated[str | None, typer.Option(help="Register the result under this name.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Save the result as this .keras file.")] = None,
    strategy: Annotated[
        str,
        typer.Option(
            help="local: each node by itself, in rounds; sync: every step together; auto: chosen by measured speed and bandwidth.",
            autocompletion=completion.words("auto", "local", "sync"),
        ),
    ] = "auto",
    round_seconds: Annotated[
        float,
        typer.Option(min=0.0, help="Seconds of computing between two exchanges; 0: as measured bandwidth suggests."),
    ] = 0.0,
    monitor: Annotated[
        str,
        typer.Option(
            help="Keep the epoch with the best value of this metric; auto: val_loss, with validation data; none: keep the last.",
            autocompletion=completion.words("auto", "none", "loss", "accuracy", "val_loss", "val_accuracy"),
        ),
    ] = "auto",
    monitor_mode: Annotated[
        str,
        typer.Option(
            help="Whether a smaller (min) or larger (max) --monitor is better; auto: by its name.",
            autocompletion=completion.words("auto", "min", "max"),
        ),
    ] = "auto",
    patience: Annotated[
        int | None, typer.Option(min=1, help="End after this many epochs in a row without a better --monitor.")
    ] = None,
    class_weight: Annotated[
        list[str] | None,
        typer.Option(metavar="CLASS=WEIGHT", help="Weight of a class in the loss. Repeat it for more classes."),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="JOB",
            help="Continue this ended job from where it stopped, to --epochs in all.",
            autocompletion=completion.jobs,
        ),
    ] = None,
    compression: Annotated[
        str,
        typer.Option(
            help="How updates are compressed for the network: auto, none, int8 or int4.",
            autocompletion=completion.words("auto", "none", "int8", "int4"),
        ),
    ] = "auto",
    deterministic: Annotated[
        bool,
        typer.Option("--deterministic", help="The same nodes give exactly the same result again; no time budgets."),
    ] = False,
    l2_norm_clip: Annotated[
        float | None,
        typer.Option(min=0.0, help="With node:NAME: clip each example's gradient to this norm (DP-SGD)."),
    ] = None,
    noise_multiplier: Annotated[
        float | None,
        typer.Option(min=0.0, help="Add noise, as a multiple of --l2-norm-clip; each epoch then shows its epsilon."),
    ] = None,
    private_unit: Annotated[
        str | None,
        typer.Option(
            help="What to hide: each example (default), or each node (its update is clipped instead).",
            autocompletion=completion.words("example", "node"),
        ),
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option(help="The delta of (epsilon, delta): choose it well below 1 / examples (default 1e-5)."),
    ] = None,
    seed_number: Annotated[int, typer.Option("--random-seed", help="Seed for shuffling and initial state.")] = 0,
    deploy: Annotated[
        str | None,
        typer.Option(metavar="N|all|MIN..MAX", help="Deploy the result on this many nodes; needs --name."),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Print the job's id and exit; the job goes on.")] = False,
    as_json: Json = False,
) -> None:
    """Train a Keras model on all nodes."""
    from potluck.cli import curl, following
    from potluck.cli import output as out
    from potluck.cli.listing import Line
    from potluck.client import deploying
    from potluck.errors import InvalidRequest
    from potluck.wording import counted

    if output is not None:
        if detach:
            raise InvalidRequest(
                "--output needs the end of the job, and --detach does not wait for it: leave one of them out"
            )
        check_output(output)
        check_keras(output)
    if deploy is not None:
        deploying.fields(deploy, {})
        if name is None or detach:
            why = (
                "needs the end of the job, and --detach does not wait for it: leave one of them out"
                if detach
                else "needs --name: the deployed model is asked by its name"
            )
            raise InvalidRequest(f"--deploy {why}")
    size = image_size(image)
    given = {
        "l2_norm_clip": l2_norm_clip,
        "noise_multiplier": noise_multiplier,
        "private_unit": private_unit,
        "delta": delta,
    }
    hiding: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    with session(context).client() as client:
        with following.waiting("packing and sending the data", quiet=as_json):
            job = client.train(
                model,
                data,
                validation=validation,
                epochs=epochs,
                batch_size=batch_size,
                image=size,
                name=name,
                target=target or None,
                sample_weight=sample_weight,
                strategy=strategy,  # type: ignore[arg-type]  # checked by the client
                round_seconds=round_seconds,
                seed=seed_number,
                monitor=None if monitor == "none" else monitor,
                monitor_mode=monitor_mode,  # type: ignore[arg-type]  # checked by the client
                patience=patience,
                class_weight=class_weights(class_weight or []),
                resume=resume,
                compression=compression,  # type: ignore[arg-type]  # checked by the client
                deterministic=deterministic,
                **hiding,
            )
        if not as_json:
            following.name_data(job, data, validation)
        if detach:
            if as_json:
                out.emit({"job_id": job.id})
            else:
                out.show(job.id)
            return
        ended = following.ended(job, as_json, verbose=session(context).verbose)
        if output is not None:
            job.model(output)
        if as_json:
            out.emit(ended)
            if deploy is not None:
                following.ended(client.deploy(ended.registered, deploy), as_json)
            return
        last = ended.history[-1].metrics if ended.history else {}
        took = out.seconds_text(ended.ended_at - ended.started_at)
        out.show(Line(f"trained {counted(len(ended.history), 'epoch')} in {took}:  {out.metrics_text(last)}"))
        if ended.registered:
            out.show(f"registered as {ended.registered}")
        if output is not None:
            out.show(f"saved as {output}")
        elif not ended.registered:
            saves = same_cluster(f"potluck job {job.id} --output FILE.keras")
            out.show(f"the model is job {job.id}'s result: `{saves}` saves it")
        if deploy is not None:  # last: the model is safe even if this fails
            following.ended(client.deploy(ended.registered, deploy), as_json, verbose=session(context).verbose)
            out.show(f"deployed {ended.registered}: `{same_cluster(f'potluck infer {name} INPUT')}` asks it")
            for line in curl.lines(client, ended.registered):
                out.show(line)


def check_keras(path: Path) -> None:
    """Raises InvalidRequest for another suffix: loaders choose the format by the suffix, and could not open the model."""
    from potluck.errors import InvalidRequest

    if path.suffix != ".keras":
        raise InvalidRequest(f"--output {path}: the result is a .keras file; name it {path.with_suffix('.keras')}")


def class_weights(texts: list[str]) -> dict[str, float]:
    """A map from `cat=2.5` texts. Raises InvalidRequest."""
    from potluck.errors import InvalidRequest

    found: dict[str, float] = {}
    for text in texts:
        label, _, weight = text.rpartition("=")
        try:
            found[label] = float(weight)
        except ValueError:
            label = ""
        if not label:
            raise InvalidRequest(f"--class-weight {text!r}: write CLASS=WEIGHT, as in cat=2.5")
    return found
