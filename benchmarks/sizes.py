"""Cost of a row against the number of rows that are written in one call."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from llama_index.core.schema import BaseNode

from benchmarks.backend import Backend
from benchmarks.corpus import make_nodes
from benchmarks.measure import Figure, Outcome, Side, Timing, alternate, cpu_seconds, seconds, timed

SIZES = (1_000, 3_000, 10_000, 30_000, 100_000, 200_000)


async def run(backend: Backend, *, dim: int, rounds: int, sizes: Sequence[int] = SIZES) -> Outcome:
    """Write collections of several sizes; the figure is the dearest size's cost over the cheapest's."""
    nodes = make_nodes(max(sizes), dim)
    sides = {str(size): _writing(backend, dim, nodes[:size]) for size in sizes}
    timings = await alternate(sides, rounds)
    cpu = {size: [taken / size for taken in cpu_seconds(timings[str(size)])] for size in sizes}
    wall = {size: [taken / size for taken in seconds(timings[str(size)])] for size in sizes}
    workload = f"cost per row, {min(sizes):,} to {max(sizes):,} rows"
    figures = [
        Figure(f"{workload}, client CPU", "itself, dearest over cheapest size", 1.2, [_spread(cpu)], True),
        Figure(f"{workload}, wall time", "itself, dearest over cheapest size", 1.2, [_spread(wall)], True),
    ]
    return Outcome(figures, {"cpu_seconds_per_row": cpu, "seconds_per_row": wall})


def _writing(backend: Backend, dim: int, nodes: list[BaseNode]) -> Side:
    async def measure() -> Timing:
        async with backend.ours(dim) as store:
            timing = await timed(lambda: store.async_add(nodes))
            backend.check_stored(store.collection_name, nodes)
        return timing

    return measure


def _spread(costs: dict[int, list[float]]) -> float:
    medians = [statistics.median(values) for values in costs.values()]
    return max(medians) / min(medians)
