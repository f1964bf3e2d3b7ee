"""A run over what is there already, and what its look-ups cost as the collection grows."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import BaseNode

from benchmarks.backend import Backend, WrongAnswerError
from benchmarks.corpus import Pages, make_documents, make_vectors, numbered
from benchmarks.ingestion import check_report
from benchmarks.measure import Figure, Outcome, Side, Timing, alternate, ratios, seconds, settle, timed
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
    """Look-ups of 500 documents in collections of several sizes; then with a scalar index on the largest one's ids."""
    outcome = Outcome(series={"sizes": list(sizes)})
    async with AsyncExitStack() as opened:
        stores = {}
        looked_up: dict[str, Records] = {}
        for size in sizes:
            stores[f"{size:,} rows"] = store = await opened.enter_async_context(backend.ours(_SMALL_DIM))
            records, connected, port = await opened.enter_async_context(_records(store))
            async for nodes in _nodes_of(size // _PAGES):
                await _write(store, connected, port, nodes)
            _check_count(backend, store, size)
            looked_up[f"{size:,} rows"] = records
        smallest, *_, largest = looked_up
        await _compare(outcome, looked_up, dict(zip(looked_up, sizes, strict=True)), rounds)
        await asyncio.to_thread(_index_documents, backend, stores[largest])
        indexed = f"{largest}, scalar index"
        await _compare(
            outcome,
            {smallest: looked_up[smallest], indexed: looked_up[largest]},
            {smallest: sizes[0], indexed: sizes[-1]},
            rounds,
            is_wanted=False,
        )
    return outcome


async def _compare(
    outcome: Outcome, looked_up: dict[str, Records], sizes: dict[str, int], rounds: int, is_wanted: bool = True
) -> None:
    """Look up in each collection in turn: one look-up alone, and as many at once as an ingestion makes."""
    chance = random.Random(0)

    def side(name: str, at_once: int) -> Side:
        async def one() -> None:
            numbers = chance.sample(range(sizes[name] // _PAGES), _DOCUMENTS_PER_LOOK_UP)
            found = await looked_up[name].rows_of([f"document-{number:06d}" for number in numbers])
            if len(found) != len(numbers) * _PAGES or any(row.record is None for row in found):
                raise WrongAnswerError(f"{len(found)} rows were found of {len(numbers)} documents")

        async def measure() -> Timing:
            cpu_before, before = time.process_time(), time.perf_counter()
            await asyncio.gather(*(one() for _ in range(at_once)))
            return Timing(time.perf_counter() - before, time.process_time() - cpu_before)

        return measure

    smallest, *_, largest = looked_up
    for at_once in (1, _LOOK_UPS_AT_ONCE):
        sides = {name: side(name, at_once) for name in looked_up}
        await alternate(sides, 1)  # what is asked for the first time
        settle()
        timings = await alternate(sides, rounds)
        what = f"look-up of {_DOCUMENTS_PER_LOOK_UP} documents of {_PAGES} nodes, {at_once} at once, {largest}"
        target = 2.0 if is_wanted else None
        grown = ratios(seconds(timings[largest]), seconds(timings[smallest]))
        outcome.figures.append(Figure(what, f"{smallest}", target, grown, True))
        kept = outcome.series.setdefault(f"{at_once} at once", {})
        kept |= {
            name: {"seconds": seconds(taken), "client_cpu": [each.cpu_seconds for each in taken]}
            for name, taken in timings.items()
            if is_wanted or name != smallest
        }


def _check_count(backend: Backend, store: AsyncMilvusVectorStore, rows: int) -> None:
    counted = backend.client.query(store.collection_name, "", output_fields=["count(*)"], consistency_level="Strong")
    if counted[0]["count(*)"] != rows:
        raise WrongAnswerError(f"{rows} rows were written, {counted[0]['count(*)']} are stored")


@asynccontextmanager
async def _records(store: AsyncMilvusVectorStore) -> AsyncIterator[tuple[Records, Any, LoopPort]]:
    connected, port = store.live(), LoopPort.current()
    with connected.held(port):
        yield Records(store, connected, port), connected, port


async def _nodes_of(documents: int) -> AsyncIterator[list[BaseNode]]:
    """The nodes of documents, some at a time."""
    split = Pages(id_func=numbered)
    vectors = make_vectors(1_000, _SMALL_DIM)
    for start in range(0, documents, _DOCUMENTS_PER_WRITE):
        count = min(_DOCUMENTS_PER_WRITE, documents - start)
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
