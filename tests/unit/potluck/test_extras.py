"""The command that adds an extra, for each way in which potluck may have been installed."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from potluck import extras

METADATA = """\
Metadata-Version: 2.4
Name: potluck
Version: 0.1.0
Requires-Dist: aiohttp>=3.10
Requires-Dist: tensorflow-cpu>=2.18; platform_machine == "x86_64" and extra == "engine"
Requires-Dist: tensorflow>=2.18; platform_machine != "x86_64" and extra == "engine"
Requires-Dist: keras>=3.15; extra == "engine"
Requires-Dist: tensorflow[and-cuda]>=2.18; extra == "gpu"
Requires-Dist: pyarrow>=16.1; extra == "parquet"
Requires-Dist: old; (python_version < "3.12") and extra == "odd"
"""

Installed = Callable[..., Path]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installed:
    """An installation with this `direct_url.json` (None: it has none), and nothing else on the path."""

    def make(url: object, installer: str = "pip") -> Path:
        info = tmp_path / "site" / "potluck-0.1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(METADATA)
        (info / "INSTALLER").write_text(f"{installer}\n")
        if url is not None:
            (info / "direct_url.json").write_text(json.dumps(url))
        monkeypatch.setattr(sys, "path", [str(info.parent)])
        return info

    return make


PIP = [sys.executable, "-m", "pip", "install"]


@pytest.fixture(autouse=True)
def pip_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: object())


@pytest.mark.parametrize(("editable", "option"), [(True, ["--editable"]), (False, [])])
def test_a_folder(tmp_path: Path, installed: Installed, editable: bool, option: list[str]) -> None:
    folder = tmp_path / "my potluck"
    folder.mkdir()
    (folder / "pyproject.toml").touch()
    installed({"url": folder.as_uri(), "dir_info": {"editable": editable} if editable else {}})
    assert shlex.split(extras.install("parquet", "plot")) == [*PIP, *option, f"{folder}[parquet,plot]"]
    (folder / "pyproject.toml").unlink()
    assert shlex.split(extras.install("parquet")) == [*PIP, "pyarrow>=16.1"], "the source is gone"


def test_a_wheel(tmp_path: Path, installed: Installed) -> None:
    wheel = tmp_path / "potluck-0.1.0-py3-none-any.whl"
    wheel.touch()
    installed({"url": wheel.as_uri(), "archive_info": {}})
    assert shlex.split(extras.install("parquet")) == [*PIP, f"{wheel}[parquet]"]
    wheel.unlink()
    assert shlex.split(extras.install("parquet")) == [*PIP, "pyarrow>=16.1"]


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ({"url": "https://host/p.whl", "archive_info": {}}, "potluck[parquet] @ https://host/p.whl"),
        (
            {"url": "https://host/p.git", "vcs_info": {"vcs": "git", "commit_id": "abc123"}},
            "potluck[parquet] @ git+https://host/p.git@abc123",
        ),
    ],
)
def test_an_address(installed: Installed, url: object, wanted: str) -> None:
    installed(url)
    assert shlex.split(extras.install("parquet")) == [*PIP, wanted]


def test_where_nothing_says_from_where_the_packages_are_named(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(None)
    for machine, tensorflow in (("x86_64", "tensorflow-cpu>=2.18"), ("aarch64", "tensorflow>=2.18")):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        assert shlex.split(extras.install("engine")) == [*PIP, tensorflow, "keras>=3.15"]
    assert shlex.split(extras.install("gpu", "odd"))[4:] == [
        "tensorflow[and-cuda]>=2.18",
        'old; python_version < "3.12"',
    ]


def test_an_environment_without_pip_is_uvs(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(None, "uv")
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    assert extras.install("parquet") == f"uv pip install --python {sys.executable} 'pyarrow>=16.1'"


def test_every_extra_that_a_hint_names_is_one_of_ours() -> None:
    """With the real metadata: each extra brings packages, or the source of this installation exists."""
    for extra in ("engine", "litert", "broker", "tfrecord", "parquet", "demo", "plot", "tensorboard", "privacy"):
        (potluck, *_) = extras.distributions(name="potluck")
        assert extras._packages(potluck, (extra,)), extra
