"""Services: clients that search one after the other, on an idle server and beside a bulk write."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.backend import Backend, WrongAnswerError, check_answers, queries_for
from benchmarks.corpus import make_nodes
from benchmarks.measure import Figure, Outcome, alternate, percentile, ratios, settle

STORED_ROWS = 2_000
_CLIENTS = 64
_CLIENTS_BESIDE = 8
_SECONDS = 5.0
_PAUSE_SECONDS = 0.02  # of a client that does something with its answer


@dataclass(frozen=True)
class Run:
    """What clients measured together: each search's seconds, the time it took in all, and this process's CPU time."""

    latencies: list[float]
    seconds: float
    cpu_seconds: float
    write_seconds: float = 0.0
    during_write: tuple[float, ...] = ()

    @property
    def rate(self) -> float:
        return len(self.latencies) / self.seconds

    @property
    def cpu_of_one(self) -> float:
        return self.cpu_seconds / len(self.latencies)

    def at(self, share: float) -> float:
        return percentile(self.latencies, share)


async def run(backend: Backend, *, dim: int, rounds: int, rows: int, large: int, seconds: float = _SECONDS) -> Outcome:
    """64 clients for some seconds; 8 clients beside a bulk write of as many `rows`; one beside a `large` one."""
    stored = make_nodes(STORED_ROWS, dim)
    outcome = Outcome()
    async with backend.ours(dim, consistency_level="Bounded") as ours:
        await ours.async_add(stored)
        backend.check_stored(ours.collection_name, stored)
        async with backend.upstream(dim, collection_name=ours.collection_name) as upstream:
            await _many(outcome, stored, ours, upstream, rounds, seconds)
            await _beside(outcome, backend, stored, ours, upstream, dim, rounds, rows, seconds)
        await _beside_large(outcome, backend, stored, ours, dim, rounds, large, seconds)
    return outcome


async def _many(outcome: Outcome, stored: list[Any], ours: Any, upstream: Any, rounds: int, seconds: float) -> None:
    sides = {name: _side(stored, store, _CLIENTS, seconds) for name, store in (("ours", ours), ("upstream", upstream))}
    runs = await alternate(sides, rounds)
    mine, theirs = runs["ours"], runs["upstream"]
    workload = f"{_CLIENTS} clients, one search after another, {seconds:g} s"
    outcome.figures += [
        Figure(f"{workload}: searches/s", "upstream", 3.5, ratios([r.rate for r in mine], [r.rate for r in theirs])),
        Figure(
            f"{workload}: p99", "upstream", 0.25, ratios([r.at(0.99) for r in mine], [r.at(0.99) for r in theirs]), True
        ),
        Figure(
            f"{workload}: client CPU per search",
            "upstream",
            None,
            ratios([r.cpu_of_one for r in mine], [r.cpu_of_one for r in theirs]),
            True,
        ),
    ]
    outcome.series["clients"] = {
        name: [{"rate": r.rate, "p50": r.at(0.5), "p99": r.at(0.99), "cpu": r.cpu_seconds} for r in each]
        for name, each in runs.items()
    }


async def _beside(
    outcome: Outcome,
    backend: Backend,
    stored: list[Any],
    ours: Any,
    upstream: Any,
    dim: int,
    rounds: int,
    rows: int,
    seconds: float,
) -> None:
    sides: dict[str, Callable[[], Awaitable[Run]]] = {}
    for name, searcher, writer in (
        ("ours beside ours", ours, backend.ours),
        ("upstream beside upstream", upstream, backend.upstream),
        ("upstream beside ours", upstream, backend.ours),
    ):
        sides[name] = _side(stored, searcher, _CLIENTS_BESIDE, seconds, lambda writer=writer: writer(dim), rows, dim)
    runs = await alternate(sides, rounds)
    mine, theirs, mixed = (runs[name] for name in sides)
    workload = f"{_CLIENTS_BESIDE} clients, {seconds:g} s, beside a write of {rows:,} nodes"
    outcome.figures += [
        Figure(
            f"{workload}: p99",
            "upstream's beside upstream's write",
            1.0,
            ratios([r.at(0.99) for r in mine], [r.at(0.99) for r in theirs]),
            True,
        ),
        Figure(
            f"{workload}: the write",
            "upstream's beside upstream's searches",
            2.0,
            ratios([r.write_seconds for r in theirs], [r.write_seconds for r in mine]),
        ),
        Figure(
            f"{workload}: p50 while it is under way",
            "upstream's beside our write",
            1.0,
            ratios([percentile(r.during_write, 0.5) for r in mine], [percentile(r.during_write, 0.5) for r in mixed]),
            True,
        ),
    ]
    outcome.series["beside"] = {
        name: [
            {
                "p50": r.at(0.5),
                "p99": r.at(0.99),
                "during p50": percentile(r.during_write, 0.5),
                "write": r.write_seconds,
                "searches": len(r.latencies),
                "cpu": r.cpu_seconds,
            }
            for r in each
        ]
        for name, each in runs.items()
    }


async def _beside_large(
    outcome: Outcome, backend: Backend, stored: list[Any], ours: Any, dim: int, rounds: int, rows: int, seconds: float
) -> None:
    """One search after another, on an idle server and while somebody else writes for longer than they last."""
    queries = queries_for(stored)
    nodes = make_nodes(rows, dim)

    async def latencies(until: float) -> list[float]:
        taken = []
        while time.perf_counter() < until:
            place = len(taken) % len(queries)
            before = time.perf_counter()
            result = await ours.aquery(queries[place])
            taken.append(time.perf_counter() - before)
            check_answers([stored[place]], [result])
            await asyncio.sleep(_PAUSE_SECONDS)
        return taken

    idle, first, beside = [], [], []
    for _ in range(rounds):
        settle()
        idle.append(percentile(await latencies(time.perf_counter() + seconds / 2), 0.5))
        async with backend.ours(dim) as writer:
            settle()
            writing = asyncio.create_task(writer.async_add(nodes))
            await asyncio.sleep(0)  # it has begun
            before = time.perf_counter()
            await ours.aquery(queries[0])
            first.append(time.perf_counter() - before)
            beside.append(percentile(await latencies(time.perf_counter() + seconds), 0.5))
            if writing.done():
                raise WrongAnswerError("the write was over before the searches were")
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
    workload = f"one search after another while {rows:,} nodes are being written"
    outcome.figures += [
        Figure(f"{workload}: p50", "on an idle server", 5.0, ratios(beside, idle), True),
        Figure(f"{workload}: the first one", "p50 on an idle server", None, ratios(first, idle), True),
    ]
    outcome.series["beside a large write"] = {"idle": idle, "beside": beside, "first": first}


def _side(
    stored: list[Any],
    store: Any,
    clients: int,
    seconds: float,
    open_writer: Callable[[], Any] | None = None,
    rows: int = 0,
    dim: int = 0,
) -> Callable[[], Awaitable[Run]]:
    queries = queries_for(stored)

    async def measure() -> Run:
        latencies: list[tuple[float, float]] = []
        written = 0.0

        async def client(number: int) -> None:
            place = number
            while time.perf_counter() < until:
                before = time.perf_counter()
                result = await store.aquery(queries[place % len(queries)])
                latencies.append((before, time.perf_counter() - before))
                check_answers([stored[place % len(queries)]], [result])
                place += clients

        async def write() -> None:
            nonlocal written
            before = time.perf_counter()
            await writer.async_add(nodes)
            written = time.perf_counter() - before

        async def all_clients() -> None:
            await asyncio.gather(*map(client, range(clients)))

        if open_writer is None:
            settle()
            cpu, started = time.process_time(), time.perf_counter()
            until = started + seconds
            await all_clients()
        else:
            nodes = make_nodes(rows, dim)
            async with open_writer() as writer:
                settle()
                cpu, started = time.process_time(), time.perf_counter()
                until = started + seconds
                await asyncio.gather(all_clients(), write())
        taken = time.perf_counter() - started
        during = tuple(latency for before, latency in latencies if before < started + written)
        return Run([latency for _, latency in latencies], taken, time.process_time() - cpu, written, during)

    return measure
