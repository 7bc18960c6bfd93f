"""What is made of pip-audit's answers: findings fail, silence is told as silence."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("audit", Path(__file__).parents[3] / "packaging/audit.py")
assert SPEC is not None
assert SPEC.loader is not None
AUDIT = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(AUDIT)

CLEAN = {"name": "rich", "version": "15.0.0", "vulns": []}
BAD = {
    "name": "pillow", "version": "10.0.0",
    "vulns": [{"id": "PYSEC-1", "fix_versions": ["10.0.1"], "aliases": ["CVE-1"], "description": "x"}],
}  # fmt: skip
SKIPPED = {"name": "numpy", "skip_reason": "Dependency not found: numpy (2.0)"}
UNTOLD = [
    "1 of 2 packages, by pypi: Dependency not found: numpy (2.0)", "all packages, by osv: ConnectionError: no such host",
]  # fmt: skip
NO_NETWORK = "Traceback (most recent call last):\nConnectionError: no such host"


def auditor(folder: Path, answers: dict[str, object]) -> list[str]:
    """A program in place of pip-audit, with an answer for each service: packages, or what it says when it fails."""
    script = folder / "auditor.py"
    script.write_text(
        f"import json, sys\nanswer = json.loads({json.dumps(answers)!r})[sys.argv[sys.argv.index('--vulnerability-service') + 1]]\n"
        "if isinstance(answer, str): sys.exit(answer)\n"
        "print(json.dumps({'dependencies': answer}))\nsys.exit(any(one.get('vulns') for one in answer))\n"
    )
    return [sys.executable, str(script)]


@pytest.mark.parametrize(
    ("answers", "found", "unchecked"),
    [
        ({"pypi": [CLEAN]}, [], []),
        ({"pypi": [CLEAN, BAD]}, ["pillow 10.0.0: PYSEC-1, mended in 10.0.1"], []),
        ({"pypi": [SKIPPED], "osv": [CLEAN]}, [], []),
        ({"pypi": NO_NETWORK, "osv": [BAD]}, ["pillow 10.0.0: PYSEC-1, mended in 10.0.1"], []),
        (
            {"pypi": [CLEAN, SKIPPED], "osv": NO_NETWORK},
            [],
            UNTOLD,
        ),
        (
            {"pypi": [BAD, SKIPPED], "osv": NO_NETWORK},
            ["pillow 10.0.0: PYSEC-1, mended in 10.0.1"],
            UNTOLD,
        ),
    ],
)
def test_findings_and_what_was_not_checked(
    tmp_path: Path, answers: dict[str, object], found: list[str], unchecked: list[str]
) -> None:
    lines = [f"not checked: {one}" for one in unchecked]
    assert AUDIT.audit([tmp_path / "l.txt"], auditor(tmp_path, answers)) == (found, lines)


def test_what_does_not_concern_us_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AUDIT, "IGNORED", {"CVE-1": "we open no such file"})
    assert AUDIT.told(1, json.dumps({"dependencies": [BAD]}), "").found == []


def test_wrong_options_are_no_missing_network() -> None:
    with pytest.raises(RuntimeError, match=shlex.quote("--nonsense")):
        AUDIT.told(2, "", "unrecognized arguments: --nonsense")
