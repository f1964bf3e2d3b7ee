"""Cost of a row against the number of rows that are written in one call."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from llama_index.core.schema import BaseNode

from benchmarks import bulk, ready_made
from benchmarks.backend import Backend
from benchmarks.corpus import make_nodes
from benchmarks.measure import Figure, Outcome, Side, Timing, alternate, cpu_seconds, seconds, timed

SIZES = (1_000, 3_000, 10_000, 30_000, 100_000, 200_000)
_LARGEST_READY_MADE = 100_000  # requests made beforehand take memory
_LARGEST_UPSTREAM = 30_000  # it takes a third of a second per thousand rows, however many they are
_IN_FLIGHT, _ROWS_PER_REQUEST = 6, 800
_ROWS_PER_ROUND = 10_000


async def run(backend: Backend, *, dim: int, rounds: int, sizes: Sequence[int] = SIZES) -> Outcome:
    """Write collections of several sizes; a figure is the dearest size's cost over the cheapest's.

    What the wall time of ready-made requests grows by is the server's own part.
    """
    nodes = make_nodes(max(sizes), dim)
    rows = ready_made.upstream_rows(nodes[:_LARGEST_READY_MADE])
    ours = {f"ours, {size}": _writing(backend, backend.ours, dim, nodes, size) for size in sizes}
    plain = {
        f"upstream, {size}": _writing(backend, backend.upstream, dim, nodes, size)
        for size in sizes
        if size <= _LARGEST_UPSTREAM
    }
    ready = {
        f"ready-made, {size}": bulk.sending(backend, dim, nodes[:size], rows[:size], _IN_FLIGHT, _ROWS_PER_REQUEST)
        for size in sizes
        if size <= _LARGEST_READY_MADE
    }
    timings = await alternate(ours | plain | ready, rounds)

    def costs(side: str, of: Callable[[Sequence[Timing]], list[float]]) -> dict[int, list[float]]:
        return {
            size: [taken / size for taken in of(timings[f"{side}, {size}"])]
            for size in sizes
            if f"{side}, {size}" in timings
        }

    cpu, wall, server = costs("ours", cpu_seconds), costs("ours", seconds), costs("ready-made", seconds)
    workload = f"cost per row, {min(sizes):,} to {max(sizes):,} rows"
    itself = "itself, dearest over cheapest size"
    figures = [
        Figure(f"{workload}, client CPU", itself, 1.2, [_spread(cpu)], True),
        Figure(f"{workload}, wall time", itself, 1.2, [_spread(wall)], True),
        Figure(
            f"ready-made requests, {min(server):,} to {max(server):,} rows, wall time",
            itself,
            None,
            [_spread(server)],
            True,
        ),
    ]
    series = {
        "cpu_seconds_per_row": cpu,
        "seconds_per_row": wall,
        "ready_made_seconds_per_row": server,
        "upstream_cpu_seconds_per_row": costs("upstream", cpu_seconds),
        "upstream_seconds_per_row": costs("upstream", seconds),
    }
    return Outcome(figures, series)


def _writing(backend: Backend, open_store: Callable[..., Any], dim: int, nodes: list[BaseNode], size: int) -> Side:
    """Writes of one size; a small one several times over, as one alone would be over before it says much."""
    repeats = max(_ROWS_PER_ROUND // size, 1)

    async def measure() -> Timing:
        async with open_store(dim) as store:
            parts = [nodes[start : start + size] for start in range(0, repeats * size, size)]
            taken = [await timed(lambda part=part: store.async_add(part)) for part in parts]  # type: ignore[misc]
            backend.check_stored(store.collection_name, nodes[: repeats * size])
        return Timing(statistics.median(seconds(taken)), statistics.median(cpu_seconds(taken)))

    return measure


def _spread(costs: dict[int, list[float]]) -> float:
    medians = [statistics.median(values) for values in costs.values()]
    return max(medians) / min(medians)
