"""Many searches at once, and one on an idle store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from llama_index.core.schema import BaseNode

from benchmarks import ready_made
from benchmarks.backend import Backend, check_answers, queries_for
from benchmarks.corpus import make_nodes
from benchmarks.measure import (
    Figure,
    Outcome,
    Side,
    Timing,
    alternate,
    cpu_seconds,
    fastest,
    percentile,
    ratios,
    seconds,
    settle,
    timed,
)

STORED_ROWS = 2_000
_CEILING_IN_FLIGHT = (2, 4, 8)
_QUERIES_PER_REQUEST = 100
_PARSED = "ready-made, 4 in flight, nodes by upstream's parser"
_IDLE_BLOCK = 25


async def run(backend: Backend, *, dim: int, rounds: int, count: int) -> Outcome:
    """Search `count` times at once, under Strong and Bounded consistency, and one by one."""
    outcome = Outcome(series={"count": count, "seconds": {}})
    for level in ("Strong", "Bounded"):
        timings = await _concurrent(backend, dim, rounds, count, level)
        ceilings = {name: taken for name, taken in timings.items() if name.startswith("ready-made") and name != _PARSED}
        ceiling = fastest(ceilings)
        ours = seconds(timings["ours, async"])
        workload = f"{count:,} concurrent searches, {level}"
        outcome.figures += [
            Figure(workload, "upstream the same way", 3.0, ratios(seconds(timings["upstream, async"]), ours)),
            Figure(
                workload,
                f"ready-made nq={_QUERIES_PER_REQUEST} requests",
                0.9,
                ratios(seconds(timings[ceiling]), ours),
                unit="%",
                note=f"best: {ceiling}",
            ),
            Figure(
                f"{workload}: client CPU",
                "the ready-made requests', nodes by upstream's parser",
                0.7,
                ratios(cpu_seconds(timings["ours, async"]), cpu_seconds(timings[_PARSED])),
                True,
            ),
            Figure(
                f"{workload}: client CPU",
                "the ready-made requests', nodes by the shortest way",
                None,
                ratios(cpu_seconds(timings["ours, async"]), cpu_seconds(timings[ceiling])),
                True,
            ),
        ]
        outcome.series["seconds"][level] = {name: seconds(taken) for name, taken in timings.items()}
        outcome.series.setdefault("cpu", {})[level] = {name: cpu_seconds(taken) for name, taken in timings.items()}
        outcome.series["ceiling"] = ceiling
    outcome.figures.append(await _idle(backend, dim, rounds))
    return outcome


def checked(nodes: Sequence[BaseNode], search: Callable[[], Awaitable[Sequence[Any]]]) -> Side:
    """A side that searches, and whose answers have to be these nodes, in their order."""

    async def measure() -> Timing:
        results: list[Any] = []

        async def work() -> None:
            results.extend(await search())

        timing = await timed(work)
        check_answers(nodes, results)
        return timing

    return measure


async def _concurrent(backend: Backend, dim: int, rounds: int, count: int, level: str) -> dict[str, list[Timing]]:
    stored = make_nodes(STORED_ROWS, dim)
    nodes = stored[:count]
    queries = queries_for(nodes)
    async with backend.ours(dim, consistency_level=level) as writer:
        await writer.async_add(stored)
        backend.check_stored(writer.collection_name, stored)
        collection = writer.collection_name
        requests = ready_made.search_requests(collection, queries, _QUERIES_PER_REQUEST)

        def concurrent(open_store: Callable[..., Any]) -> Side:
            async def measure() -> Timing:
                async with open_store(dim, collection_name=collection, consistency_level=level) as store:
                    return await checked(nodes, lambda: asyncio.gather(*map(store.aquery, queries)))()

            return measure

        def ceiling(in_flight: int, parser: Any = None) -> Side:
            return checked(
                nodes,
                lambda: ready_made.search(
                    backend.client, requests, _QUERIES_PER_REQUEST, in_flight, len(queries), parser
                ),
            )

        sides = {"upstream, async": concurrent(backend.upstream), "ours, async": concurrent(backend.ours)}
        ceilings = {f"ready-made, {in_flight} in flight": ceiling(in_flight) for in_flight in _CEILING_IN_FLIGHT}
        async with backend.upstream(dim, collection_name=collection) as parser:
            return await alternate(sides | ceilings | {_PARSED: ceiling(4, parser)}, rounds)


async def _idle(backend: Backend, dim: int, rounds: int) -> Figure:
    """One search at a time, in short blocks of each side, so that both meet the same state of the machine."""
    stored = make_nodes(STORED_ROWS, dim)
    pairs = list(zip(stored[:_IDLE_BLOCK], queries_for(stored[:_IDLE_BLOCK]), strict=True))
    async with backend.ours(dim, consistency_level="Bounded") as ours:
        await ours.async_add(stored)
        backend.check_stored(ours.collection_name, stored)
        async with backend.upstream(dim, collection_name=ours.collection_name) as upstream:
            relative = []
            for _ in range(rounds):
                latencies: dict[bool, list[float]] = {True: [], False: []}
                settle()
                for is_ours in (True, False) * 4:
                    store = ours if is_ours else upstream
                    for node, query in pairs:
                        before = time.perf_counter()
                        result = await store.aquery(query)
                        latencies[is_ours].append(time.perf_counter() - before)
                        check_answers([node], [result])
                relative.append(percentile(latencies[True], 0.5) / percentile(latencies[False], 0.5))
    return Figure("one search on an idle store, Bounded", "upstream's median latency", 1.05, relative, True)
