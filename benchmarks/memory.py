"""Growth of this process's memory while nodes are written; run in a process of its own."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import subprocess
import sys
import threading
from pathlib import Path

import psutil

from benchmarks.backend import Backend
from benchmarks.corpus import make_nodes
from benchmarks.measure import Figure, Outcome

_MEGABYTE = 1 << 20
_PAUSE_SECONDS = 0.002
_WARM_UP_ROWS = 2_000


def run(uri: str, token: str, *, dim: int, rounds: int, count: int) -> Outcome:
    """Write `count` nodes through `awrite`, each round in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--uri", uri, "--count", str(count), "--dim", str(dim)]
    grown = []
    for _ in range(rounds):
        measured = subprocess.run(
            command, input=token, capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parent.parent
        )
        grown.append(json.loads(measured.stdout)["grown_bytes"] / _MEGABYTE)
    workload = f"{count:,} nodes of {dim} dimensions through `awrite`: growth of resident memory"
    return Outcome([Figure(workload, "the nodes themselves", 100.0, grown, True, "MB")], {"grown_megabytes": grown})


async def _grown_bytes(uri: str, token: str, dim: int, count: int) -> int:
    backend = Backend(uri, token)
    async with backend.ours(dim) as store:
        await store.awrite(make_nodes(_WARM_UP_ROWS, dim))  # threads, buffers and lazy imports are no growth
        nodes = make_nodes(count, dim)
        gc.collect()
        process = psutil.Process()
        before = peak = process.memory_info().rss
        ended = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not ended.wait(_PAUSE_SECONDS):
                peak = max(peak, process.memory_info().rss)

        watcher = threading.Thread(target=watch)
        watcher.start()
        report = await store.awrite(nodes)
        ended.set()
        watcher.join()
        if report.written != [node.node_id for node in nodes]:
            raise AssertionError(f"not all nodes were written: {report}")
        backend.check_stored(store.collection_name, nodes)
    backend.close()
    return peak - before


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--uri", required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--dim", type=int, required=True)
    given = parser.parse_args()
    # The token comes by standard input: a command line can be read by everyone on the machine.
    grown_bytes = asyncio.run(_grown_bytes(given.uri, sys.stdin.read(), given.dim, given.count))
    print(json.dumps({"grown_bytes": grown_bytes}))
