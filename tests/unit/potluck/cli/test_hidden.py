"""A token is on the command line of `potluck join`, which goes on as the machine's node."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from potluck.cli.hidden import hide

TOKEN = "POTLUCK-1-ABC-DEF"
PROGRAM = """
import sys
from pathlib import Path
from potluck.cli.hidden import hide
print(hide(sys.argv[2]), sys.argv[2], Path("/proc/self/cmdline").read_bytes())
"""


def test_it_is_in_no_list_of_processes() -> None:
    if not Path("/proc/self/cmdline").exists():
        pytest.skip("this system has no /proc: the token stays on the command line")
    command = [sys.executable, "-c", PROGRAM, "join", TOKEN, "--data", "a=b"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    assert said.startswith(f"True {TOKEN} ")
    stars = "*" * len(TOKEN)
    assert said.rstrip().endswith(f"\\x00join\\x00{stars}\\x00--data\\x00a=b\\x00'")


def test_what_is_not_there_is_left_alone() -> None:
    assert not hide("no such argument of this process")
    assert not hide("")
    assert not hide("-")
