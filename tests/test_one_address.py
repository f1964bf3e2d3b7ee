"""Stores of one address: whatever their settings, one limit is for all, and on Milvus Lite one write at a time."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from llama_index.core.vector_stores.types import VectorStoreQuery
from pymilvus import MilvusClient

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, RetryPolicy
from tests.conftest import MakeNodes
from tests.fault_proxy import FaultProxy
from tests.faults import Held
from tests.waiting import until

DIM = 8
LIMIT = 3
CHANGES = ("Insert", "Upsert", "Delete", "DropCollection")
DIFFERENCES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "batch size": {"batch_size": 1},
    "consistency": {"consistency_level": "Bounded"},
    "policy": {"retry": RetryPolicy(deadline_seconds=59)},
    "upsert mode": {"upsert_mode": False},
    "token": {"token": "root:Milvus"},  # and with it the connection
    "options": {"grpc_options": {"grpc.use_local_subchannel_pool": 1}},
    "collection": {"collection_name": "another"},
}


@pytest.fixture
def stores(
    proxy: FaultProxy, collection_name: str, lite_uri: str, held: Held
) -> Iterator[list[AsyncMilvusVectorStore]]:
    """One store for each difference."""
    other = f"{collection_name}_other"
    arguments = {"collection_name": collection_name, "dim": DIM, "max_concurrency": LIMIT}
    arguments["retry"] = RetryPolicy(deadline_seconds=60)
    with contextlib.ExitStack() as stack:
        opened = []
        for difference in DIFFERENCES.values():
            changes = {**difference, "collection_name": other} if "collection_name" in difference else difference
            opened.append(stack.enter_context(AsyncMilvusVectorStore(proxy.uri, **(arguments | changes))))
        stack.callback(held.let_go)
        proxy.clear()
        yield opened
    with contextlib.closing(MilvusClient(lite_uri)) as client:
        client.drop_collection(other)


def begun(calls: list[Callable[[], Any]]) -> list[asyncio.Task[Any]]:
    return [asyncio.create_task(call()) for call in calls]


async def test_they_share_one_limit(proxy: FaultProxy, stores: list[AsyncMilvusVectorStore], held: Held) -> None:
    proxy.script(held, method=("Search", "Query"))
    calls: list[Callable[[], Any]] = []
    for number, store in enumerate(stores):
        query = VectorStoreQuery(query_embedding=[0.5] * DIM, similarity_top_k=number + 1)  # each in its own request
        calls += [lambda s=store, q=query: s.aquery(q), lambda s=store: s.aget_nodes(node_ids=["any"])]
    calling = begun(calls)
    statistics = stores[0].statistics
    await until(lambda: proxy.in_flight() == LIMIT and statistics().waiting == len(calls) - LIMIT)
    assert {store.statistics() for store in stores} == {statistics()}, "one for all"
    held.let_go()
    await asyncio.gather(*calling)
    assert proxy.in_flight_peak() == LIMIT
    assert len(proxy.requests) == len(calls)


@pytest.mark.parametrize("first", ["write", "delete"])
async def test_on_milvus_lite_they_write_one_at_a_time(
    proxy: FaultProxy, stores: list[AsyncMilvusVectorStore], make_nodes: MakeNodes, held: Held, first: str
) -> None:
    proxy.script(held, method=CHANGES)
    calls: list[Callable[[], Any]] = []
    for store in stores:
        calls += [lambda s=store: s.async_add(make_nodes(1, dim=DIM)), lambda s=store: s.adelete(uuid.uuid4().hex)]
    calling = begun(calls if first == "write" else calls[::-1])
    statistics = stores[0].statistics
    await until(lambda: proxy.in_flight() == 1 and statistics().waiting + (proxy.requests[0].rows or 1) == len(calls))
    # Slots, not requests: one that waits for the lock between processes would keep a search from its slot.
    assert statistics().in_flight == 1
    assert await asyncio.gather(*(s.aget_nodes(node_ids=["any"]) for s in stores)) == [[]] * len(stores), "past them"
    held.let_go()
    await asyncio.gather(*calling)
    changes = proxy.requests_of(*CHANGES)
    assert all(one.finished is not None and one.finished <= other.started for one, other in pairwise(changes))
