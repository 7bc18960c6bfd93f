"""Bulk over mTLS, against plain bulk in the same run: a node's blob server in a process of its own, and a node's fetch in this one.

Both have certificates of one CA, and check each other's. Each turn fetches a blob over both, one after the other, so that a slow
minute of the machine affects both: all holders' chunks, written to the store, and hashed. `--only NAME` runs one check.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import secrets
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web
from report import OtherLoad, Report

from potluck.blobs import server
from potluck.blobs.download import Downloader
from potluck.blobs.rights import OPEN
from potluck.blobs.store import BlobStore
from potluck.credentials import Credentials
from potluck.lifecycle import die_with_parent
from potluck.net.addresses import base_urls
from potluck.net.http import serve_http
from potluck.net.http_client import session
from potluck.security import certificates, folder
from potluck.wire.values import BlobRef

CHECKS = ("transfer_tls",)
AT_LEAST = 0.7
KINDS = ("plain", "mTLS")


def write_member(where: Path, ca_key: bytes, ca: bytes, name: str) -> Path:
    """A folder with the credentials of a node, signed by this CA."""
    public_key = certificates.requested_key(certificates.signing_request(key := certificates.new_key()))
    profile = certificates.node_profile(name)
    certificate = certificates.issue(ca_key, ca, public_key, profile, time.time(), secrets.token_bytes(16))
    folder.write_pair(where, "node", key, certificate)
    folder.write(where / folder.CA_CERTIFICATE, ca, folder.PUBLIC)
    return where


def cpu_seconds() -> float:
    """CPU time of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def serve(store: Path, member: Path) -> None:
    """The other process: a node's blob server on two ports. Prints where, and says its CPU time to whoever asks."""

    async def used(request: web.Request) -> web.Response:
        return web.json_response(cpu_seconds())

    blobs = BlobStore(store, 1 << 40)
    urls = []
    async with AsyncExitStack() as stack:
        for credentials in (Credentials.of("node", "holder"), Credentials.load(member, "node")):
            sock = socket.create_server(("127.0.0.1", 0))
            routes = [*server.routes(blobs, writable=False, max_bytes=0, rights=OPEN), web.get("/used", used)]
            await stack.enter_async_context(serve_http(sock, routes, credentials))
            urls += base_urls("127.0.0.1", sock.getsockname()[1], credentials.scheme)
        print(json.dumps(urls), flush=True)
        await asyncio.get_running_loop().create_future()


@asynccontextmanager
async def holder(store: Path, member: Path) -> AsyncIterator[list[str]]:
    """The addresses of a process that runs `serve`: plain, then over mTLS."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--serve", str(store), str(member),
        stdout=asyncio.subprocess.PIPE, preexec_fn=die_with_parent(),
    )  # fmt: skip
    try:
        assert process.stdout is not None
        async with asyncio.timeout(60):
            urls = json.loads(await process.stdout.readline())
        yield urls
    finally:
        process.terminate()
        await process.wait()


@dataclass
class Turn:
    """What one fetch took, in seconds: by the clock, and CPU time of the holder and of the one who fetches."""

    seconds: float
    sends: float
    receives: float

    @property
    def cpu(self) -> float:
        return self.sends + self.receives


async def fetched(ref: BlobRef, credentials: Credentials, used: Any) -> Turn:
    """Fetch a blob into a new store."""
    with tempfile.TemporaryDirectory(prefix="potluck-bench-") as here:
        async with Downloader(BlobStore(Path(here), 1 << 40), credentials) as downloader:
            theirs, ours, began = await used(), cpu_seconds(), time.perf_counter()
            await downloader.fetch(ref)
            seconds, ours = time.perf_counter() - began, cpu_seconds() - ours
            return Turn(seconds, await used() - theirs, ours)


async def transfer_tls(work: Path, quick: bool, report: Report) -> None:
    """Fetch the same blob by turns over plain HTTP and over mTLS."""
    size, turns = (64 << 20, 3) if quick else (512 << 20, 9)
    ca_key = certificates.new_key()
    ca = certificates.make_ca(ca_key, "bench", "bench", time.time(), secrets.token_bytes(16))
    members = [write_member(work / name, ca_key, ca, name) for name in ("holder", "fetcher")]
    path = work / "blob"
    with path.open("wb") as file:
        for _ in range(size >> 20):
            file.write(secrets.token_bytes(1 << 20))
    ref = BlobStore(work / "store", 1 << 40).put_file(path, move=True)
    credentials = (Credentials.of("node", "fetcher"), Credentials.load(members[1], "node"))
    found: dict[str, list[Turn]] = {kind: [] for kind in KINDS}
    load = OtherLoad()
    async with holder(work / "store", members[0]) as urls:
        async with session(credentials[0], connect_seconds=10, idle_seconds=60) as http:

            async def used() -> float:
                async with http.get(f"{urls[0]}/used") as response:
                    return float(await response.json())

            for number in range(turns + 1):
                for kind, url, ours in zip(KINDS, urls, credentials, strict=True):
                    turn = await fetched(BlobRef(sha256=ref.sha256, size=ref.size, holders=(url,)), ours, used)
                    if number:  # the first turn warms up
                        found[kind].append(turn)
    megabytes = size / 1e6
    report.columns = (
        f"a blob of {megabytes:.0f} MB, median of {turns}",
        "MB/s",
        "CPU s: sends",
        "receives",
        "MB per CPU s",
    )
    for kind, its in found.items():
        rate, sends, receives, by_cpu = (
            statistics.median(one) for one in zip(*((megabytes / t.seconds, t.sends, t.receives, megabytes / t.cpu) for t in its), strict=True)
        )  # fmt: skip
        report.rows.append((kind, f"{rate:.0f}", f"{sends:.2f}", f"{receives:.2f}", f"{by_cpu:.0f}"))
        report.figures[kind] = {
            "megabytes_per_second": round(rate, 1),
            "cpu_seconds_sends": round(sends, 3),
            "cpu_seconds_receives": round(receives, 3),
        }
    pairs = list(zip(found["plain"], found["mTLS"], strict=True))
    report.figures["by_cpu"] = round(statistics.median(plain.cpu / tls.cpu for plain, tls in pairs), 3)
    report.figures["other_load_cores"] = round(load.cores(), 2)
    report.check(
        "transfer_tls", statistics.median(plain.seconds / tls.seconds for plain, tls in pairs), at_least=AT_LEAST
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short run, to see that it works")
    parser.add_argument("--only", choices=CHECKS, help="run only this check")
    parser.add_argument("--serve", nargs=2, metavar=("STORE", "MEMBER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve(*map(Path, arguments.serve)))
        return
    report = Report("transfer")
    with tempfile.TemporaryDirectory(prefix="potluck-bench-") as work:
        asyncio.run(transfer_tls(Path(work), arguments.quick, report))
    report.show()


if __name__ == "__main__":
    main()
