"""Ctrl-C: the first one ends the command in order; others soon after do not disturb that."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from types import FrameType

STATUS = 130
"""Exit code of a program that SIGINT ended, as shells define it."""
ORDERLY_SECONDS = 5.0
"""How long a command may take to clean up; after that, another Ctrl-C ends it at once."""


def once() -> None:
    """Let only the first SIGINT of this process raise KeyboardInterrupt.

    A second KeyboardInterrupt could be raised while the first is handled: in a destructor, or while Python ends, where it is printed.
    Changes nothing where SIGINT does not have Python's own handler (a shell ignores SIGINT for a program in the background).
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _first)


def _first(number: int, frame: FrameType | None) -> None:
    in_order_until = time.monotonic() + ORDERLY_SECONDS

    def again(number: int, frame: FrameType | None) -> None:
        if time.monotonic() > in_order_until:
            if sys.stderr.isatty():
                os.write(sys.stderr.fileno(), b"\x1b[?25h\n")  # a live picture has hidden the cursor: show it (DECTCEM)
            os._exit(STATUS)

    signal.signal(signal.SIGINT, again)
    # When Python ends, it removes our handler after the threads have ended. A signal would then kill us, with nothing left to end.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt
