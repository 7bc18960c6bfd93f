"""What the engine's process does from its start to its end, once it is confined."""

from __future__ import annotations

import gc
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from node.engine import frames, memory
from node.engine.array_runtimes import LiteRT, TensorFlow
from node.engine.channel import Channel
from node.engine.readers import Readers
from node.engine.runtimes import Runtime, serving
from node.engine.server import Server
from node.sandbox.confining import Confined
from potluck import __version__

HEARTBEAT_SECONDS = 1.0


def run(
    descriptor: int, *, threads: int, scratch: Path, memory_bytes: int, confined: Confined, allowed: Sequence[str]
) -> None:
    """Answer the node on the socket `descriptor` until it closes it; then end the process."""
    memory.limit_bytes = memory_bytes
    threading.excepthook = _end_with
    channel = Channel(socket.socket(fileno=descriptor))
    threading.Thread(target=_beat, args=(channel,), name="heartbeat", daemon=True).start()
    gc.disable()  # TensorFlow's imports start it 680 times, for a fifth of their time, and there is nothing to collect
    tensorflow, litert = TensorFlow(scratch, threads, allowed), LiteRT(threads)
    known: tuple[Runtime, ...] = (tensorflow, litert)
    versions: dict[str, str] = {"potluck": __version__}
    gpus: tuple[str, ...] = ()
    installed = [runtime for runtime in known if runtime.installed()]
    for runtime in installed:
        started = runtime.start()
        versions |= started.versions
        gpus += started.gpus
    tasks = None
    if tensorflow.installed():
        from node.engine.tasks import Tasks

        tasks = Tasks(
            scratch, lambda model_format, path: serving((tensorflow, litert), model_format).model(model_format, path)
        )
    # AutoGraph imports the code that it writes into our scratch folder only once, so compiled files would be of no use.
    sys.dont_write_bytecode = True
    if memory.limit_bytes and not gpus:  # drivers of GPUs reserve much address space that is not memory
        memory.hold_to_limit(threads)
    server = Server(channel.send, known, tasks)
    # Each runtime may compute one batch, while one more thread reads.
    readers = Readers(channel.receive, server.take, count=len(installed) + 1)
    # A full collection over TensorFlow's objects takes longer than a hundred inferences, and finds nothing: leave them out.
    gc.freeze()
    gc.enable()
    try:
        channel.send(frames.Started(runtimes=versions, gpus=gpus, sandbox=confined.held, unconfined=confined.missing))
        readers.run()
    except ConnectionError:
        pass  # the parent is gone
    sys.stderr.flush()
    os._exit(0)  # does not wait for threads of TensorFlow, or for a task whose result is not wanted


def _end_with(failed: threading.ExceptHookArgs) -> None:
    """End the engine, as a thread has failed. Without the thread, it might never answer a question. The node starts a new engine."""
    threading.__excepthook__(failed)
    sys.stderr.flush()
    os._exit(1)


def _beat(channel: Channel) -> None:
    while True:
        time.sleep(HEARTBEAT_SECONDS)
        try:
            channel.send(frames.Heartbeat())
        except OSError:
            return  # the parent is gone, and the reading thread sees that too
