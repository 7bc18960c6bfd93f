"""What a target is, and what must hold for each input: only our errors, in words that can be sent, in bounded time and memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

WORDS_LIMIT = 6000
"""How long the text of an error may be: an error must not send a large input back, nor fill the log with it."""
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")

Mutate = Callable[[bytes, int, int], bytes]
"""Makes another input of at most the given size; the last argument is a seed for randomness."""


@dataclass(frozen=True)
class Target:
    """A decoder with its promises. `run` decodes, checks what must hold of the result, and raises nothing but `refuses`.

    An input of n bytes may take `seconds + n * seconds_each` of the processor's time, and raise the memory of the process by
    `peak_bytes + n * peak_each`. `needs`: modules that must be importable. `slow`: it takes
    seconds to begin, and is left out of short runs.
    """

    name: str
    run: Callable[[bytes], object]
    refuses: tuple[type[Exception], ...]
    seeds: Callable[[], Iterable[bytes]]
    mutate: Mutate | None = None
    seconds: float = 1.0
    seconds_each: float = 20e-6
    peak_bytes: int = 64 * 2**20
    peak_each: int = 256
    needs: tuple[str, ...] = ()
    slow: bool = False


class Broken(AssertionError):
    """A promise that an input breaks. `kind` tells findings apart."""

    def __init__(self, kind: str, words: str) -> None:
        super().__init__(f"{kind}: {words}")
        self.kind = kind


def judge(target: Target, data: bytes, *, slower: float = 1.0) -> bool:
    """Run the target on an input. Returns whether the decoder took it; raises Broken. `slower`: how much more time is allowed."""
    before, began = _resident_bytes(), time.process_time()
    refused: Exception | None = None
    try:
        target.run(data)
    except target.refuses as error:
        refused = error
    except MemoryError as error:
        raise Broken("memory", f"MemoryError from {_where(error)}") from error
    except Exception as error:
        raise Broken(f"{type(error).__name__} at {_where(error)}", str(error)[:200]) from error
    seconds, peak = time.process_time() - began, _peak_bytes() - before
    if refused is not None:
        _check_words(refused)
    if seconds > slower * (target.seconds + len(data) * target.seconds_each):
        raise Broken("time", f"{seconds:.2f} s for {len(data)} bytes")
    if peak > target.peak_bytes + len(data) * target.peak_each:
        raise Broken("memory", f"{peak / 2**20:.0f} MiB for {len(data)} bytes")
    return refused is None


def hold(condition: object, words: str) -> None:
    """Something that must hold of what was decoded. Raises Broken."""
    if not condition:
        raise Broken(f"promise: {words}", "does not hold")


def _check_words(error: Exception) -> None:
    words = str(error)
    if len(words) > WORDS_LIMIT:
        raise Broken(
            f"words of {type(error).__name__} at {_where(error)}", f"{len(words)} characters: {words[:100]}..."
        )
    try:
        words.encode()
    except UnicodeEncodeError as failed:
        raise Broken(f"words of {type(error).__name__} at {_where(error)}", "they cannot be sent as UTF-8") from failed


def _where(error: BaseException) -> str:
    """The innermost line of ours that the error came through."""
    found, trace = "?", error.__traceback__
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        if not {"site-packages", "lib"} & set(file.parts) and "fuzz/judging" not in file.as_posix():
            found = f"{file.parent.name}/{file.name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def _resident_bytes() -> int:
    """Memory now; the peak is counted from here on (proc(5), clear_refs)."""
    try:
        _CLEAR.write_text("5")
    except OSError:  # not ours to write: then the peak is that of the whole process
        return _peak_bytes()
    return _kilobytes("VmRSS:") * 1024


def _peak_bytes() -> int:
    return _kilobytes("VmHWM:") * 1024


def _kilobytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    return 0
