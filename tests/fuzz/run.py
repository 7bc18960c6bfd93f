"""Fuzzes the targets in turn with atheris: `make fuzz SECONDS=600`, or `python tests/fuzz/run.py --seconds 600 --only message csv`.

Each target runs in a process of its own (a fork), so that a crash or a hang ends only that one. What is found is kept as
`tests/fuzz/found/<target>/<name>`, as small as it gets, and the unit tests replay it from then on. Inputs that reach new code are
kept in `.fuzz/`, so that a later run goes on from there.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

ROOT = Path(__file__).resolve().parents[2]
FOUND = ROOT / "tests" / "fuzz" / "found"
KEPT = ROOT / ".fuzz"
LENGTH = 1 << 15
"""The largest input in bytes. What is slow or large shows by its ratio to the input's size."""
SLOWER = 8.0
"""Code that counts its branches is slower than the time that a target may take."""
HANGS_SECONDS = 60
MEMORY_BYTES = 6 * 2**30
"""Address space beyond what the process has at its start."""
LEAST_SECONDS = 1
SLOW_FROM_SECONDS = 300


def main() -> int:
    arguments = _arguments()
    try:
        import atheris
    except ImportError:
        version = ".".join(map(str, sys.version_info[:2]))
        print(f"fuzzing needs atheris, which has no wheel for every Python (this is {version}): pip install '.[fuzz]'")
        return 0 if arguments.if_there else 2
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    # The decoders, and the parsers in Python that they call, must not be imported before this block.
    with atheris.instrument_imports(
        include=["potluck", "node", "coordinator", "tarfile", "zipfile", "tomllib", "email", "csv", "PIL", "zeroconf"],
        enable_loader_override=False,
    ):
        from fuzz.targets import TARGETS
    unknown = set(arguments.only) - set(TARGETS)
    if unknown:
        print(f"no such targets: {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
        return 2
    chosen = arguments.only or [
        name for name, target in TARGETS.items() if not target.slow or arguments.seconds >= SLOW_FROM_SECONDS
    ]
    there = [name for name in chosen if all(map(_is_there, TARGETS[name].needs))]
    for name in sorted(set(chosen) - set(there)):
        print(f"{name}: left out, as {', '.join(TARGETS[name].needs)} are not here")
    chosen = there
    each = max(LEAST_SECONDS, arguments.seconds / len(chosen))
    failed = [name for name in chosen if not _fuzzed(name, each, arguments.memory)]
    if failed:
        print(
            f"found something in {', '.join(failed)}: see {FOUND.relative_to(ROOT)}, mend it, and keep the file as a test"
        )
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="for all targets together")
    parser.add_argument("--only", nargs="*", default=[], metavar="TARGET")
    parser.add_argument(
        "--memory", type=int, default=MEMORY_BYTES, help="bytes of address space that decoding may take"
    )
    parser.add_argument("--if-there", action="store_true", help="without atheris, say so and succeed")
    return parser.parse_args()


def _fuzzed(name: str, seconds: float, memory: int) -> bool:
    """Whether nothing was found in that time."""
    from fuzz.of_files import clean

    ends, fine = time.monotonic() + seconds, True
    before = set(_files(FOUND / name))
    print(f"{name}: {seconds:.0f} s", flush=True)
    while (left := ends - time.monotonic()) > 0.5:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            _fuzz(name, left, memory)
        _, status = os.waitpid(child, 0)
        clean(child)
        if status == 0:
            break
        fine = False
        print(f"{name}: the process ended with status {status}: {_crashes(name)}", flush=True)
    new = sorted(set(_files(FOUND / name)) - before)
    for path in new:
        print(f"{name}: {path.relative_to(ROOT)}", flush=True)
    return fine and not new


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if path.is_file()] if folder.is_dir() else []


def _crashes(name: str) -> str:
    """Keep the inputs that ended the process: libFuzzer leaves them as `crash-...` and `timeout-...`."""
    kept = []
    for path in _files(KEPT / name):
        if path.name == "log":
            continue
        (FOUND / name).mkdir(parents=True, exist_ok=True)
        kept.append(path.name)
        path.rename(FOUND / name / path.name[:24])
    return ", ".join(kept) or "no input is known for it"


def _fuzz(name: str, seconds: float, memory: int) -> None:
    """In the forked process: fuzz, and never return."""
    import atheris

    from fuzz.judging import Broken, judge
    from fuzz.targets import TARGETS

    target = TARGETS[name]
    corpus, seeds = KEPT / name / "corpus", KEPT / name / "seeds"
    shutil.rmtree(seeds, ignore_errors=True)
    for folder in (corpus, seeds):
        folder.mkdir(parents=True, exist_ok=True)
    if target.slow:  # the engine's code is imported only here: a process that forks must not have started TensorFlow
        with atheris.instrument_imports(include=["node"], enable_loader_override=False):
            list(target.seeds())
            import node.engine.keras_models
            import node.engine.vetting  # noqa: F401
    for data in target.seeds():
        (seeds / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + memory,) * 2)
    known: dict[str, int] = {}

    def one(data: bytes) -> None:
        try:
            judge(target, data, slower=SLOWER)
        except Broken as broken:
            if len(data) < known.get(broken.kind, sys.maxsize):
                if broken.kind not in known:
                    cause = broken.__cause__
                    print(f"--- {name}: {broken}", flush=True)
                    if cause is not None:
                        traceback.print_exception(cause, limit=-4, file=sys.stdout)
                        sys.stdout.flush()
                known[broken.kind] = len(data)
                (FOUND / name).mkdir(parents=True, exist_ok=True)
                (FOUND / name / hashlib.sha256(broken.kind.encode()).hexdigest()[:12]).write_bytes(data)

    options = [
        *(
            f"-max_total_time={max(1, int(seconds))}",
            f"-max_len={LENGTH}",
            f"-timeout={HANGS_SECONDS}",
            "-rss_limit_mb=0",
        ),
        *("-verbosity=0", "-print_final_stats=0", "-len_control=20", f"-artifact_prefix={KEPT / name}/"),
    ]
    words = os.open(KEPT / name / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(words, 2)  # libFuzzer has much to say
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    arguments = [sys.argv[0], *options, str(corpus), str(seeds)]
    if target.mutate is None:
        atheris.Setup(arguments, one)
    else:
        atheris.Setup(arguments, one, custom_mutator=target.mutate)
    atheris.Fuzz()
    os._exit(0)


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    sys.exit(main())
