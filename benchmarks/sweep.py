"""The sweep that the store's defaults come from: rows and queries per request, requests in flight, three dimensions."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.__main__ import REPOSITORY, open_milvus
from benchmarks.backend import Backend, check_answers, queries_for
from benchmarks.corpus import make_nodes
from benchmarks.measure import timed

_DIMENSIONS = (384, 768, 1_536)


@dataclass(frozen=True)
class _Grid:
    """The combinations for one back end; those that could not use their slots are left out."""

    rows: int
    rows_per_request: tuple[int, ...]
    writes_in_flight: tuple[int, ...]
    queries: int
    queries_per_request: tuple[int, ...]
    searches_in_flight: tuple[int, ...]

    def points(self) -> list[dict[str, Any]]:
        writes = itertools.product(self.rows_per_request, self.writes_in_flight)
        searches = itertools.product(self.queries_per_request, self.searches_in_flight)
        return [
            {"kind": kind, "dim": dim, "per_request": per_request, "in_flight": in_flight, "per_second": []}
            for kind, total, pairs in (("rows", self.rows, list(writes)), ("queries", self.queries, list(searches)))
            for dim in _DIMENSIONS
            for per_request, in_flight in pairs
            if in_flight == 1 or per_request * (in_flight - 1) < total
        ]


_GRIDS = {
    # A first, wider sweep had one to sixteen in flight: one leaves a server idle, and sixteen added nothing to eight.
    "server": _Grid(10_000, (250, 500, 1_000, 2_000), (2, 4, 8), 1_000, (100, 250, 500), (2, 4, 8)),
    # Several writes in flight lose acknowledged rows of Milvus Lite in a crash: the store allows one.
    "Milvus Lite": _Grid(2_500, (100, 250, 500, 1_000, 2_500), (1,), 500, (50, 100, 250, 500), (1, 4)),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__)
    parser.add_argument("--uri", help="address of a Milvus server; one is started if none is given")
    parser.add_argument("--token", default=os.environ.get("MILVUS_TOKEN", ""), help="default: MILVUS_TOKEN is asked")
    parser.add_argument("--only", choices=list(_GRIDS), help="this back end only")
    parser.add_argument("--minutes", type=float, default=5.0, help="time for each back end")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results", help="folder for results")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    results: dict[str, Any] = {}
    if given.only != "Milvus Lite":
        with open_milvus(given.uri, given.token) as backend:
            results["machine"] = report.describe_machine(backend.client, os.getloadavg()[0])
            results["server"] = asyncio.run(_sweep(backend, _GRIDS["server"], given.minutes))
    if given.only != "server":
        with tempfile.TemporaryDirectory() as folder:
            backend = Backend(str(Path(folder) / "sweep.db"), is_lite=True)
            results["Milvus Lite"] = asyncio.run(_sweep(backend, _GRIDS["Milvus Lite"], given.minutes))
            backend.close()
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "sweep.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    for name in _GRIDS:
        for line in _summary(results.get(name, [])):
            print(f"{name}: {line}")


async def _sweep(backend: Backend, grid: _Grid, minutes: float) -> list[dict[str, Any]]:
    """Measure every combination, round after round, until the time is up; the first round is always complete."""
    ends_at = time.monotonic() + 60 * minutes
    points = grid.points()
    for number in itertools.count(1):
        for dim in _DIMENSIONS:
            of_dim = [point for point in points if point["dim"] == dim]
            first = number * len(of_dim) // 3 % len(of_dim)  # so that a drift of the machine favours none of them
            await _measure(backend, grid, dim, of_dim[first:] + of_dim[:first], ends_at if number > 1 else None)
        print(f"round {number} ended", file=sys.stderr)
        if time.monotonic() >= ends_at:
            break
    return points


async def _measure(
    backend: Backend, grid: _Grid, dim: int, points: list[dict[str, Any]], ends_at: float | None
) -> None:
    nodes = make_nodes(grid.rows, dim)
    asked = nodes[: grid.queries]
    queries = queries_for(asked)
    async with backend.ours(dim) as stored:
        await stored.async_add(nodes)
        backend.check_stored(stored.collection_name, nodes)
        for point in points:
            if ends_at is not None and time.monotonic() >= ends_at:
                return
            if point["kind"] == "rows":
                limits = {"batch_size": point["per_request"], "max_concurrency": point["in_flight"]}
                async with backend.ours(dim, max_batch_bytes=60 << 20, **limits) as store:
                    timing = await timed(lambda to=store: to.async_add(nodes))
                    backend.check_stored(store.collection_name, nodes)
                point["per_second"].append(grid.rows / timing.seconds)
            else:
                limits = {"max_batch_queries": point["per_request"], "max_concurrency": point["in_flight"]}
                async with backend.ours(dim, collection_name=stored.collection_name, **limits) as store:
                    results: list[Any] = []

                    async def search(of: Any = store, into: list[Any] = results) -> None:
                        into += await asyncio.gather(*map(of.aquery, queries))

                    timing = await timed(search)
                check_answers(asked, results)
                point["per_second"].append(grid.queries / timing.seconds)


def _summary(points: list[dict[str, Any]]) -> Iterable[str]:
    """For each kind and dimension, the best combinations; over all dimensions, the one that is best on the whole."""
    for kind in ("rows", "queries"):
        relative: dict[tuple[int, int], list[float]] = {}
        for dim in _DIMENSIONS:
            rates = {
                (point["per_request"], point["in_flight"]): statistics.median(point["per_second"])
                for point in points
                if point["kind"] == kind and point["dim"] == dim
            }
            if not rates:
                continue
            ordered = sorted(rates, key=lambda pair: -rates[pair])
            best = ", ".join(f"{per} x {flying} in flight {rates[per, flying]:,.0f}/s" for per, flying in ordered[:4])
            yield f"{kind}, {dim} dimensions: {best}"
            for pair, rate in rates.items():
                relative.setdefault(pair, []).append(rate / rates[ordered[0]])
        if not relative:
            continue
        overall = {pair: statistics.geometric_mean(shares) for pair, shares in relative.items()}
        yield f"{kind}, share of the best, mean of the dimensions: " + ", ".join(
            f"{per} x {flying} in flight {overall[per, flying]:.0%}"
            for per, flying in sorted(overall, key=lambda pair: -overall[pair])
        )


if __name__ == "__main__":
    main()
