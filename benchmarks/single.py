"""What a service does one at a time: one add, one search, opening a store, the import; on a server and on Lite."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from llama_index.vector_stores.milvus import MilvusVectorStore

from benchmarks.backend import Backend, check_answers, queries_for
from benchmarks.corpus import make_nodes
from benchmarks.measure import Figure, Outcome, Timing, alternate, cpu_seconds, ratios, seconds, settle
from llama_index_milvus_async_ext import AsyncMilvusVectorStore

_STORED_ROWS = 2_000
_CALLS = 25  # of a block; its figure is their median
_OPENINGS = 5
_IMPORTS = 3  # times as many rounds as of the others: it takes a second, and varies by a tenth
_TARGETS = {"query": 0.9, "aquery": 0.9, "add": 1.05, "async_add": 1.05}


async def run(backend: Backend, *, dim: int, rounds: int) -> Outcome:
    """Latency of single calls, block against block, one right after the other."""
    outcome = Outcome()
    await _on(outcome, backend, "a server", dim, rounds)
    with tempfile.TemporaryDirectory() as folder:
        lite = Backend(str(Path(folder) / "benchmark.db"), is_lite=True)
        try:
            await _on(outcome, lite, "Milvus Lite", dim, rounds)
        finally:
            lite.close()
    imported = await _importing(_IMPORTS * rounds)
    _note(outcome, "import of the package, in a new process", imported, 1.05)
    return outcome


async def _importing(rounds: int) -> dict[str, list[Timing]]:
    """How long the import takes from bytecode, which pip compiles as it installs a package."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONPYCACHEPREFIX": folder}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)

        def importing(module: str) -> Callable[[], Awaitable[Timing]]:
            def used() -> float:
                usage = resource.getrusage(resource.RUSAGE_CHILDREN)
                return usage.ru_utime + usage.ru_stime

            async def measure() -> Timing:
                cpu, before = used(), time.perf_counter()
                subprocess.run([sys.executable, "-c", f"import {module}"], env=environment, check=True)  # noqa: ASYNC221  # alone
                return Timing(time.perf_counter() - before, used() - cpu)

            return measure

        sides = {
            "ours": importing("llama_index_milvus_async_ext"),
            "upstream": importing("llama_index.vector_stores.milvus"),
        }
        await alternate(sides, 1)  # which compiles
        return await alternate(sides, rounds)


async def _on(outcome: Outcome, backend: Backend, where: str, dim: int, rounds: int) -> None:
    stored = make_nodes(_STORED_ROWS, dim)
    options = {"upsert_mode": True, "consistency_level": "Bounded"}
    async with backend.ours(dim, **options) as ours:
        await ours.async_add(stored)
        same = {**options, "collection_name": ours.collection_name}  # what one writes, the other one searches as well
        async with backend.upstream(dim, **same) as upstream:
            for method, target in _TARGETS.items():
                sides = {"ours": _block(ours, method, stored), "upstream": _block(upstream, method, stored)}
                taken = await alternate(sides, rounds)
                _note(outcome, f"one `{method}`, {where}", taken, target)
        backend.check_stored(ours.collection_name, stored)
        opened = await opening_both(backend, dim, ours.collection_name, rounds)
        _note(outcome, f"opening a store, another one being open, {where}", opened, 2.0)


def _note(outcome: Outcome, workload: str, taken: dict[str, list[Timing]], target: float) -> None:
    ours, upstream = taken["ours"], taken["upstream"]
    figure = ratios(seconds(ours), seconds(upstream))
    outcome.figures += [
        Figure(f"{workload}: latency", "upstream's", target, figure, is_lower_better=True),
        Figure(f"{workload}: client CPU", "upstream's", None, ratios(cpu_seconds(ours), cpu_seconds(upstream)), True),
    ]
    outcome.series[workload] = {name: {"seconds": seconds(of), "cpu": cpu_seconds(of)} for name, of in taken.items()}


def _block(store: MilvusVectorStore, method: str, stored: list[Any]) -> Callable[[], Awaitable[Timing]]:
    """The median of some calls, and the CPU time of one."""
    call = getattr(store, method)
    place = 0

    async def measure() -> Timing:
        nonlocal place
        nodes = [stored[(place + n) % len(stored)] for n in range(_CALLS)]
        place += _CALLS
        arguments: list[Any] = [[node] for node in nodes] if "add" in method else queries_for(nodes)
        results, taken = [], []
        settle()
        cpu = time.process_time()
        for argument in arguments:
            before = time.perf_counter()
            results.append(await call(argument) if method.startswith("a") and method != "add" else call(argument))
            taken.append(time.perf_counter() - before)
        cpu = time.process_time() - cpu
        if "query" in method:
            check_answers(nodes, results)
        return Timing(statistics.median(taken), cpu / len(taken))

    return measure


async def opening_both(backend: Backend, dim: int, collection: str, rounds: int) -> dict[str, list[Timing]]:
    """How long it takes to open a store on a collection that is there, while another store of its kind is open."""

    def opening(kind: type[MilvusVectorStore]) -> Callable[[], Awaitable[Timing]]:
        async def measure() -> Timing:
            arguments: dict[str, Any] = {"uri": backend.uri, "token": backend.token, "dim": dim}
            stores = [kind(collection_name=collection, **arguments)]
            taken = []
            settle()
            cpu = time.process_time()
            for _ in range(_OPENINGS):
                before = time.perf_counter()
                stores.append(kind(collection_name=collection, **arguments))
                taken.append(time.perf_counter() - before)
                await asyncio.sleep(0)
            cpu = time.process_time() - cpu
            for store in stores:
                await close(store)
            return Timing(statistics.median(taken), cpu / len(taken))

        return measure

    return await alternate({"ours": opening(AsyncMilvusVectorStore), "upstream": opening(MilvusVectorStore)}, rounds)


async def close(store: MilvusVectorStore) -> None:
    """Close a store, ours or upstream's."""
    if isinstance(store, AsyncMilvusVectorStore):
        await store.aclose()
        return
    with contextlib.suppress(Exception):  # it was never used
        await store.aclient.close()
    store.client.close()
