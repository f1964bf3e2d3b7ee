"""Many nodes in one call: ours, upstream's ways, and the ceiling of ready-made requests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from llama_index.core.schema import BaseNode
from llama_index.vector_stores.milvus import MilvusVectorStore

from benchmarks import ready_made
from benchmarks.backend import Backend
from benchmarks.corpus import make_nodes
from benchmarks.measure import Figure, Outcome, Side, alternate, cpu_seconds, fastest, ratios, seconds, timed

_CEILING_IN_FLIGHT = (2, 4, 8)
_CEILING_ROWS_PER_REQUEST = (250, 500, 1_000)
_CEILINGS_KEPT = 3
_SEMAPHORE, _ROWS_PER_CALL = 8, 500
_SEMAPHORES, _INSERTS = "upstream, batches behind a semaphore", "ours, one call, upsert_mode=False"

# How a side measures its work; `timed` gives its `Timing`.
Measured = Callable[[Callable[[], Awaitable[object]]], Awaitable[Any]]


async def run(backend: Backend, *, dim: int, rounds: int, count: int, is_quick: bool) -> Outcome:
    """Compare ways to write `count` nodes."""
    nodes = make_nodes(count, dim)
    ceilings = await _best_ceilings(backend, dim, nodes, is_quick)
    await _check_same_rows(backend, dim, nodes)
    sides = {
        "upstream, one call": writing(backend, backend.upstream, dim, nodes, one_call),
        "ours, one call": writing(backend, backend.ours, dim, nodes, one_call),
    }
    if not is_quick:
        sides[_SEMAPHORES] = writing(
            backend, backend.upstream, dim, nodes, _behind_semaphore, batch_size=_ROWS_PER_CALL
        )
        sides[_INSERTS] = writing(backend, backend.ours, dim, nodes, one_call, upsert_mode=False)
    timings = await alternate(sides | ceilings, rounds)
    ceiling = fastest({name: timings[name] for name in ceilings})
    ours = timings["ours, one call"]
    upstream = timings["upstream, one call"]
    bulk = f"{count:,} nodes in one call"
    figures = [
        Figure(bulk, "upstream's one call", 3.0, ratios(seconds(upstream), seconds(ours))),
        Figure(
            bulk,
            "the ceiling: ready-made upserts",
            0.9,
            ratios(seconds(timings[ceiling]), seconds(ours)),
            unit="%",
            note=f"best: {ceiling}",
        ),
        Figure(f"{bulk}: client CPU", "upstream's", None, ratios(cpu_seconds(ours), cpu_seconds(upstream)), True),
        Figure(
            f"{bulk}: client CPU",
            "the ceiling's",
            2.5,
            ratios(cpu_seconds(ours), cpu_seconds(timings[ceiling])),
            True,
        ),
    ]
    if not is_quick:
        figures += [
            Figure(
                f"{bulk}, upsert_mode=False",
                "upstream's one call",
                None,
                ratios(seconds(upstream), seconds(timings[_INSERTS])),
            ),
            Figure(
                bulk,
                "upstream's batches behind a semaphore",
                None,
                ratios(seconds(timings[_SEMAPHORES]), seconds(ours)),
            ),
        ]
    series = {
        "count": count,
        "ceiling": ceiling,
        "seconds": {name: seconds(taken) for name, taken in timings.items()},
        "cpu_seconds": {name: cpu_seconds(taken) for name, taken in timings.items()},
    }
    return Outcome(figures, series)


async def one_call(store: MilvusVectorStore, nodes: list[BaseNode]) -> None:
    await store.async_add(nodes)


async def _behind_semaphore(store: MilvusVectorStore, nodes: list[BaseNode]) -> None:
    """What a careful user of upstream's store writes."""
    semaphore = asyncio.Semaphore(_SEMAPHORE)

    async def add(batch: list[BaseNode]) -> None:
        async with semaphore:
            await store.async_add(batch)

    await asyncio.gather(*(add(nodes[n : n + _ROWS_PER_CALL]) for n in range(0, len(nodes), _ROWS_PER_CALL)))


def writing(
    backend: Backend,
    open_store: Callable[..., Any],
    dim: int,
    nodes: list[BaseNode],
    write: Any,
    *,
    measured: Measured = timed,
    **options: Any,
) -> Callable[[], Awaitable[Any]]:
    """A side that writes the nodes through a store."""

    async def measure() -> Any:
        async with open_store(dim, **options) as store:
            timing = await measured(lambda: write(store, nodes))
            backend.check_stored(store.collection_name, nodes)
        return timing

    return measure


def sending(
    backend: Backend,
    dim: int,
    nodes: list[BaseNode],
    rows: list[dict[str, Any]],
    in_flight: int,
    per_request: int,
    *,
    measured: Measured = timed,
) -> Callable[[], Awaitable[Any]]:
    """A side that sends ready-made requests with the rows of the nodes."""

    async def measure() -> Any:
        # The collection is made by ours, so that all sides write to the same kind of collection.
        async with backend.ours(dim) as store:
            requests = ready_made.write_requests(
                backend.client, store.collection_name, rows, per_request, upsert=store.upsert_mode
            )
            timing = await measured(lambda: ready_made.send(backend.client, "Upsert", requests, in_flight))
            backend.check_stored(store.collection_name, nodes)
        return timing

    return measure


async def _best_ceilings(backend: Backend, dim: int, nodes: list[BaseNode], is_quick: bool) -> dict[str, Side]:
    """The ways to send ready-made requests that did best in one try each."""
    rows = ready_made.upstream_rows(nodes)
    sides = {
        f"ready-made, {in_flight} in flight, {per_request} rows each": sending(
            backend, dim, nodes, rows, in_flight, per_request
        )
        for in_flight in _CEILING_IN_FLIGHT
        for per_request in (_CEILING_ROWS_PER_REQUEST[1:2] if is_quick else _CEILING_ROWS_PER_REQUEST)
        if len(nodes) >= in_flight * per_request
    }
    timings = await alternate(sides, 1)
    best = sorted(timings, key=lambda name: timings[name][0].seconds)
    return {name: sides[name] for name in best[: 1 if is_quick else _CEILINGS_KEPT]}


async def _check_same_rows(backend: Backend, dim: int, nodes: list[BaseNode]) -> None:
    """The ceiling is one only if it stores what ours stores, and so is the comparison with upstream."""
    sample = nodes[:500]
    async with backend.ours(dim) as ours, backend.upstream(dim) as upstream, backend.ours(dim) as empty:
        await ours.async_add(sample)
        await upstream.async_add(sample)
        rows = ready_made.upstream_rows(sample)
        requests = ready_made.write_requests(backend.client, empty.collection_name, rows, 250, upsert=True)
        await ready_made.send(backend.client, "Upsert", requests, 2)
        backend.check_same_rows([store.collection_name for store in (ours, upstream, empty)], sample)
