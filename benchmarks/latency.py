"""Latency of searches against the number of callers that search at the same time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.backend import Backend, check_answers, queries_for
from benchmarks.corpus import make_nodes
from benchmarks.measure import Outcome, percentile, settle
from benchmarks.searches import STORED_ROWS

CONCURRENCIES = (1, 3, 10, 30, 100, 300, 1_000)
_LEAST_SEARCHES = 200


async def run(backend: Backend, *, dim: int, rounds: int, concurrencies: Sequence[int] = CONCURRENCIES) -> Outcome:
    """Callers that search again as soon as they have their answer; p50 and p95 over all rounds, in seconds."""
    stored = make_nodes(STORED_ROWS, dim)
    queries = queries_for(stored)
    series: dict[str, dict[int, dict[str, float]]] = {"upstream": {}, "ours": {}}
    async with backend.ours(dim, consistency_level="Bounded") as ours:
        await ours.async_add(stored)
        backend.check_stored(ours.collection_name, stored)
        async with backend.upstream(dim, collection_name=ours.collection_name) as upstream:
            for concurrency in concurrencies:
                taken: dict[str, list[float]] = {"upstream": [], "ours": []}
                spent = dict.fromkeys(taken, 0.0)
                for _ in range(rounds):
                    for name, store in (("upstream", upstream), ("ours", ours)):
                        settle()
                        before = time.perf_counter()
                        taken[name] += await _latencies(store, stored, queries, concurrency)
                        spent[name] += time.perf_counter() - before
                for name, values in taken.items():
                    shares = {"p50": percentile(values, 0.5), "p95": percentile(values, 0.95)}
                    series[name][concurrency] = shares | {"rate": len(values) / spent[name]}
    return Outcome(series=series)


async def _latencies(store: Any, nodes: Sequence[Any], queries: Sequence[Any], concurrency: int) -> list[float]:
    waiting = iter(range(max(_LEAST_SEARCHES, 2 * concurrency)))
    taken: list[float] = []
    answered: list[tuple[Any, Any]] = []

    async def caller() -> None:
        for number in waiting:
            index = number % len(nodes)
            before = time.perf_counter()
            result = await store.aquery(queries[index])
            taken.append(time.perf_counter() - before)
            answered.append((nodes[index], result))

    await asyncio.gather(*(caller() for _ in range(concurrency)))
    check_answers([node for node, _ in answered], [result for _, result in answered])
    return taken
