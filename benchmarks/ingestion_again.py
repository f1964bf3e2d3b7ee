"""A run over what is there already, and what its look-ups cost as the collection grows."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import BaseNode

from benchmarks.backend import Backend, WrongAnswerError
from benchmarks.corpus import Pages, make_documents, make_vectors, numbered
from benchmarks.ingestion import check_report
from benchmarks.measure import Figure, Outcome, Timing, seconds, timed, wait_until_quiet
from llama_index_milvus_async_ext import AsyncMilvusVectorStore, aingest
from llama_index_milvus_async_ext._ingest.standing import record_bytes
from llama_index_milvus_async_ext._lane.port import LoopPort
from llama_index_milvus_async_ext._store.records import Records
from llama_index_milvus_async_ext._store.writing import Write
from tests.embedding import HashEmbedding

_SMALL_DIM = 8
_PAGES = 20
_CHARACTERS = 200
_DOCUMENTS_PER_LOOK_UP = 500  # as in an ingestion
_LOOK_UPS_AT_ONCE = 4
_DOCUMENTS_PER_WRITE = 500


async def run_unchanged(backend: Backend, *, rounds: int, count: int) -> Outcome:
    """Further runs over `count` documents that are all there, unchanged."""
    rates: list[float] = []
    timings: list[Timing] = []
    model = HashEmbedding(dim=_SMALL_DIM, embed_batch_size=100)
    async with backend.ours(_SMALL_DIM) as store:
        pipeline = IngestionPipeline(transformations=[Pages(), model], vector_store=store)
        report = await aingest(pipeline, make_documents(count, _PAGES, characters=_CHARACTERS))
        check_report(report, added=count, nodes=count * _PAGES, embedded=count * _PAGES)
        for _ in range(rounds):
            documents = list(make_documents(count, _PAGES, characters=_CHARACTERS))
            rows, texts = store.statistics().rows, model.texts

            async def work(documents: Any = documents) -> None:
                nonlocal report
                report = await aingest(pipeline, documents)

            timings.append(await timed(work))
            rates.append(count / timings[-1].seconds)
            check_report(report, unchanged=count)
            if store.statistics().rows != rows or model.texts != texts:
                raise WrongAnswerError("rows were written, or texts embedded, though nothing has changed")
    workload = f"second run over {count:,} unchanged documents of {_PAGES} nodes: no text embedded, no row written"
    series = {
        "count": count,
        "seconds": seconds(timings),
        "client_cpu": [each.cpu_seconds for each in timings],
        "stage_seconds": report.stage_seconds,
    }
    return Outcome([Figure(workload, "documents a second", 3_000.0, rates, unit="/s")], series)


async def run_look_ups(backend: Backend, *, rounds: int, sizes: Sequence[int]) -> Outcome:
    """Look-ups of 500 documents in a collection that grows; at last, with a scalar index on the documents' ids."""
    series: dict[str, Any] = {"sizes": list(sizes), "alone": {}, "together": {}, "client_cpu": {}}
    rows = 0
    async with backend.ours(_SMALL_DIM) as store, _records(store) as (records, connected, port):
        for size in sizes:
            while rows < size:
                nodes = _nodes_of(rows // _PAGES, min(size - rows, 50 * 10_000) // _PAGES)
                async for some in nodes:
                    await _write(store, connected, port, some)
                    rows += len(some)
            await _look_up(records, rows, rounds, series, str(size))
        counted = backend.client.query(
            store.collection_name, "", output_fields=["count(*)"], consistency_level="Strong"
        )
        if counted[0]["count(*)"] != rows:
            raise WrongAnswerError(f"{rows} rows were written, {counted[0]['count(*)']} are stored")
        await asyncio.to_thread(_index_documents, backend, store)
        await _look_up(records, rows, rounds, series, f"{sizes[-1]}, indexed")
    smallest, largest = str(sizes[0]), str(sizes[-1])
    figures = []
    for way, target in (("alone", 2.0), ("together", None)):
        taken = series[way]
        # Each size has rounds of its own: no two of them were measured next to each other.
        grown = statistics.median(taken[largest]) / statistics.median(taken[smallest])
        indexed = statistics.median(taken[f"{largest}, indexed"]) / statistics.median(taken[smallest])
        what = f"look-up of {_DOCUMENTS_PER_LOOK_UP} documents of {_PAGES} nodes"
        what += "" if way == "alone" else f", {_LOOK_UPS_AT_ONCE} at once, as in an ingestion"
        figures += [
            Figure(f"{what}, {sizes[-1]:,} rows", f"{sizes[0]:,} rows", target, [grown], True),
            Figure(f"{what}, {sizes[-1]:,} rows, scalar index", f"{sizes[0]:,} rows", None, [indexed], True),
        ]
    return Outcome(figures, series)


async def _look_up(records: Records, rows: int, rounds: int, series: dict[str, Any], name: str) -> None:
    """Time look-ups of documents chosen by chance: one after the other, and as many at once as an ingestion makes."""
    wait_until_quiet()
    chance = random.Random(rows)

    async def one() -> None:
        wanted = [f"document-{n:06d}" for n in chance.sample(range(rows // _PAGES), _DOCUMENTS_PER_LOOK_UP)]
        found = await records.rows_of(wanted)
        if len(found) != len(wanted) * _PAGES or any(row.record is None for row in found):
            raise WrongAnswerError(f"{len(found)} rows were found of {len(wanted)} documents")

    await one()  # a fresh connection, an index that is not in memory yet
    alone, together = [], []
    cpu = time.process_time()
    for _ in range(rounds):
        before = time.perf_counter()
        await one()
        alone.append(time.perf_counter() - before)
    series["client_cpu"][name] = (time.process_time() - cpu) / rounds
    for _ in range(rounds):
        before = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(_LOOK_UPS_AT_ONCE)))
        together.append((time.perf_counter() - before) / _LOOK_UPS_AT_ONCE)
    series["alone"][name], series["together"][name] = alone, together


@asynccontextmanager
async def _records(store: AsyncMilvusVectorStore) -> AsyncIterator[tuple[Records, Any, LoopPort]]:
    connected, port = store.live(), LoopPort.current()
    with connected.held(port):
        yield Records(store, connected, port), connected, port


async def _nodes_of(first: int, documents: int) -> AsyncIterator[list[BaseNode]]:
    """The nodes of documents, some at a time."""
    split = Pages(id_func=numbered)
    vectors = make_vectors(1_000, _SMALL_DIM)
    for start in range(first, first + documents, _DOCUMENTS_PER_WRITE):
        count = min(_DOCUMENTS_PER_WRITE, first + documents - start)
        nodes = split(list(make_documents(count, _PAGES, characters=_CHARACTERS, first=start)))
        for place, node in enumerate(nodes):
            node.embedding = vectors[place % len(vectors)]
        yield nodes


async def _write(store: AsyncMilvusVectorStore, connected: Any, port: LoopPort, nodes: Sequence[BaseNode]) -> None:
    """As an ingestion writes them, with their records."""
    report = await Write(store, connected, port, nodes, records=records_of(nodes)).run()
    report.raise_for_failures()


def records_of(nodes: Sequence[BaseNode]) -> list[bytes]:
    """What an ingestion says of each node of documents of twenty nodes."""
    records: list[bytes] = []
    for start in range(0, len(nodes), _PAGES):
        some = nodes[start : start + _PAGES]
        version = f"{start:024x}"
        records += [record_bytes(version, [node.node_id for node in some], "a folder")] * len(some)
    return records


def _index_documents(backend: Backend, store: AsyncMilvusVectorStore) -> None:
    """Give the documents' ids a scalar index, which a server takes up when it loads the collection."""
    client, name = backend.client, store.collection_name
    client.flush(name)
    client.release_collection(name)
    params = client.prepare_index_params()
    params.add_index(store.doc_id_field, index_type="")
    client.create_index(name, params)
    client.load_collection(name)
    client.query(name, f'{store.doc_id_field} == "document-000000"', output_fields=["id"], consistency_level="Strong")
