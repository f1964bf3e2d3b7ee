"""What the record costs that an ingestion keeps in each row: the same write with it and without."""

from __future__ import annotations

from typing import Any

from benchmarks.backend import Backend
from benchmarks.corpus import make_nodes
from benchmarks.ingestion_again import records_of
from benchmarks.measure import Figure, Outcome, Side, Timing, alternate, cpu_seconds, ratios, seconds, timed
from llama_index_milvus_async_ext._lane.port import LoopPort
from llama_index_milvus_async_ext._store.writing import Write


async def run(backend: Backend, *, dim: int, rounds: int, count: int) -> Outcome:
    """Write `count` nodes, with the record and without."""
    nodes = make_nodes(count, dim)

    def writing(with_record: bool) -> Side:
        async def measure() -> Timing:
            async with backend.ours(dim) as store:
                connected, port = store.live(), LoopPort.current()
                with connected.held(port):

                    async def work() -> Any:
                        if not with_record:
                            return await store.awrite(nodes)
                        return await Write(store, connected, port, nodes, records=records_of(nodes)).run()

                    timing = await timed(work)
                    backend.check_stored(store.collection_name, nodes)
            return timing

        return measure

    timings = await alternate({"without": writing(False), "with": writing(True)}, rounds)
    of, to = timings["with"], timings["without"]
    workload = f"{count:,} nodes of {dim} dimensions, with an ingestion's record"
    figures = [
        Figure(f"{workload}: rows/s", "`awrite` of the same", 0.95, ratios(seconds(to), seconds(of)), unit="%"),
        Figure(f"{workload}: client CPU", "`awrite` of the same", None, ratios(cpu_seconds(of), cpu_seconds(to)), True),
    ]
    return Outcome(
        figures,
        {
            "count": count,
            "seconds": {name: seconds(taken) for name, taken in timings.items()},
            "client_cpu_microseconds_per_row": {
                name: [each / count * 1e6 for each in cpu_seconds(taken)] for name, taken in timings.items()
            },
        },
    )
