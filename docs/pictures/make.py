"""The pictures of the README, made from the real program: `potluck demo` and `potluck nodes` as they show on a terminal.

    .venv/bin/python docs/pictures/make.py

runs both here, and writes an SVG of each beside this file. Nothing is loaded from elsewhere when one looks at them.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from potluck.local_cluster import LocalCluster

HERE = Path(__file__).parent
POTLUCK = shutil.which("potluck", path=str(Path(sys.executable).parent)) or "potluck"
COLUMNS = 100
PASSING = re.compile("[\u2801-\u28ff\u2501\u2578\u257a]")
"""Of what turns or grows while one waits: on a terminal it is gone in the end."""
FONT = re.compile(r"@font-face \{[^}]*\}\s*", re.DOTALL)


def said(*arguments: str, **environment: str) -> str:
    """What a command writes to a terminal of COLUMNS columns that can show colours, and is no terminal to draw on."""
    quiet = {key: value for key, value in os.environ.items() if not key.startswith("POTLUCK_")}
    colours = {"FORCE_COLOR": "1", "COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
    done = subprocess.run(
        [POTLUCK, *arguments], env=quiet | colours | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True,
    )  # fmt: skip
    lines = done.stdout.decode().rstrip().splitlines()
    return "\n".join(line for line in lines if not PASSING.search(line))


def picture(name: str, command: str, output: str) -> None:
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
    console.print(Text.from_ansi(output))
    drawn = console.export_svg(title=command, theme=MONOKAI, unique_id=name)
    # Rich has the letters from elsewhere: whoever looks at a README tells nobody.
    (HERE / f"{name}.svg").write_text(FONT.sub("", drawn).replace("Fira Code", "ui-monospace, Menlo, Consolas"))


def main() -> None:
    picture("demo", "potluck demo", said("demo"))
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(Path(folder), cluster="picture", nodes=3, discovery=False) as cluster,
    ):
        seed = f"{cluster.broker_host}:{cluster.broker_port}"
        picture("nodes", "potluck nodes", said("nodes", POTLUCK_SEEDS=seed, POTLUCK_CLUSTER="picture"))


if __name__ == "__main__":
    main()
