"""Asks for each lock file in requirements/ whether a known vulnerability is in what it pins, and lists its packages (SBOM): `make audit`.

Ends with 1 if one is known. Where the databases cannot be asked, it says `not checked` with the reason, and does not fail. Needs
`pip-audit` and `cyclonedx-bom` in the environment that runs it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SERVICES = ("pypi", "osv")
"""Databases, in the order in which they are asked; the next one only for what the one before could not tell."""
IGNORED: dict[str, str] = {}
"""Ids of vulnerabilities that do not concern us, and why."""
USAGE_ERROR = 2


class Told(NamedTuple):
    """What a database told."""

    found: list[str]
    """Vulnerabilities, a line each."""
    unknown: str
    """How many packages it did not tell about; "": none."""
    reason: str
    """Why it did not."""


def told(status: int, output: str, errors: str) -> Told:
    """What pip-audit says with `--format json`. It ends with 0 although it could check nothing, and with 1 for findings and failures."""
    if status == USAGE_ERROR:
        raise RuntimeError(f"pip-audit does not take these options any more: {errors.strip()}")
    try:
        packages = json.loads(output)["dependencies"]
    except ValueError:
        lines = errors.strip().splitlines() or [f"it ended with {status} and said nothing"]
        return Told([], "all packages", lines[-1])
    found = [
        f"{one['name']} {one['version']}: {problem['id']}, mended in {', '.join(problem['fix_versions']) or 'no version yet'}"
        for one in packages
        for problem in one.get("vulns", ())
        if not IGNORED.keys() & {problem["id"], *problem.get("aliases", ())}
    ]
    skipped = [one for one in packages if "skip_reason" in one]
    if not skipped:
        return Told(found, "", "")
    return Told(found, f"{len(skipped)} of {len(packages)} packages", skipped[0]["skip_reason"])


def audit(locks: Sequence[Path], program: Sequence[str]) -> tuple[list[str], list[str]]:
    """Vulnerabilities in lock files, and what could not be checked, as lines to print."""
    found: list[str] = []
    reasons = []
    for service in SERVICES:
        command = [*program, "--vulnerability-service", service, "--format", "json", "--progress-spinner", "off"]
        command += ["--disable-pip", "--no-deps", *(f"--requirement={lock}" for lock in locks)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        answer = told(done.returncode, done.stdout, done.stderr)
        found += answer.found
        if not answer.unknown:
            return found, []
        reasons.append(f"not checked: {answer.unknown}, by {service}: {answer.reason}")
    return found, reasons


def list_packages(lock: Path, target: Path) -> None:
    """Write what a lock file installs as an SBOM (CycloneDX, JSON)."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "cyclonedx_py",
        "requirements",
        "--pyproject",
        str(ROOT / "pyproject.toml"),
    ]
    command += [
        "--output-reproducible",
        "--no-validate",
        "--output-format",
        "JSON",
        "--output-file",
        str(target),
        str(lock),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        sys.exit(f"no SBOM of {lock.name}: {done.stderr}")


def main() -> None:
    (ROOT / "dist").mkdir(exist_ok=True)
    locks = sorted((ROOT / "requirements").glob("*.txt"))
    for lock in locks:
        sbom = ROOT / f"dist/potluck-{lock.stem}.cdx.json"
        list_packages(lock, sbom)
        sys.stdout.write(f"packages of {lock.name}: {sbom}\n")
    found, unchecked = audit(locks, [sys.executable, "-m", "pip_audit"])
    for line in (*(f"VULNERABLE: {one}" for one in found), *unchecked):
        sys.stdout.write(f"{line}\n")
    if not found and not unchecked:
        sys.stdout.write("no known vulnerabilities\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
