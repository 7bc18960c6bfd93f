"""Ctrl-C: the first one ends the command in order, and those that follow quickly do not break into that."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from types import FrameType

STATUS = 130
"""Exit code of a program that SIGINT ended, as shells have it."""
ORDERLY_SECONDS = 5.0
"""So long a command may take to clean up; another Ctrl-C after that ends it at once."""


def once() -> None:
    """Have the first SIGINT of this process raise KeyboardInterrupt, and no other.

    A second one would be raised wherever the first is being dealt with: in a destructor, or while Python ends, where it is printed.
    Nothing is changed where SIGINT is not Python's own (a shell that starts a program in the background has it ignored).
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _first)


def _first(number: int, frame: FrameType | None) -> None:
    in_order_until = time.monotonic() + ORDERLY_SECONDS

    def again(number: int, frame: FrameType | None) -> None:
        if time.monotonic() > in_order_until:
            if sys.stderr.isatty():
                os.write(sys.stderr.fileno(), b"\x1b[?25h\n")  # a live picture has hidden the cursor (DECTCEM)
            os._exit(STATUS)

    signal.signal(signal.SIGINT, again)
    # When threads have ended there is nothing left to end; Python takes our handler away then, and the signal would kill us.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt
