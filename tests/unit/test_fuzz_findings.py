"""What fuzzing has found stays mended, and its targets still reach what they are for. Needs no atheris.

A file in `tests/fuzz/found/<target>` is an input that once broke a promise of that decoder (CONTRIBUTING.md, "Fuzzing").
"""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz.judging import Broken, Target, hold, judge
from fuzz.targets import TARGETS

FOUND = Path(__file__).parents[1] / "fuzz" / "found"
SLOWER = 3.0
"""Other tests run beside."""


def marked(target: Target, *values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.tensorflow if target.slow else ())


def there(target: Target) -> None:
    for module in target.needs:
        pytest.importorskip(module)


@pytest.mark.parametrize("target", [marked(target, target) for target in TARGETS.values()], ids=list(TARGETS))
def test_a_decoder_keeps_its_promises_for_good_inputs_and_takes_some(target: Target) -> None:
    there(target)
    taken = [judge(target, data, slower=SLOWER) for data in target.seeds()]
    assert any(taken)


FILES = sorted(path for path in FOUND.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("target", "path"),
    [marked(TARGETS[path.parent.name], TARGETS[path.parent.name], path) for path in FILES],
    ids=[f"{path.parent.name}/{path.name}" for path in FILES],
)
def test_what_was_found_stays_mended(target: Target, path: Path) -> None:
    there(target)
    judge(target, path.read_bytes(), slower=SLOWER)


def made(run: object, **limits: object) -> Target:
    return Target("made", run, (ValueError,), lambda: [b""], **limits)  # type: ignore[arg-type]


def fails(data: bytes) -> None:
    raise KeyError("not ours")


def refuses(data: bytes) -> None:
    raise ValueError(data.decode("utf-8", "surrogateescape"))


def lies(data: bytes) -> None:
    hold(not data, "nothing comes in")


def grows(data: bytes) -> None:
    bytearray(b"x" * (80 << 20))


def spins(data: bytes) -> None:
    for _ in range(1_000_000):
        pass


@pytest.mark.parametrize(
    ("target", "data", "kind"),
    [
        (made(fails), b"", "KeyError at .*test_fuzz_findings"),
        (made(refuses), b"a" * 7000, "words of ValueError"),
        (made(refuses), b"\xff", "words of ValueError"),
        (made(lies), b"a", "promise: nothing comes in"),
        (made(grows), b"", "memory"),
        (made(spins, seconds=0.0, seconds_each=0.0), b"", "time"),
    ],
    ids=["another error", "long words", "odd words", "promise", "memory", "time"],
)
def test_a_broken_promise_is_seen(target: Target, data: bytes, kind: str) -> None:
    with pytest.raises(Broken, match=kind):
        judge(target, data)


def test_a_refusal_is_told_from_an_input_that_is_taken() -> None:
    assert judge(made(lambda data: None), b"")
    assert not judge(made(refuses), b"no")
