"""The command line: `potluck COMMAND`. Commands do their heavy imports inside, so that help is quick."""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec
from typing import Annotated

import typer

from potluck.cli import completion, interrupts
from potluck.cli.clients import clients
from potluck.cli.config import config
from potluck.cli.data import data
from potluck.cli.evaluate import evaluate
from potluck.cli.events import events
from potluck.cli.files import files
from potluck.cli.infer import infer
from potluck.cli.jobs import cancel, job, jobs, stop
from potluck.cli.join import join
from potluck.cli.models import deploy, deployments, promote, rollback, undeploy
from potluck.cli.nodes import nodes
from potluck.cli.predict import predict
from potluck.cli.registry import models
from potluck.cli.service import service
from potluck.cli.session import Session, begin, global_options_first
from potluck.cli.status import status
from potluck.cli.suggesting import Command, CommandGroup
from potluck.cli.tokens import token
from potluck.cli.train import train
from potluck.cli.up import up
from potluck.errors import PotluckError

app = typer.Typer(
    name="potluck",
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Machines on a network train, deploy and serve Keras models together.",
    epilog="--seed, --cluster, --timeout, --credentials, --verbose and --debug may stand before or after the command.",
)
for command in (
    up, join, status, events, train, evaluate, predict, jobs, job, stop, cancel, deploy, promote, rollback, undeploy, deployments,
    infer, files,
):  # fmt: skip
    app.command(cls=Command)(command)
app.add_typer(nodes, name="nodes")
app.add_typer(clients, name="clients")
app.add_typer(token, name="token")
app.add_typer(models, name="models")
app.add_typer(data, name="data")
app.add_typer(config, name="config")
app.add_typer(service, name="service")


def _version(asked: bool) -> None:
    if asked:
        from potluck import __version__

        typer.echo(f"potluck {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    seed: Annotated[
        str | None, typer.Option(metavar="HOST[:PORT]", help="The cluster's broker (default: found by mDNS).")
    ] = None,
    cluster: Annotated[str | None, typer.Option(metavar="NAME", help="The cluster's name (default: default).")] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0.1, metavar="SECONDS", help="How long to wait for an answer (default: 30).")
    ] = None,
    credentials: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Credentials of a closed cluster (default: where `potluck join` put them); none: the cluster is open.",
        ),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say more: what a training strategy computes and does.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Log what happens, and show where an error came from.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    begin(context, Session(seed, cluster, timeout, verbose, debug, credentials))
    if debug:
        from potluck import logs

        logs.configure("DEBUG")
    else:
        logging.getLogger("potluck").setLevel(logging.ERROR)  # an error is shown as one sentence instead
        for data in ("sources", "files"):  # they log which items of a user's data are left out
            logging.getLogger(f"potluck.client.{data}").setLevel(logging.WARNING)


def main() -> None:
    """Run the command line. Exit codes are those of `potluck.errors`; 130 after Ctrl-C."""
    interrupts.once()
    arguments = global_options_first(sys.argv[1:])
    _add_demo(arguments)
    try:
        completion.run(lambda: app(arguments, prog_name="potluck"))
    except PotluckError as error:
        if "--debug" in arguments:
            raise
        from potluck.cli.output import error_line

        sys.stderr.write(error_line(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(interrupts.STATUS)


def _add_demo(arguments: list[str]) -> None:
    """Load the demo only when it is asked for: it imports much."""
    if find_spec("potluck.cli.demo") is None:
        return
    if "demo" in arguments:
        from potluck.cli.demo import demo

        app.command(cls=Command)(demo)
        return

    @app.command("demo")
    def stub() -> None:
        """Try potluck on this machine: discover, train, survive a kill, evaluate, deploy, ask."""


if __name__ == "__main__":
    main()
