"""Milvus Lite: many searches and single adds at once, ours and upstream."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.backend import Backend, queries_for
from benchmarks.corpus import make_nodes
from benchmarks.measure import Figure, Outcome, Side, Timing, alternate, ratios, seconds, timed
from benchmarks.searches import checked

_STORED_ROWS = 2_000


async def run(*, dim: int, rounds: int, searches: int, adds: int) -> Outcome:
    """Search and add on a file of their own."""
    with tempfile.TemporaryDirectory() as folder:
        backend = Backend(str(Path(folder) / "benchmark.db"), is_lite=True)
        try:
            searching = await _searching(backend, dim, rounds, searches)
            adding = await _adding(backend, dim, rounds, adds)
        finally:
            backend.close()
    figures = [
        Figure(
            f"{searches} concurrent searches on Milvus Lite, {_STORED_ROWS:,} rows",
            "upstream the same way",
            50.0,
            ratios(seconds(searching["upstream"]), seconds(searching["ours"])),
        ),
        Figure(
            f"{adds:,} concurrent `async_add([node])` on Milvus Lite",
            "upstream the same way",
            None,
            ratios(seconds(adding["upstream"]), seconds(adding["ours"])),
        ),
    ]
    series = {
        "rows": _STORED_ROWS,
        "count": searches,
        "searches": {name: seconds(taken) for name, taken in searching.items()},
        "adds": {name: seconds(taken) for name, taken in adding.items()},
    }
    return Outcome(figures, series)


async def _searching(backend: Backend, dim: int, rounds: int, count: int) -> dict[str, list[Timing]]:
    stored = make_nodes(_STORED_ROWS, dim)
    nodes = stored[:count]
    queries = queries_for(nodes)
    async with backend.ours(dim) as writer:
        await writer.async_add(stored)
        backend.check_stored(writer.collection_name, stored)

        def side(open_store: Callable[..., Any]) -> Side:
            async def measure() -> Timing:
                async with open_store(dim, collection_name=writer.collection_name) as store:
                    return await checked(nodes, lambda: asyncio.gather(*map(store.aquery, queries)))()

            return measure

        return await alternate({"upstream": side(backend.upstream), "ours": side(backend.ours)}, rounds)


async def _adding(backend: Backend, dim: int, rounds: int, count: int) -> dict[str, list[Timing]]:
    nodes = make_nodes(count, dim)

    def side(open_store: Callable[..., Any]) -> Side:
        async def measure() -> Timing:
            async with open_store(dim) as store:
                timing = await timed(lambda: asyncio.gather(*(store.async_add([node]) for node in nodes)))
                backend.check_stored(store.collection_name, nodes)
            return timing

        return measure

    return await alternate({"upstream": side(backend.upstream), "ours": side(backend.ours)}, rounds)
