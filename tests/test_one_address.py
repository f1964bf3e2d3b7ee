"""Stores of one address: whatever their settings, one limit is for all, and on Milvus Lite one write at a time."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.types import VectorStoreQuery
from pymilvus import MilvusClient

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, RetryPolicy
from tests.conftest import MakeNodes
from tests.fault_proxy import FaultProxy
from tests.faults import Held, Nth, Refuse
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


async def test_who_asks_the_same_at_once_is_answered_by_the_policy_of_each(
    proxy: FaultProxy, collection_name: str, held: Held
) -> None:
    arguments: dict[str, Any] = {"collection_name": collection_name, "dim": DIM}
    query = VectorStoreQuery(query_embedding=[0.5] * DIM, similarity_top_k=1)
    with (
        AsyncMilvusVectorStore(proxy.uri, **arguments, retry=RetryPolicy(max_attempts=1)) as impatient,
        AsyncMilvusVectorStore(proxy.uri, **arguments, retry=RetryPolicy(max_backoff_seconds=0.1)) as patient,
    ):
        proxy.script(held, method="Search", on=Nth(1))
        proxy.script(Refuse(), method="Search", on=Nth(1))  # the second one in all
        first = asyncio.create_task(impatient.aquery(query))
        await until(lambda: proxy.in_flight("Search") == 1)
        assert (await patient.aquery(query)).ids == []
        held.let_go()
        assert (await first).ids == []
    assert proxy.counts["Search"] == 3


async def test_a_second_insert_replaces_the_first_though_another_store_upserts(
    proxy: FaultProxy, collection_name: str, held: Held, make_nodes: MakeNodes
) -> None:
    """One that waits with its caller until the first has ended, behind more rows than are let in."""
    arguments: dict[str, Any] = {"collection_name": collection_name, "dim": DIM, "batch_size": 1, "max_concurrency": 1}
    with (
        AsyncMilvusVectorStore(proxy.uri, **arguments, upsert_mode=False) as inserting,
        AsyncMilvusVectorStore(proxy.uri, **arguments) as upserting,
    ):
        for store in (inserting, upserting):
            await store.async_add(make_nodes(1, dim=DIM))
        proxy.clear()
        proxy.script(held, method=CHANGES, on=Nth(1))
        nodes = [TextNode(id_="one", text=text, embedding=[0.5] * DIM) for text in ("first", "second")]
        first = asyncio.create_task(inserting.async_add(nodes[:1]))
        await until(lambda: proxy.in_flight() == 1)
        between = asyncio.create_task(inserting.async_add(make_nodes(100, dim=DIM)))
        second = asyncio.create_task(inserting.async_add(nodes[1:]))
        await until(lambda: inserting.statistics().waiting == 101)
        held.let_go()
        await asyncio.gather(first, between, second)
        assert (proxy.counts["Insert"], proxy.counts["Upsert"]) == (101, 1)
        assert [node.get_content() for node in await inserting.aget_nodes(node_ids=["one"])] == ["second"]


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
