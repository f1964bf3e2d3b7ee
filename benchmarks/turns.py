"""How long the I/O thread is busy without a break: `python -m benchmarks.turns [--nodes N] [--callers N] [--lite]`.

A turn is one round of an event loop: whoever wants something of the loop waits for the turn under way. What counts is
the thread's own CPU time in a turn, because its wall time holds what others keep Python's lock for. Garbage collection
that falls into a turn is told apart: it is the process's, and grows with all that the process holds.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import logging
import random
import sys
import tempfile
import threading
import time
from asyncio.base_events import BaseEventLoop
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.types import VectorStoreQuery

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, WriteReport
from tests.servers import LiteServer, MilvusServer

IO_THREAD = "milvus-io"
DIM = 8
_HEARTBEAT_SECONDS = 0.005
_DISTINCT_VECTORS = 1_000  # of one alone, an index is no use


@dataclass
class Turns:
    """The turns of one thread's event loop, in seconds.

    Attributes:
        cpu: CPU time of each turn, garbage collection left out.
        cpu_with_collection: The same, with it.
        late_heartbeats: By how much each beat of a timer on that loop came late: what a caller feels.
    """

    cpu: list[float] = field(default_factory=list)
    cpu_with_collection: list[float] = field(default_factory=list)
    late_heartbeats: list[float] = field(default_factory=list)

    @property
    def longest(self) -> float:
        return max(self.cpu, default=0.0)

    def quantile(self, share: float) -> float:
        ordered = sorted(self.cpu) or [0.0]
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


@contextmanager
def measured_turns(thread_name: str = IO_THREAD) -> Iterator[Turns]:
    """Measure the turns of the loop that runs in the thread of this name, which runs already.

    It wraps asyncio's own `_run_once`, which is one turn, in all loops of the process for as long as it measures.
    """
    [thread] = [thread for thread in threading.enumerate() if thread.name == thread_name]
    turns = Turns()
    original = BaseEventLoop._run_once  # type: ignore[attr-defined]
    collected = collection_began = 0.0
    measuring = True
    beats = False

    def note_collection(phase: str, info: dict[str, int]) -> None:
        nonlocal collected, collection_began
        if threading.get_ident() == thread.ident:
            if phase == "start":
                collection_began = time.thread_time()
            else:
                collected += time.thread_time() - collection_began

    def beat(loop: BaseEventLoop, due: float) -> None:
        now = time.perf_counter()
        turns.late_heartbeats.append(now - due)
        if measuring:
            loop.call_later(_HEARTBEAT_SECONDS, beat, loop, now + _HEARTBEAT_SECONDS)

    def run_once(loop: BaseEventLoop) -> None:
        nonlocal beats
        if threading.get_ident() != thread.ident:
            original(loop)
            return
        if not beats:
            beats = True
            loop.call_later(_HEARTBEAT_SECONDS, beat, loop, time.perf_counter() + _HEARTBEAT_SECONDS)
        collected_before, began = collected, time.thread_time()
        original(loop)
        seconds = time.thread_time() - began
        turns.cpu_with_collection.append(seconds)
        turns.cpu.append(seconds - (collected - collected_before))

    gc.callbacks.append(note_collection)
    BaseEventLoop._run_once = run_once  # type: ignore[attr-defined]
    try:
        yield turns
    finally:
        measuring = False
        BaseEventLoop._run_once = original  # type: ignore[attr-defined]
        gc.callbacks.remove(note_collection)


@cache
def _vectors(dim: int) -> list[list[float]]:
    chance = random.Random(dim)
    return [[chance.uniform(-1, 1) for _ in range(dim)] for _ in range(_DISTINCT_VECTORS)]


def cheap_nodes(count: int, prefix: str, dim: int = DIM) -> list[TextNode]:
    """Nodes that take as little memory and time as may be: shallow copies, which share all but their ids."""
    templates = [TextNode(text="text", embedding=vector) for vector in _vectors(dim)]
    return [
        templates[number % _DISTINCT_VECTORS].model_copy(update={"id_": f"{prefix}-{number}"})
        for number in range(count)
    ]


async def cancelled_midway(
    store: AsyncMilvusVectorStore, nodes: Sequence[TextNode], share: float = 0.5
) -> tuple[WriteReport, float]:
    """The report of a write that is cancelled once this share of it is sent, and how long its end then took."""
    before = store.statistics().rows
    writing = asyncio.create_task(store.awrite(nodes))
    while store.statistics().rows - before < len(nodes) * share:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    began = time.perf_counter()
    writing.cancel()
    try:
        return await writing, time.perf_counter() - began
    except asyncio.CancelledError as cancelled:
        report = WriteReport.of(cancelled)
        assert report is not None
        return report, time.perf_counter() - began


async def _idle(store: AsyncMilvusVectorStore) -> None:
    while (numbers := store.statistics()).in_flight or numbers.waiting:  # noqa: ASYNC110
        await asyncio.sleep(0.05)


async def _measure(store: AsyncMilvusVectorStore, nodes: int, callers: int) -> None:
    def single(prefix: str) -> list[Awaitable[Any]]:
        return [store.async_add([node]) for node in cheap_nodes(callers, prefix)]

    async def whole_write() -> str:
        report = await store.awrite(many[: nodes // 4])
        return f"{len(report.written):,} written"

    async def cancelled_write() -> str:
        report, seconds = await cancelled_midway(store, many)
        parts = f"{len(report.written):,} written, {len(report.failed):,} failed, {len(report.unknown):,} unknown"
        return f"{parts}; cancelled in {seconds * 1e3:.0f} ms"

    async def single_adds() -> str:
        await asyncio.gather(*single("single"))
        return ""

    async def cancelled_adds() -> str:
        tasks = [asyncio.ensure_future(add) for add in single("cancelled")]
        await asyncio.sleep(0.2)
        began = time.perf_counter()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        cancelled = sum(task.cancelled() for task in tasks)
        return f"{cancelled:,} of {callers:,} cancelled in {(time.perf_counter() - began) * 1e3:.0f} ms"

    async def searches() -> str:
        vectors = itertools.islice(itertools.cycle(_vectors(DIM)), callers)
        await store.async_add(cheap_nodes(_DISTINCT_VECTORS, "found"))
        queries = [VectorStoreQuery(query_embedding=vector, similarity_top_k=1) for vector in vectors]
        await asyncio.gather(*map(store.aquery, queries))
        return ""

    many = cheap_nodes(nodes, "many")
    gc.collect()
    gc.freeze()  # else each collection looks at all these nodes
    workloads: dict[str, Callable[[], Awaitable[str]]] = {
        f"{callers:,} searches": searches,
        f"{nodes // 4:,} nodes, one write": whole_write,
        f"{nodes:,} nodes, one write, cancelled midway": cancelled_write,
        f"{callers:,} single adds": single_adds,
        f"{callers:,} single adds, cancelled": cancelled_adds,
    }
    print(f"{'CPU ms of a turn of the I/O thread':<46} {'max':>8} {'p99.9':>8} {'max+gc':>8} {'late':>8}  turns   s")
    for name, workload in workloads.items():
        began = time.perf_counter()
        with measured_turns() as turns:
            said = await workload()
            seconds = time.perf_counter() - began
            await _idle(store)
        columns = [
            turns.longest,
            turns.quantile(0.999),
            max(turns.cpu_with_collection, default=0.0),
            max(turns.late_heartbeats, default=0.0),
        ]
        figures = " ".join(f"{figure * 1e3:8.1f}" for figure in columns)
        print(f"{name:<46} {figures}  {len(turns.cpu):,} {seconds:.1f} {said}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=1_000_000)
    parser.add_argument("--callers", type=int, default=10_000)
    parser.add_argument("--lite", action="store_true", help="against Milvus Lite, also where the server can run")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    if not arguments.lite and (reason := MilvusServer.unavailable_reason()):
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as folder:
        kind = LiteServer if arguments.lite else MilvusServer
        with (
            kind(Path(folder) / "data") as server,
            AsyncMilvusVectorStore(uri=server.uri, collection_name="turns", dim=DIM) as store,
        ):
            store.add(cheap_nodes(1, "first"))
            asyncio.run(_measure(store, arguments.nodes, arguments.callers))


if __name__ == "__main__":
    main()
