"""Writes of one id, one after the other: the later one is what is stored, whatever happens to the earlier one."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters, VectorStoreQuery
from pymilvus import MilvusClient

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, RetryPolicy
from tests.conftest import Backend
from tests.fault_proxy import FaultProxy
from tests.faults import Delay, First, LoseAnswer, Refuse, rate_limit
from tests.waiting import until

DIM = 8
WRITES = ("Insert", "Upsert")
ROUNDS = 4
# With pauses this long, what does not keep to the order overtakes nearly always.
POLICY = RetryPolicy(initial_backoff_seconds=0.3, max_backoff_seconds=0.3, deadline_seconds=30)
MENDABLE = {"refused": Refuse(), "answer lost": LoseAnswer(), "rate limit": rate_limit()}


@pytest.fixture(scope="module")
def collection_name(backend: Backend) -> Iterator[str]:
    """One collection for all tests here, which tell their rows apart by prefix: the server takes seconds for one."""
    name = f"order_{uuid.uuid4().hex}"
    yield name
    with contextlib.closing(MilvusClient(backend.uri)) as client:
        client.drop_collection(name)


@pytest.fixture
def make_store(fault_proxy: FaultProxy, collection_name: str) -> Iterator[Callable[..., AsyncMilvusVectorStore]]:
    stores = []

    def make(**changes: Any) -> AsyncMilvusVectorStore:
        arguments = {"dim": DIM, "consistency_level": "Strong", "retry": POLICY, "rpc_timeout_seconds": 5.0}
        stores.append(AsyncMilvusVectorStore(fault_proxy.uri, collection_name=collection_name, **(arguments | changes)))
        fault_proxy.clear()
        return stores[-1]

    yield make
    fault_proxy.heal()
    for store in stores:
        store.close()


def version(node_id: str, text: str) -> TextNode:
    return TextNode(id_=node_id, text=text, embedding=[0.5] * DIM)


async def texts_of(store: AsyncMilvusVectorStore, node_id: str) -> list[str]:
    """The texts of all rows of this id."""
    return [node.get_content() for node in await store.aget_nodes(node_ids=[node_id])]


@pytest.mark.parametrize("fault", MENDABLE)
@pytest.mark.parametrize(
    "difference",
    [
        {"batch_size": 100},
        {"retry": RetryPolicy(deadline_seconds=31)},
        {"upsert_mode": False},
        {"max_concurrency": 4},
        {"token": "another:user", "db_name": "default"},  # another connection, to the same collection
    ],
    ids=lambda difference: next(iter(difference)),
)
async def test_the_later_of_two_stores_that_differ_wins(
    fault_proxy: FaultProxy, make_store: Any, difference: dict[str, Any], fault: str
) -> None:
    one = make_store()
    # Where nothing is upserted, two writes of one id are two rows: then the first one's store is the one that differs.
    first, second = (make_store(**difference), one) if "upsert_mode" in difference else (one, make_store(**difference))
    for _ in range(ROUNDS):
        node_id = uuid.uuid4().hex
        fault_proxy.clear()
        fault_proxy.script(MENDABLE[fault], method=WRITES, on=First(1))
        earlier = asyncio.create_task(first.async_add([version(node_id, "earlier")]))
        later = asyncio.create_task(second.async_add([version(node_id, "later")]))
        await asyncio.gather(earlier, later)
        assert await texts_of(one, node_id) == ["later"]


async def test_a_later_write_wins_past_hundreds_of_filters_in_between(fault_proxy: FaultProxy, make_store: Any) -> None:
    store = make_store()
    for _ in range(ROUNDS):
        node_id = uuid.uuid4().hex
        fault_proxy.clear()
        fault_proxy.script(Refuse(), method=WRITES, on=First(1))
        earlier = asyncio.create_task(store.async_add([version(node_id, "earlier")]))
        asking = [asyncio.create_task(store.aquery(query_with_a_filter_of_its_own())) for _ in range(300)]
        later = asyncio.create_task(store.async_add([version(node_id, "later")]))
        await asyncio.sleep(0)
        for task in asking:  # what is found does not matter here
            task.cancel()
        await asyncio.gather(earlier, later)
        assert await texts_of(store, node_id) == ["later"]


async def test_the_last_of_many_writes_by_turns_from_two_stores_wins(fault_proxy: FaultProxy, make_store: Any) -> None:
    first, second = make_store(batch_size=1), make_store(batch_size=2)
    ids = [uuid.uuid4().hex for _ in range(20)]
    fault_proxy.script(Refuse(), method=WRITES, on=lambda number: number % 3 == 1)
    tasks = []
    for text, store in (("1", first), ("2", second), ("3", first), ("4", second)):
        tasks.append(asyncio.create_task(store.async_add([version(node_id, text) for node_id in ids])))
    await asyncio.gather(*tasks)
    found = {node.node_id: node.get_content() for node in await first.aget_nodes(node_ids=ids)}
    assert found == dict.fromkeys(ids, "4")


async def test_a_later_write_wins_over_one_that_was_cancelled_and_still_lands(
    fault_proxy: FaultProxy, make_store: Any
) -> None:
    first, second = make_store(), make_store(batch_size=100)
    node_id = uuid.uuid4().hex
    fault_proxy.script(Delay(0.5), method=WRITES, on=First(1))
    earlier = asyncio.create_task(first.async_add([version(node_id, "earlier")]))
    await until(lambda: len(fault_proxy.requests_of(*WRITES)) == 1)
    earlier.cancel()
    await second.async_add([version(node_id, "later")])
    await until(lambda: first.statistics().in_flight == 0)
    assert await texts_of(first, node_id) == ["later"]


def query_with_a_filter_of_its_own() -> VectorStoreQuery:
    filters = MetadataFilters(filters=[MetadataFilter(key="key", value=uuid.uuid4().hex)])
    return VectorStoreQuery(query_embedding=[0.5] * DIM, similarity_top_k=1, filters=filters)
