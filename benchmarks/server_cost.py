"""What a bulk write costs the server: until its last answer, and afterwards, for what it has acknowledged.

It starts a server of its own, whose CPU time it can read; that of single threads can be read on Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import gc
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import psutil

from benchmarks import bulk, ready_made
from benchmarks.backend import Backend
from benchmarks.corpus import make_nodes
from benchmarks.measure import alternate, settle
from tests.servers import MilvusServer

_DIM = 768
_IN_FLIGHT, _ROWS_PER_REQUEST = 8, 500
# By then a server is done with 10,000 rows: from the third second on it takes as much as when it is idle.
_WATCHED_SECONDS = 4.0
_COMPACTION = "rocksdb:low"  # the name of the threads that compact the log's RocksDB


@dataclass(frozen=True)
class Cost:
    """Of one write: its wall time, and CPU seconds.

    Attributes:
        seconds: From the call to its return.
        client: This process's CPU seconds until then.
        server: The server's until then.
        compaction: Those of them that RocksDB's compaction took.
        server_in_all: The server's, four seconds after the call.
    """

    seconds: float
    client: float
    server: float
    compaction: float
    server_in_all: float


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.server_cost", description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, MilvusServer(folder) as server:
        backend = Backend(server.uri)
        try:
            costs = asyncio.run(_measure(backend, psutil.Process(server.pid), given.rows, given.rounds))
        finally:
            backend.close()
    print(f"{given.rows:,} rows, medians in milliseconds: wall time; CPU time of client, server, and of the server's")
    print(f"compaction until the last answer; CPU time of the server until {_WATCHED_SECONDS:g} s after the call")
    print(f"{'':49}{'rounds':>8}{'wall':>8}{'client':>8}{'server':>8}{'compact':>8}{'in all':>8}")
    for name, taken in costs.items():
        for label, part in (
            ("without compaction", [cost for cost in taken if not cost.compaction]),
            ("with compaction", [cost for cost in taken if cost.compaction]),
        ):
            if part:
                print(f"{name + ', ' + label:49}{len(part):8}{_medians(part)}")


def _medians(costs: Sequence[Cost]) -> str:
    medians = map(statistics.median, zip(*map(astuple, costs), strict=True))
    return "".join(f"{median * 1e3:8.0f}" for median in medians)


async def _measure(backend: Backend, server: psutil.Process, count: int, rounds: int) -> Mapping[str, list[Cost]]:
    nodes = make_nodes(count, _DIM)
    rows = ready_made.upstream_rows(nodes)

    watched = functools.partial(_watched, server)
    sides = {
        f"ready-made, {_IN_FLIGHT} x {_ROWS_PER_REQUEST} rows": bulk.sending(
            backend, _DIM, nodes, rows, _IN_FLIGHT, _ROWS_PER_REQUEST, measured=watched
        ),
        "ours": bulk.writing(backend, backend.ours, _DIM, nodes, bulk.one_call, measured=watched),
        "upstream": bulk.writing(backend, backend.upstream, _DIM, nodes, bulk.one_call, measured=watched),
    }
    return await alternate(sides, rounds)


async def _watched(server: psutil.Process, work: Callable[[], Awaitable[object]]) -> Cost:
    gc.collect()
    settle()
    server_before, compaction_before = _cpu_seconds(server), _compaction_seconds(server)
    client_before, started = time.process_time(), time.perf_counter()
    await work()
    seconds, client = time.perf_counter() - started, time.process_time() - client_before
    spent, compaction = _cpu_seconds(server) - server_before, _compaction_seconds(server) - compaction_before
    await asyncio.sleep(max(_WATCHED_SECONDS - seconds, 0.0))
    return Cost(seconds, client, spent, compaction, _cpu_seconds(server) - server_before)


def _cpu_seconds(server: psutil.Process) -> float:
    times = server.cpu_times()
    return float(times.user + times.system)


def _compaction_seconds(server: psutil.Process) -> float:
    ticks = 0
    for thread in Path(f"/proc/{server.pid}/task").iterdir():
        with contextlib.suppress(OSError):  # the thread has ended
            name, _, numbers = (thread / "stat").read_text().rpartition(")")
            if _COMPACTION in name:
                ticks += sum(map(int, numbers.split()[11:13]))  # user and system time, see proc(5)
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
