"""Memory of this process while a generator's documents are ingested; run in a process of its own."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import Document

from benchmarks.backend import Backend, WrongAnswerError
from benchmarks.corpus import Pages, make_documents, numbered
from benchmarks.ingestion import check_report
from benchmarks.measure import Figure, Outcome
from llama_index_milvus_async_ext import aingest
from tests.embedding import HashEmbedding

_MEGABYTE = 1 << 20
_PAUSE_SECONDS = 0.005
_PAGES = 20
_BEGIN = 10_000  # nodes, from which on memory is not to grow
_POINTS = 400  # of a curve
_INGESTION, _PIPELINE = "ingestion", "pipeline"


def run(uri: str, token: str, *, dim: int, rounds: int, count: int, plain_count: int) -> Outcome:
    """Ingest `count` nodes, each round in a fresh process; and for comparison some by a standard pipeline's run."""
    measured = [_measured(uri, token, dim, count, _INGESTION) for _ in range(rounds)]
    plain = _measured(uri, token, dim, plain_count, _PIPELINE)
    workload = f"ingestion of {count:,} nodes of {dim} dimensions: growth of resident memory"
    against = f"what it was at the {_BEGIN:,}th node"
    grown = [each["grown_bytes"] / _MEGABYTE for each in measured]
    middle = sorted(measured, key=lambda each: each["grown_bytes"])[len(measured) // 2]
    series = {
        "count": count,
        "grown_megabytes": grown,
        "seconds": [each["seconds"] for each in measured],
        "curve": middle["curve"],
        "plain": {"count": plain_count, "curve": plain["curve"]},
    }
    return Outcome([Figure(workload, against, 100.0, grown, True, "MB")], series)


def _measured(uri: str, token: str, dim: int, count: int, way: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.ingestion_memory", "--uri", uri, "--dim", str(dim)]
    command += ["--count", str(count), "--way", way]
    done = subprocess.run(
        command,
        input=token,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parent.parent,
    )
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


async def _measure(uri: str, token: str, dim: int, count: int, way: str) -> dict[str, Any]:
    backend = Backend(uri, token)
    model = HashEmbedding(dim=dim, embed_batch_size=100)
    documents = count // _PAGES
    opened = backend.ours(dim) if way == _INGESTION else backend.upstream(dim)
    async with opened as store:
        pipeline = IngestionPipeline(
            transformations=[Pages(id_func=numbered), model], vector_store=store, disable_cache=True
        )
        gc.collect()
        process = psutil.Process()
        samples: list[tuple[int, int]] = []  # nodes that the model was given, and bytes
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(_PAUSE_SECONDS):
                samples.append((model.texts, process.memory_info().rss))

        watcher = threading.Thread(target=watch)
        watcher.start()
        before = time.perf_counter()
        if way == _INGESTION:
            report = await aingest(pipeline, _stream(documents))
            check_report(report, added=documents, nodes=documents * _PAGES, embedded=documents * _PAGES)
        else:
            await pipeline.arun(documents=list(_stream(documents)))
        taken = time.perf_counter() - before
        ended.set()
        watcher.join()
        samples.append((model.texts, process.memory_info().rss))
        counted = backend.client.query(
            store.collection_name, "", output_fields=["count(*)"], consistency_level="Strong"
        )
        if counted[0]["count(*)"] != documents * _PAGES:
            raise WrongAnswerError(f"{counted} rows are stored of {documents} documents of {_PAGES} nodes")
    backend.close()
    begun = next((place for place, (nodes, _) in enumerate(samples) if nodes >= _BEGIN), 0)
    grown = max(size for _, size in samples[begun:]) - samples[begun][1]
    return {"grown_bytes": grown, "seconds": taken, "curve": _curve(samples)}


def _stream(documents: int) -> Iterator[Document]:
    return make_documents(documents, _PAGES)


def _curve(samples: list[tuple[int, int]]) -> list[tuple[int, float]]:
    """The samples' highest, in as many sections as a chart needs, in megabytes."""
    size = max(len(samples) // _POINTS, 1)
    parts = [samples[start : start + size] for start in range(0, len(samples), size)]
    return [
        (round(statistics.fmean(nodes for nodes, _ in part)), round(max(size for _, size in part) / _MEGABYTE, 1))
        for part in parts
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--uri", required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--dim", type=int, required=True)
    parser.add_argument("--way", choices=(_INGESTION, _PIPELINE), default=_INGESTION)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    # The token comes by standard input: a command line can be read by everyone on the machine.
    measured = asyncio.run(_measure(given.uri, sys.stdin.read(), given.dim, given.count, given.way))
    print(json.dumps(measured))
