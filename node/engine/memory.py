"""Shortage of memory, of the machine or a GPU, as TensorFlow reports it."""

from __future__ import annotations

import math
import re
import resource

import psutil

from node.engine.wording import one_line
from potluck.errors import OutOfMemory

SIGNS = (
    "Dst tensor is not initialized",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "STATUS_ALLOC_FAILED",
    "ut of memory",
    "bad_alloc",
)
"""Texts in other errors that mean a shortage: from TensorFlow for a tensor on a GPU, from CUDA's libraries, and from XLA."""

limit_bytes = 0
"""Resident memory that this process may take; 0: any."""
OWN_THREADS = 4
"""Threads of ours that start later, besides those of TensorFlow: the readers, and the tasks' thread."""
THREAD_BYTES = 8 * 2**20
"""Size of a thread's stack, which is hardly ever used."""

_TENSOR = re.compile(r"OOM when allocating tensor with shape\[([\d,]+)\] and type (\w+)")
_BYTES = {"double": 8, "int64": 8, "half": 2, "bfloat16": 2, "int8": 1, "uint8": 1, "bool": 1}


def hold_to_limit(threads: int) -> None:
    """Let the kernel refuse memory beyond this process's limit: then TensorFlow says which tensor had no room.

    RLIMIT_DATA (getrlimit(2)) counts private writable memory, used or not. It does not count resident libraries, so the limit is
    what is left now. Call this when the libraries are loaded.
    """
    now = psutil.Process().memory_info()
    room = max(0, limit_bytes - now.rss) + (4 * threads + OWN_THREADS) * THREAD_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (now.data + room, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _wanted(text: str) -> str:
    """The tensor that had no room; "": TensorFlow does not say."""
    found = _TENSOR.search(text)
    if found is None:
        return ""
    shape = [int(size) for size in found[1].split(",")]
    gigabytes = math.prod(shape) * _BYTES.get(found[2], 4) / 1e9
    return f"a tensor of shape {shape} takes {gigabytes:,.1f} GB"


def shortage(error: BaseException) -> OutOfMemory | None:
    """The error to raise if `error` means that there is too little memory; None: it means something else."""
    if isinstance(error, OutOfMemory):
        return error
    text = str(error)
    meant = isinstance(error, MemoryError) or type(error).__name__ == "ResourceExhaustedError"
    if not meant and not any(sign in text for sign in SIGNS):
        return None
    said = _wanted(text) or one_line(text.partition("\nHint:")[0], 200)
    if any(name in text for name in ("GPU", "CUDA", "CUDNN", "CUBLAS")):
        return OutOfMemory(
            f"this node's GPU has not enough free memory for the model and its data ({said}): take a smaller batch_size, or end what "
            "else uses that GPU"
        )
    return OutOfMemory(
        f"this node has not enough memory for the model and its data ({said or 'it was refused'}): take a smaller batch_size, or leave "
        "this to nodes that have more"
    )
