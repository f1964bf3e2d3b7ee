"""Where the client's time goes: top functions by own time of bulk write and search, upstream's and ours."""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import gc
import io
import logging
import os
import pstats
import re
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from benchmarks.__main__ import open_milvus
from benchmarks.backend import Backend, queries_for
from benchmarks.corpus import make_nodes
from llama_index_milvus_async_ext._lane.thread import IoThread

_DIM = 768
_STORED_ROWS = 2_000
_WAITING = re.compile(r"poll|select|acquire")


def _in_io_thread(function: Callable[[], object]) -> None:
    done = threading.Event()
    IoThread.get().post(function, done.set)
    done.wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_paths", description=__doc__)
    parser.add_argument("--uri", help="address of a Milvus server; one is started if none is given")
    parser.add_argument("--token", default=os.environ.get("MILVUS_TOKEN", ""), help="default: MILVUS_TOKEN is asked")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--searches", type=int, default=1_000)
    parser.add_argument("--top", type=int, default=15, help="functions to show")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    with open_milvus(given.uri, given.token) as backend:
        asyncio.run(_profile_all(backend, given.rows, given.searches, given.top))


async def _profile_all(backend: Backend, rows: int, searches: int, top: int) -> None:
    nodes = make_nodes(rows, _DIM)
    for name, open_store in (("before (upstream)", backend.upstream), ("after (ours)", backend.ours)):
        async with open_store(_DIM) as store:
            profile = await _profiled(lambda to=store: to.async_add(nodes))
            print(f"\nbulk write of {rows:,} rows, {name}\n{_top(profile, rows, 'row', top)}")
            backend.check_stored(store.collection_name, nodes)
    stored = make_nodes(_STORED_ROWS, _DIM)
    queries = queries_for(stored[:searches])
    async with backend.ours(_DIM) as writer:
        await writer.async_add(stored)
        backend.check_stored(writer.collection_name, stored)
        for name, open_store in (("before (upstream)", backend.upstream), ("after (ours)", backend.ours)):
            async with open_store(_DIM, collection_name=writer.collection_name) as store:
                profile = await _profiled(lambda of=store: asyncio.gather(*map(of.aquery, queries)))
                print(f"\n{searches:,} concurrent searches, {name}\n{_top(profile, searches, 'query', top)}")


async def _profiled(work: Callable[[], Awaitable[Any]]) -> pstats.Stats:
    """Profile the caller's thread and the I/O thread, added up."""
    callers, in_io_thread = cProfile.Profile(), cProfile.Profile()
    gc.collect()
    _in_io_thread(in_io_thread.enable)
    callers.enable()
    try:
        await work()
    finally:
        callers.disable()
        _in_io_thread(in_io_thread.disable)
    stats = pstats.Stats(callers)
    stats.add(in_io_thread)
    return stats


def _top(stats: pstats.Stats, count: int, item: str, top: int) -> str:
    own: list[tuple[float, int, str]] = []
    for (path, line, function), (_, calls, seconds, _, _) in stats.stats.items():  # type: ignore[attr-defined]
        if not _WAITING.search(function):
            place = function if path == "~" else f"{'/'.join(path.split('/')[-2:])}:{line} {function}"
            own.append((seconds, calls, place))
    own.sort(reverse=True)
    out = io.StringIO()
    total = sum(seconds for seconds, _, _ in own)
    out.write(f"  {total / count * 1e6:7.1f} us per {item} in all, under the profiler, waiting left out\n")
    for seconds, calls, place in own[:top]:
        out.write(f"  {seconds / count * 1e6:7.1f} us per {item} {calls / count:9.2f} calls  {place}\n")
    return out.getvalue()


if __name__ == "__main__":
    main()
