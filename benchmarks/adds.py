"""The tutorial's comparison: 10, 100 and 1000 single adds and searches, one after the other or all at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import VectorStoreQuery
from llama_index.vector_stores.milvus import MilvusVectorStore

from benchmarks.backend import Backend, check_answers, queries_for
from benchmarks.corpus import make_nodes
from benchmarks.measure import Figure, Outcome, Side, Timing, alternate, ratios, seconds, timed

_STORED_ROWS = 2_000


async def run(backend: Backend, *, dim: int, rounds: int, counts: Sequence[int] = (10, 100, 1_000)) -> Outcome:
    """Add and search, sync and async, ours and upstream."""
    outcome = Outcome(series={"adds": {}, "searches": {}})
    for count in counts:
        adds = await _adds(backend, dim, count, rounds)
        searches = await _searches(backend, dim, count, rounds)
        outcome.series["adds"][count] = {name: seconds(timings) for name, timings in adds.items()}
        outcome.series["searches"][count] = {name: seconds(timings) for name, timings in searches.items()}
        ours = seconds(adds["ours, async"])
        is_largest = count == max(counts)
        faster = ratios(seconds(adds["upstream, async"]), ours)
        faster_than_sync = ratios(seconds(adds["upstream, sync"]), ours)
        workload = f"{count:,} concurrent `async_add([node])`"
        outcome.figures += [
            Figure(workload, "upstream the same way", 5.0 if is_largest else None, faster),
            Figure(workload, "upstream's sync loop", 20.0 if is_largest else None, faster_than_sync),
        ]
    return outcome


async def _adds(backend: Backend, dim: int, count: int, rounds: int) -> dict[str, list[Timing]]:
    nodes = make_nodes(count, dim)

    def side(open_store: Callable[..., Any], add: Callable[[MilvusVectorStore], Awaitable[None]]) -> Side:
        async def measure() -> Timing:
            async with open_store(dim) as store:
                timing = await timed(lambda: add(store))
                backend.check_stored(store.collection_name, nodes)
            return timing

        return measure

    async def one_by_one(store: MilvusVectorStore) -> None:
        for node in nodes:
            store.add([node])

    async def at_once(store: MilvusVectorStore) -> None:
        await asyncio.gather(*(store.async_add([node]) for node in nodes))

    return await alternate(_sides(backend, side, one_by_one, at_once), rounds)


async def _searches(backend: Backend, dim: int, count: int, rounds: int) -> dict[str, list[Timing]]:
    stored = make_nodes(_STORED_ROWS, dim)
    nodes: list[BaseNode] = stored[:count]
    queries: list[VectorStoreQuery] = queries_for(nodes)
    async with backend.ours(dim) as writer:
        await writer.async_add(stored)
        backend.check_stored(writer.collection_name, stored)

        def side(open_store: Callable[..., Any], search: Callable[[Any, list[Any]], Awaitable[None]]) -> Side:
            async def measure() -> Timing:
                results: list[Any] = []
                async with open_store(dim, collection_name=writer.collection_name) as store:
                    timing = await timed(lambda: search(store, results))
                check_answers(nodes, results)
                return timing

            return measure

        async def one_by_one(store: MilvusVectorStore, results: list[Any]) -> None:
            results.extend([store.query(query) for query in queries])

        async def at_once(store: MilvusVectorStore, results: list[Any]) -> None:
            results.extend(await asyncio.gather(*(store.aquery(query) for query in queries)))

        return await alternate(_sides(backend, side, one_by_one, at_once), rounds)


def _sides(backend: Backend, side: Callable[[Any, Any], Side], one_by_one: Any, at_once: Any) -> dict[str, Side]:
    return {
        "upstream, sync": side(backend.upstream, one_by_one),
        "upstream, async": side(backend.upstream, at_once),
        "ours, sync": side(backend.ours, one_by_one),
        "ours, async": side(backend.ours, at_once),
    }
