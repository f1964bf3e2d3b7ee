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

from benchmarks import (
    adds,
    bulk,
    charts,
    clients,
    embedding,
    far,
    ingestion,
    ingestion_again,
    ingestion_memory,
    ingestion_record,
    latency,
    lite,
    memory,
    questions,
    report,
    searches,
    single,
    sizes,
)
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


_Workload = Callable[[Backend, _Scale], Coroutine[Any, Any, Outcome]]
_INGESTION = "ingestion"  # all workloads of ingestion
# Left out of a quick run: of some, small sizes would say nothing; others take long at any size.
_FULL_ONLY = ("embedding", "memory", "sizes", "far", "questions", "single", "latency", _INGESTION)

_WORKLOADS: dict[str, _Workload] = {
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
        dim=_DIM, rounds=scale.rounds, searches=scale.of(200, 100), adds=scale.of(1_000, 200)
    ),
    "embedding": lambda backend, scale: embedding.run(
        backend, dim=_DIM, rounds=scale.many_rounds, count=scale.of(10_000, 2_000), is_quick=scale.is_quick
    ),
    "memory": lambda backend, scale: asyncio.to_thread(
        memory.run, backend.uri, backend.token, dim=_DIM, rounds=scale.rounds, count=100_000
    ),
    "sizes": lambda backend, scale: sizes.run(backend, dim=_DIM, rounds=scale.rounds),
    "clients": lambda backend, scale: clients.run(
        backend,
        dim=_DIM,
        rounds=scale.of(5, 1),
        rows=scale.of(6_000, 2_000),
        large=scale.of(200_000, 15_000),
        seconds=scale.of(5.0, 1.5),
    ),
    "single": lambda backend, scale: single.run(backend, dim=_DIM, rounds=scale.many_rounds),
    "far": lambda backend, scale: far.run(backend, dim=_DIM, rounds=scale.of(5, 1)),
    "questions": lambda backend, scale: questions.run(rounds=scale.many_rounds),
    "latency": lambda backend, scale: latency.run(
        backend,
        dim=_DIM,
        rounds=scale.rounds,
        concurrencies=scale.of(latency.CONCURRENCIES, (1, 30, 1_000)),
    ),
}

# Their results stand in a file of their own, in which those of one are replaced when it is run again.
_OF_INGESTION: dict[str, _Workload] = {
    "ingestion-memory": lambda backend, scale: asyncio.to_thread(
        ingestion_memory.run,
        backend.uri,
        backend.token,
        dim=384,
        rounds=scale.rounds,
        count=scale.of(200_000, 20_000),
        plain_count=scale.of(50_000, 20_000),
    ),
    "ingestion-stages": lambda backend, scale: ingestion.run_stages(
        backend, rounds=scale.of(5, 1), remote_texts=scale.of(10_000, 2_000), local_texts=scale.of(300, 60)
    ),
    "ingestion-plain": lambda backend, scale: ingestion.run_plain(
        backend, rounds=scale.of(5, 1), texts=scale.of(10_000, 2_000)
    ),
    "ingestion-unchanged": lambda backend, scale: ingestion_again.run_unchanged(
        backend, rounds=scale.of(5, 2), count=scale.of(10_000, 1_000)
    ),
    "ingestion-look-ups": lambda backend, scale: ingestion_again.run_look_ups(
        backend,
        rounds=scale.of(15, 3),
        sizes=scale.of((10_000, 100_000, 1_000_000), (10_000, 30_000)),
    ),
    "ingestion-record": lambda backend, scale: ingestion_record.run(
        backend, dim=384, rounds=scale.of(21, 3), count=scale.of(10_000, 4_000)
    ),
}


def main() -> int:
    given = _arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    files = {given.out / "results.json": _WORKLOADS, given.out / "ingestion.json": _OF_INGESTION}
    if given.update_docs:
        results, *others = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
        for other in others:
            results["figures"] += other["figures"]
        report.update(REPOSITORY / "docs" / "performance.md", results)
        return 0
    logging.disable(logging.WARNING)  # pymilvus and LlamaIndex
    scale = _Scale(is_quick=given.quick)
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if given.uri is None and not given.quick and free < _DISK_BYTES:
        print(f"{free / 1e9:.0f} GB of disk are free: a full run may need {_DISK_BYTES / 1e9:.0f}", file=sys.stderr)
    wanted = given.only or [name for name in (*_WORKLOADS, _INGESTION) if not (given.quick and name in _FULL_ONLY)]
    for file, workloads in files.items():
        names = [name for name in workloads if name in wanted or (workloads is _OF_INGESTION and _INGESTION in wanted)]
        if not names:
            continue
        results: dict[str, Any] = {"is_quick": scale.is_quick, "seconds": {}, "figures": [], "series": {"dim": _DIM}}
        if given.only and file.exists():  # what was measured before stays
            results |= json.loads(file.read_text(encoding="utf-8"))
        _run(
            lambda: open_milvus(given.uri, given.token), {name: workloads[name] for name in names}, scale, results, file
        )
        print("\n" + report.table(results["figures"]))
        for path in [file, *charts.draw(results, given.out)]:
            print(f"wrote {path}")
    return 0


def _run(
    open_backend: Callable[[], contextlib.AbstractContextManager[Backend]],
    workloads: dict[str, _Workload],
    scale: _Scale,
    results: dict[str, Any],
    file: Path,
) -> None:
    """Run workloads; the results so far, earlier ones of other workloads included, are stored after each of them.

    In a full run each has a server of its own, if it is one that is started for the purpose: a server that has taken in
    and dropped some hundred thousand rows is slower for minutes, and no workload should pay for the one before it.
    """
    described = False
    for together in [list(workloads)] if scale.is_quick else [[name] for name in workloads]:
        load_before = os.getloadavg()[0]
        with open_backend() as backend:
            if not described:
                described = True
                results["machine"] = machine = report.describe_machine(backend.client, load_before)
                if load_before > machine["cores"] / 2:
                    print(f"other work is running here (load {load_before:.2f}): expect a wide spread", file=sys.stderr)
            for name in together:
                before = time.perf_counter()
                outcome = asyncio.run(workloads[name](backend, scale))
                taken = results["seconds"][name] = round(time.perf_counter() - before, 1)
                print(f"{name}: {taken:.0f} s", file=sys.stderr)
                kept = [figure for figure in results["figures"] if figure["of"] != name]
                results["figures"] = kept + [figure.as_dict() | {"of": name} for figure in outcome.figures]
                results["series"][name] = outcome.series
                file.write_text(json.dumps(results, indent=1), encoding="utf-8")


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
    names = [*_WORKLOADS, _INGESTION, *_OF_INGESTION]
    parser.add_argument("--only", action="append", choices=names, help="run this one; may be repeated")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results", help="folder for results")
    parser.add_argument(
        "--update-docs", action="store_true", help="put the stored results into docs/performance.md, and end"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
