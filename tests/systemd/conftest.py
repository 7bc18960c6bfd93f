"""Machines that systemd boots. Where none can be booted, these tests are skipped, each with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.booted import Machine, build_wheel, packages, why_not

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session", autouse=True)
def bootable() -> None:
    if reason := why_not():
        pytest.skip(f"no machine can be booted here: {reason}")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def machine(bootable: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    made = Machine(tmp_path_factory.mktemp("machine"), shown=packages())
    try:
        made.boot()
        yield made
    finally:
        made.shut_down()
