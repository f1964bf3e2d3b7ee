"""The tutorial's comparison: 10, 100 and 1000 single adds and searches, one after the other or all at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import VectorStoreQuery
from llama_index.vector_stores.milvus import MilvusVectorStore

from benchmarks import ready_made
from benchmarks.backend import Backend, check_answers, queries_for
from benchmarks.bulk import sending
from benchmarks.corpus import make_nodes
from benchmarks.measure import Figure, Outcome, Side, Timing, alternate, cpu_seconds, ratios, seconds, timed

_STORED_ROWS = 2_000
_READY_MADE = "ready-made, one request"
_SIDES = {"upstream, async": "upstream the same way", "upstream, sync": "upstream's sync loop"}


async def run(
    backend: Backend, *, dim: int, rounds: int, is_quick: bool, counts: Sequence[int] = (10, 100, 1_000)
) -> Outcome:
    """Add and search, sync and async, ours and upstream; a quick run leaves the largest loop of sync searches out."""
    outcome = Outcome(series={"adds": {}, "searches": {}})
    for count in counts:
        is_largest = count == max(counts)
        adds = await _adds(backend, dim, count, rounds)
        searches = await _searches(backend, dim, count, rounds, with_sync=not (is_quick and is_largest))
        for kind, what, timings, targets in (
            ("adds", "`async_add([node])`", adds, (5.0, 20.0)),
            ("searches", "`aquery(query)`", searches, (None, None)),
        ):
            outcome.series[kind][count] = {name: seconds(taken) for name, taken in timings.items()}
            ours = seconds(timings["ours, async"])
            for (side, against), target in zip(_SIDES.items(), targets, strict=True):
                if side in timings:
                    faster = ratios(seconds(timings[side]), ours)
                    wanted = target if is_largest else None
                    outcome.figures.append(Figure(f"{count:,} concurrent {what}", against, wanted, faster))
            if _READY_MADE in timings and is_largest:
                outcome.figures.append(
                    Figure(
                        f"{count:,} concurrent {what}",
                        f"one ready-made upsert of {count:,} rows",
                        0.75,
                        ratios(seconds(timings[_READY_MADE]), ours),
                        unit="%",
                    )
                )
                figure = ratios(cpu_seconds(timings["ours, async"]), cpu_seconds(timings["upstream, async"]))
                outcome.figures.append(
                    Figure(f"{count:,} concurrent {what}: client CPU", "upstream the same way", None, figure, True)
                )
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

    sides = _sides(backend, side, one_by_one, at_once)
    sides[_READY_MADE] = sending(backend, dim, nodes, ready_made.upstream_rows(nodes), 1, count)
    return await alternate(sides, rounds)


async def _searches(backend: Backend, dim: int, count: int, rounds: int, with_sync: bool) -> dict[str, list[Timing]]:
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

        sides = _sides(backend, side, one_by_one, at_once)
        wanted = {name: measure for name, measure in sides.items() if with_sync or "async" in name}
        return await alternate(wanted, rounds)


def _sides(backend: Backend, side: Callable[[Any, Any], Side], one_by_one: Any, at_once: Any) -> dict[str, Side]:
    return {
        "upstream, sync": side(backend.upstream, one_by_one),
        "upstream, async": side(backend.upstream, at_once),
        "ours, sync": side(backend.ours, one_by_one),
        "ours, async": side(backend.ours, at_once),
    }
