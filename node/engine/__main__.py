"""The engine's process: `python -m node.engine FD THREADS SCRATCH MEMORY [ALLOWED CODE...]`, started by `node.engine.process` alone."""

from __future__ import annotations

import gc
import os
import socket
import sys
import threading
import time
from pathlib import Path

from node.engine import frames, memory
from node.engine.array_runtimes import LiteRT, TensorFlow
from node.engine.channel import Channel
from node.engine.readers import Readers
from node.engine.runtimes import Runtime, serving
from node.engine.server import Server
from potluck import __version__

HEARTBEAT_SECONDS = 1.0


def main() -> None:
    descriptor, threads, scratch, allowed = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[5:]
    memory.limit_bytes = int(sys.argv[4])
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
        channel.send(frames.Started(runtimes=versions, gpus=gpus))
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


if __name__ == "__main__":
    main()
