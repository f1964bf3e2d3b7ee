"""A server that is some way off, as Zilliz Cloud is: opening a store, bulk, single adds, searches, 20 ms each way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from benchmarks.backend import Backend, queries_for
from benchmarks.corpus import make_nodes
from benchmarks.delay import delayed
from benchmarks.measure import Figure, Outcome, Side, Timing, alternate, ratios, seconds, timed
from benchmarks.searches import checked
from benchmarks.single import opening_both

_SECONDS_EACH_WAY = 0.02
_STORED_ROWS = 2_000
_SEARCHES = _ADDS = 1_000
_BULK = 5_000


async def run(backend: Backend, *, dim: int, rounds: int) -> Outcome:
    """Ours against upstream's store, the same way through the same proxy.

    The stores stay open, as a service's do: a connection that is new, or was idle, lets through 64 KB in each round
    trip at first, and twice as much in each that follows. So the first round is slower on both sides.
    """
    outcome = Outcome(series={"seconds each way": _SECONDS_EACH_WAY})
    options = {"consistency_level": "Bounded", "upsert_mode": True}
    with delayed(urlsplit(backend.uri).netloc, _SECONDS_EACH_WAY) as uri:
        far = Backend(uri, backend.token)
        try:
            stored = make_nodes(_STORED_ROWS, dim)
            async with far.ours(dim, **options) as ours, far.upstream(dim, **options) as upstream:
                stores = {"ours": ours, "upstream": upstream}
                for store in stores.values():
                    await store.async_add(stored)
                opened = await opening_both(far, dim, ours.collection_name, rounds)
                _note(outcome, "opening a store, another one being open", opened, 1.5, is_lower_better=True)
                found = await alternate({name: _searching(store, stored) for name, store in stores.items()}, rounds)
                _note(outcome, f"{_SEARCHES:,} concurrent searches", found, 5.0)
                for workload, count, write in (
                    (f"{_BULK:,} nodes in one call", _BULK, _in_one_call),
                    (f"{_ADDS:,} concurrent adds", _ADDS, _one_by_one),
                ):
                    sides = {name: _writing(far, store, dim, count, write) for name, store in stores.items()}
                    _note(outcome, workload, await alternate(sides, rounds), 4.0)
        finally:
            far.close()
    return outcome


def _note(
    outcome: Outcome, workload: str, taken: dict[str, list[Timing]], target: float, is_lower_better: bool = False
) -> None:
    ours, upstream = seconds(taken["ours"]), seconds(taken["upstream"])
    figures = ratios(ours, upstream) if is_lower_better else ratios(upstream, ours)
    outcome.figures.append(Figure(f"20 ms away: {workload}", "upstream the same way", target, figures, is_lower_better))
    outcome.series[workload] = {"ours": ours, "upstream": upstream}


def _searching(store: Any, stored: list[Any]) -> Side:
    nodes = stored[:_SEARCHES]
    queries = queries_for(nodes)
    return checked(nodes, lambda: asyncio.gather(*map(store.aquery, queries)))


async def _in_one_call(store: Any, nodes: list[Any]) -> None:
    await store.async_add(nodes)


async def _one_by_one(store: Any, nodes: list[Any]) -> None:
    await asyncio.gather(*(store.async_add([node]) for node in nodes))


def _writing(
    backend: Backend, store: Any, dim: int, count: int, write: Callable[[Any, list[Any]], Awaitable[None]]
) -> Side:
    round_number = 0

    async def measure() -> Timing:
        nonlocal round_number
        round_number += 1
        nodes = make_nodes(count, dim, prefix=f"{count}-{round_number}")
        timing = await timed(lambda: write(store, nodes))
        backend.check_holds(store.collection_name, nodes)
        return timing

    return measure
