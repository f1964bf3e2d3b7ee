"""The command line: `python -m benchmarks` runs the benchmarks and shows what they measured."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import adds, bulk, charts, clients, embedding, latency, lite, memory, report, searches, sizes
from benchmarks.backend import Backend
from benchmarks.measure import Outcome

_T = TypeVar("_T")
REPOSITORY = Path(__file__).resolve().parent.parent
_DIM = 768
# The disk was 12.3 GB fuller at the worst: `sizes` writes over a million rows, and a server keeps its log for days.
_DISK_BYTES = 15e9


@dataclass(frozen=True)
class _Scale:
    """How much is run: everything, or a short look."""

    is_quick: bool

    def of(self, full: _T, quick: _T) -> _T:
        """The one of two values that belongs to this scale."""
        return quick if self.is_quick else full

    @property
    def rounds(self) -> int:
        """Rounds of what takes its time, and varies little."""
        return self.of(3, 1)

    @property
    def many_rounds(self) -> int:
        """Rounds of what is over soon, and so varies much."""
        return self.of(9, 1)


_FULL_ONLY = ("embedding", "memory", "sizes")  # small sizes would say nothing


_WORKLOADS: dict[str, Callable[[Backend, _Scale], Coroutine[Any, Any, Outcome]]] = {
    "adds": lambda backend, scale: adds.run(
        backend,
        dim=_DIM,
        rounds=scale.many_rounds,
        is_quick=scale.is_quick,
        counts=scale.of((10, 100, 1_000), (1_000,)),
    ),
    "bulk": lambda backend, scale: bulk.run(
        backend,
        dim=_DIM,
        rounds=scale.many_rounds,
        count=scale.of(10_000, 4_000),
        is_quick=scale.is_quick,
    ),
    "searches": lambda backend, scale: searches.run(backend, dim=_DIM, rounds=scale.many_rounds, count=1_000),
    "lite": lambda backend, scale: lite.run(
        dim=_DIM, rounds=scale.rounds, searches=scale.of(200, 100), adds=scale.of(1_000, 300)
    ),
    "embedding": lambda backend, scale: embedding.run(
        backend, dim=_DIM, rounds=scale.many_rounds, count=scale.of(10_000, 2_000), is_quick=scale.is_quick
    ),
    "memory": lambda backend, scale: asyncio.to_thread(
        memory.run, backend.uri, backend.token, dim=_DIM, rounds=scale.rounds, count=100_000
    ),
    "sizes": lambda backend, scale: sizes.run(backend, dim=_DIM, rounds=scale.rounds),
    "clients": lambda backend, scale: clients.run(
        backend, dim=_DIM, rounds=scale.rounds, rows=scale.of(6_000, 2_000), seconds=scale.of(5.0, 2.0)
    ),
    "latency": lambda backend, scale: latency.run(
        backend,
        dim=_DIM,
        rounds=scale.rounds,
        concurrencies=scale.of(latency.CONCURRENCIES, (1, 30, 1_000)),
    ),
}


def main() -> int:
    given = _arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    stored = given.out / "results.json"
    if given.update_readme:
        report.update_readme(REPOSITORY / "README.md", json.loads(stored.read_text(encoding="utf-8")))
        return 0
    logging.disable(logging.WARNING)  # pymilvus and LlamaIndex
    scale = _Scale(is_quick=given.quick)
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if given.uri is None and not given.quick and free < _DISK_BYTES:
        print(f"{free / 1e9:.0f} GB of disk are free: a full run may need {_DISK_BYTES / 1e9:.0f}", file=sys.stderr)
    results = _run(
        lambda: open_milvus(given.uri, given.token),
        given.only or [name for name in _WORKLOADS if not (given.quick and name in _FULL_ONLY)],
        scale,
        lambda so_far: stored.write_text(json.dumps(so_far, indent=1), encoding="utf-8"),
    )
    print("\n" + report.table(results["figures"]))
    for path in [stored, *charts.draw(results, given.out)]:
        print(f"wrote {path}")
    return 0


def _run(
    open_backend: Callable[[], contextlib.AbstractContextManager[Backend]],
    names: list[str],
    scale: _Scale,
    store: Callable[[dict[str, Any]], object],
) -> dict[str, Any]:
    """Run workloads; `store` gets the results so far after each of them.

    In a full run each has a server of its own, if it is one that is started for the purpose: a server that has taken in
    and dropped some hundred thousand rows is slower for minutes, and no workload should pay for the one before it.
    """
    results: dict[str, Any] = {"is_quick": scale.is_quick, "seconds": {}, "figures": [], "series": {}}
    for together in [names] if scale.is_quick else [[name] for name in names]:
        load_before = os.getloadavg()[0]
        with open_backend() as backend:
            if "machine" not in results:
                results["machine"] = machine = report.describe_machine(backend.client, load_before)
                if load_before > machine["cores"] / 2:
                    print(f"other work is running here (load {load_before:.2f}): expect a wide spread", file=sys.stderr)
            for name in together:
                before = time.perf_counter()
                outcome = asyncio.run(_WORKLOADS[name](backend, scale))
                taken = results["seconds"][name] = round(time.perf_counter() - before, 1)
                print(f"{name}: {taken:.0f} s", file=sys.stderr)
                results["figures"] += [figure.as_dict() for figure in outcome.figures]
                results["series"][name] = outcome.series
                store(results)
    return results


@contextlib.contextmanager
def open_milvus(uri: str | None, token: str) -> Iterator[Backend]:
    """The Milvus that is named, or one that is started for the purpose."""
    if uri is not None:
        backend = Backend(uri, token)
        try:
            yield backend
        finally:
            backend.close()
        return
    from tests.servers import MilvusServer

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, MilvusServer(folder) as server:
        backend = Backend(server.uri)
        try:
            yield backend
        finally:
            backend.close()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--uri", help="address of a Milvus server; one is started if none is given")
    parser.add_argument("--token", default=os.environ.get("MILVUS_TOKEN", ""), help="default: MILVUS_TOKEN is asked")
    parser.add_argument("--quick", action="store_true", help="a short look, in less than two minutes")
    parser.add_argument("--only", action="append", choices=list(_WORKLOADS), help="run this one; may be repeated")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results", help="folder for results")
    parser.add_argument("--update-readme", action="store_true", help="put the stored results into README.md, and end")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
