"""A store's bounds, as they arrive at Milvus: each is used up to its last byte, row, query and request, and kept to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from llama_index.core.vector_stores.types import VectorStoreQuery

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, RetryPolicy
from llama_index_milvus_async_ext._milvus.schema import Schema
from llama_index_milvus_async_ext._nodes.rows import RowEncoder
from tests.conftest import MakeNodes
from tests.fault_proxy import FaultProxy
from tests.faults import First, Held, rate_limit
from tests.waiting import until

DIM = 8

MakeStore = Callable[..., AsyncMilvusVectorStore]


@pytest.fixture
def make_store(proxy: FaultProxy, collection_name: str) -> Iterator[MakeStore]:
    stores = []

    def make(**bounds: Any) -> AsyncMilvusVectorStore:
        stores.append(AsyncMilvusVectorStore(uri=proxy.uri, collection_name=collection_name, dim=DIM, **bounds))
        proxy.clear()
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def ask(store: AsyncMilvusVectorStore, count: int) -> list[asyncio.Task[Any]]:
    """Searches that can't share a request, as each has a limit of its own."""
    return [
        asyncio.create_task(store.aquery(VectorStoreQuery(query_embedding=[0.5] * DIM, similarity_top_k=number + 1)))
        for number in range(count)
    ]


def row_bytes(store: AsyncMilvusVectorStore, nodes: Any) -> list[int]:
    schema = Schema(store.client.describe_collection(store.collection_name))
    encoder = RowEncoder(schema, text_key="text", doc_id_field="doc_id", embedding_field="embedding")
    return [encoder.encode(node)[1] for node in nodes]


@pytest.mark.parametrize(("change", "rows"), [(0, [5]), (1, [5]), (-1, [4, 1])])
def test_rows_of_exactly_max_batch_bytes_are_one_request(
    make_store: MakeStore, proxy: FaultProxy, make_nodes: MakeNodes, change: int, rows: list[int]
) -> None:
    store, nodes = make_store(), make_nodes(5, dim=DIM)
    store.max_batch_bytes = sum(row_bytes(store, nodes)) + change
    assert store.write(nodes).ok
    assert [record.rows for record in proxy.requests_of("Upsert")] == rows


@pytest.mark.parametrize(("count", "rows"), [(6, [6]), (7, [6, 1]), (12, [6, 6])])
def test_batch_size_rows_are_one_request(
    make_store: MakeStore, proxy: FaultProxy, make_nodes: MakeNodes, count: int, rows: list[int]
) -> None:
    assert make_store(batch_size=6).write(make_nodes(count, dim=DIM)).ok
    assert [record.rows for record in proxy.requests_of("Upsert")] == rows


@pytest.mark.parametrize(("count", "queries"), [(6, [6]), (7, [1, 6])])
async def test_max_batch_queries_are_one_request(
    make_store: MakeStore, proxy: FaultProxy, count: int, queries: list[int]
) -> None:
    store = make_store(max_batch_queries=6)
    query = VectorStoreQuery(query_embedding=[0.5] * DIM, similarity_top_k=1)
    await asyncio.gather(*(store.aquery(query) for _ in range(count)))
    assert sorted(record.rows or 0 for record in proxy.requests_of("Search")) == queries


@pytest.mark.parametrize("most", [1, 3])
async def test_max_concurrency_requests_are_out_and_the_others_wait(
    make_store: MakeStore, proxy: FaultProxy, held: Held, make_nodes: MakeNodes, most: int
) -> None:
    store = make_store(max_concurrency=most)
    proxy.script(held, method=("Search", "Upsert"))
    asking = ask(store, 6)
    writing = asyncio.create_task(store.awrite(make_nodes(2, dim=DIM)))
    await until(lambda: proxy.in_flight() == most and store.statistics().waiting == 6 - most + 2)
    assert (store.statistics().in_flight, store.statistics().limit) == (most, most)
    held.let_go()
    await asyncio.gather(*asking, writing)
    assert proxy.in_flight_peak() == most


async def test_a_volley_of_rejected_searches_cuts_the_limit_once(
    make_store: MakeStore, proxy: FaultProxy, held: Held
) -> None:
    store = make_store(max_concurrency=8, retry=RetryPolicy(max_backoff_seconds=0.5, initial_backoff_seconds=0.01))
    volley = Held(then=rate_limit())
    rejected = proxy.script(volley, method="Search", on=First(8))
    proxy.script(held, method="Search")
    asking = ask(store, 8)
    await until(lambda: proxy.in_flight("Search") == 8)
    volley.let_go()
    await until(lambda: rejected.seen > 8 and proxy.in_flight("Search") == 5 and store.statistics().waiting == 0)
    await until(lambda: store.statistics().retries == 8)
    assert (store.statistics().limit, store.statistics().in_flight) == (5, 5)
    held.let_go()
    assert all(result.ids == [] for result in await asyncio.gather(*asking))


def test_the_bytes_that_are_counted_are_those_that_a_row_adds_to_its_request(
    make_store: MakeStore, proxy: FaultProxy, lite_uri: str, make_nodes: MakeNodes
) -> None:
    """But for names and lengths, some bytes a column: what is counted is the vector, the texts in UTF-8, the JSON."""
    sizes: list[int] = []
    store, nodes = make_store(), make_nodes(2, dim=DIM)
    proxy.script(rate_limit(), when=lambda request: sizes.append(request.ByteSize()) or False, method="Upsert")
    for text in ("plain " * 500, "Größenänderung " * 500, "量" * 5_000):
        sizes.clear()
        for node in nodes:
            node.text = text
        for count in (1, 2):
            assert store.write(nodes[:count]).ok
        counted, (one, two) = row_bytes(store, nodes[1:])[0], sizes
        assert counted <= two - one <= counted + 40
