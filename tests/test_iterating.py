"""Nodes one after the other, of any number: each that is there all along comes once, whatever else happens."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_index.core.schema import BaseNode, TextNode
from llama_index.core.vector_stores.types import FilterOperator, MetadataFilter, MetadataFilters
from pymilvus import DataType, MilvusClient
from pymilvus.exceptions import MilvusException

from llama_index_milvus_async_ext import AsyncMilvusVectorStore
from llama_index_milvus_async_ext._milvus.errors import QueryError
from llama_index_milvus_async_ext._milvus.schema import PrimaryKey
from llama_index_milvus_async_ext._store.paging import Cursor
from tests.conftest import Backend, MakeNodes, examples
from tests.fault_proxy import FaultProxy
from tests.faults import Held
from tests.waiting import until

ROWS = 2_400
# What a filter expression, a cursor or an order by letters could trip over.
AWKWARD = [
    '"',
    "'",
    "\\",
    '\\"',
    '" or id != "',
    "%",
    "_",
    "\n",
    "\0",
    " ",
    "é",
    "e\u0301",
    "\ud7ff",
    "\ue000",
    "\uffff",
]
AWKWARD += ["😀", "\U0010ffff", "A", "a", "ß", "0", "00", "10", "9", "id", "]", "{", "$meta"]


@pytest.fixture
def there(backend: Backend, collection_name: str) -> Iterator[AsyncMilvusVectorStore]:
    """A store on either Milvus, of the usual consistency."""
    with AsyncMilvusVectorStore(backend.uri, collection_name=collection_name, dim=8) as store:
        yield store


def ids_of(nodes: Any) -> list[str]:
    return [node.node_id for node in nodes]


def where(key: str, value: Any, operator: FilterOperator = FilterOperator.EQ) -> MetadataFilters:
    return MetadataFilters(filters=[MetadataFilter(key=key, value=value, operator=operator)])


def shuffled(nodes: list[TextNode]) -> list[TextNode]:
    return random.Random(0).sample(nodes, len(nodes))


async def test_thousands_of_rows_in_several_segments_upserted_and_deleted_come_in_order_of_their_ids(
    there: AsyncMilvusVectorStore, make_nodes: MakeNodes
) -> None:
    nodes = shuffled(make_nodes(ROWS, prefix="n"))
    await there.awrite(nodes[: ROWS // 2])
    there.client.flush(there.collection_name)
    await there.awrite(nodes[ROWS // 2 :])
    again = nodes[: ROWS // 4] + nodes[-ROWS // 4 :]
    for node in again:
        node.text = "again"
    await there.awrite(shuffled(again))
    gone = {node.node_id for node in nodes[ROWS // 8 : ROWS // 3]}
    await there.adelete_nodes(list(gone))

    wanted = {node.node_id: node for node in sorted(nodes, key=lambda n: n.node_id) if node.node_id not in gone}
    whole = [node async for node in there.aiter_nodes(batch_size=400)]
    assert ids_of(whole) == list(wanted), "its own writes at once, though nothing waits for a tick otherwise"
    for node in whole:
        assert node.get_content() == wanted[node.node_id].get_content()
        assert node.metadata == wanted[node.node_id].metadata
        assert node.embedding == pytest.approx(wanted[node.node_id].embedding, abs=1e-6)

    few = where("number", 300, FilterOperator.LT)
    chosen = list(there.iter_nodes(few, batch_size=16_384, embeddings=False))
    assert ids_of(chosen) == [id_ for id_, node in wanted.items() if node.metadata["number"] < 300]
    assert {node.get_content() for node in chosen} <= {node.get_content() for node in wanted.values()}
    assert all(node.embedding is None for node in chosen)
    assert ids_of(there.get_nodes(filters=few)) and sorted(ids_of(there.get_nodes(filters=few))) == ids_of(chosen)
    assert [node async for node in there.aiter_nodes(where("number", -1))] == []


async def test_what_stays_comes_once_while_others_write_rewrite_and_delete(
    there: AsyncMilvusVectorStore, make_nodes: MakeNodes
) -> None:
    staying = make_nodes(600, prefix="s")
    await there.awrite(staying)
    chance = random.Random(1)

    async def disturb() -> None:
        while True:
            passing = [TextNode(id_=f"s-{chance.random()}", text="x", embedding=[0.5] * 8) for _ in range(20)]
            await there.awrite(passing + chance.sample(staying, 30))  # between the ids of those that stay
            await there.adelete_nodes([node.node_id for node in passing])

    disturbing = asyncio.ensure_future(disturb())
    try:
        for batch_size in (7, 50, 250):
            seen = [node.node_id async for node in there.aiter_nodes(batch_size=batch_size)]
            assert seen == sorted(set(seen)), "in order, none twice"
            assert {node.node_id for node in staying} <= set(seen)
            if there.live().endpoint.is_lite:  # a page of which reads the whole collection
                break
    finally:
        disturbing.cancel()
        with suppress(asyncio.CancelledError):
            await disturbing


# --- ids of all sorts


_ids = st.lists(st.sampled_from(AWKWARD) | st.characters(codec="utf-8"), min_size=1, max_size=3).map("".join)
_number = iter(range(1_000_000))


async def test_ids_of_all_sorts(there: AsyncMilvusVectorStore) -> None:
    await assert_each_comes_once(there, [*AWKWARD, *(first + second for first in AWKWARD for second in AWKWARD)], 90)


@given(st.sets(_ids, min_size=1, max_size=12), st.integers(1, 4))
@settings(max_examples=examples(12), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_ids_on_lite(store: AsyncMilvusVectorStore, ids: set[str], batch_size: int) -> None:
    asyncio.run(assert_each_comes_once(store, list(ids), batch_size))


async def assert_each_comes_once(store: AsyncMilvusVectorStore, ids: list[str], batch_size: int) -> None:
    number = next(_number)
    wanted = sorted(set(ids), key=str.encode)
    await store.async_add(
        [TextNode(id_=id_, text="x", metadata={"example": number}, embedding=[1.0] * 8) for id_ in wanted]
    )
    seen = [node.node_id async for node in store.aiter_nodes(where("example", number), batch_size=batch_size)]
    assert seen == wanted
    await store.adelete_nodes(wanted)


# --- given up


async def test_one_that_is_given_up_holds_nothing(store: AsyncMilvusVectorStore, make_nodes: MakeNodes) -> None:
    store.add(make_nodes(30))
    for _ in store.iter_nodes(batch_size=5):
        break
    async for _ in store.aiter_nodes(batch_size=5):
        break
    async with aclosing(store.aiter_nodes(batch_size=5)) as nodes:
        await anext(nodes)
    pending: AsyncIterator[BaseNode] = store.aiter_nodes(batch_size=5)
    await anext(pending)
    sync = store.iter_nodes(batch_size=5)
    next(sync)
    assert not store.live().calls
    await store.aclose()  # waits for none of them
    gc.collect()


async def test_one_that_is_cancelled_leaves_its_slot(proxy: FaultProxy, held: Held, collection_name: str) -> None:
    async with AsyncMilvusVectorStore(proxy.uri, collection_name=collection_name, dim=8) as store:
        proxy.script(held, method=("Query",))

        async def through() -> None:
            async for _ in store.aiter_nodes():
                raise AssertionError("there is none")

        task = asyncio.ensure_future(through())
        await until(lambda: store.statistics().in_flight == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not store.live().calls
        held.let_go()
        await until(lambda: store.statistics().in_flight == 0)


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_store_closed_under_it_says_so(
    store: AsyncMilvusVectorStore, make_nodes: MakeNodes, is_async: bool
) -> None:
    store.add(make_nodes(30))
    if is_async:
        nodes = store.aiter_nodes(batch_size=10)
        await anext(nodes)
        await store.aclose()
        with pytest.raises(RuntimeError, match="is closed; make a new one"):
            [node async for node in nodes]
    else:
        blocking = store.iter_nodes(batch_size=10)
        next(blocking)
        await store.aclose()
        with pytest.raises(RuntimeError, match="is closed; make a new one"):
            list(blocking)


# --- too much for one answer


async def test_what_is_too_large_for_one_answer_comes_in_smaller_ones(backend: Backend, collection_name: str) -> None:
    nodes = [TextNode(id_=f"n-{n:03}", text=f"{n} " + "x" * 5_000, embedding=[1.0] * 8) for n in range(500)]
    ids = ids_of(nodes)
    narrow: dict[str, Any] = {"grpc_options": {"grpc.max_receive_message_length": 1 << 20}}
    async with AsyncMilvusVectorStore(backend.uri, collection_name=collection_name, dim=8, **narrow) as store:
        await store.async_add(nodes)
        everything = where("id", "", FilterOperator.GT)
        assert ids_of([node async for node in store.aiter_nodes()]) == ids
        assert ids_of(store.iter_nodes(everything)) == ids
        assert sorted(ids_of(await store.aget_nodes(filters=everything))) == ids
        assert sorted(ids_of(store.get_nodes(ids))) == ids


# --- arguments, partitions, other people's collections


@pytest.mark.parametrize("batch_size", [0, -1, 16_385])
def test_a_batch_size_that_can_not_be_is_refused_at_once(store: AsyncMilvusVectorStore, batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size must be between 1 and 16384, got {batch_size}"):
        store.aiter_nodes(batch_size=batch_size)
    with pytest.raises(ValueError, match="batch_size must be"):
        store.iter_nodes(batch_size=batch_size)


def test_partitions(there: AsyncMilvusVectorStore, make_nodes: MakeNodes) -> None:
    there.client.create_partition(there.collection_name, "side")
    there.add(make_nodes(5, prefix="main"))
    there.add(make_nodes(5, prefix="side"), milvus_partition_name="side")
    assert ids_of(there.iter_nodes(batch_size=3)) == [f"{p}-{n}" for p in ("main", "side") for n in range(5)]
    assert ids_of(there.iter_nodes(batch_size=2, milvus_partition_names=["side"])) == [f"side-{n}" for n in range(5)]


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_collection_of_other_make_by_its_own_key(backend: Backend, collection_name: str, dynamic: bool) -> None:
    client = MilvusClient(backend.uri)
    schema = client.create_schema(enable_dynamic_field=dynamic)
    schema.add_field("pk", DataType.INT64, is_primary=True)
    schema.add_field("body", DataType.VARCHAR, max_length=100)
    schema.add_field("vec", DataType.FLOAT_VECTOR, dim=2)
    index = client.prepare_index_params()
    index.add_index("vec", index_type="FLAT", metric_type="L2")
    client.create_collection(collection_name, schema=schema, index_params=index, consistency_level="Strong")
    least, most = -(2**63), 2**63 - 2  # a server of 2.3 itself does not find one more
    keys = [5, -3, 10, 0, 9, most, least]
    client.insert(collection_name, [{"pk": key, "body": f"text {key}", "vec": [key, 1.0]} for key in keys])
    client.close()
    arguments: dict[str, Any] = {"text_key": "body", "embedding_field": "vec", "output_fields": ["body"]}
    arguments["consistency_level"] = "Strong"
    with AsyncMilvusVectorStore(backend.uri, collection_name=collection_name, **arguments) as store:
        for embeddings in (True, False):
            found = list(store.iter_nodes(batch_size=2, embeddings=embeddings))
            assert [(node.node_id, node.get_content()) for node in found] == [
                (str(key), f"text {key}") for key in sorted(keys)
            ]
            assert all((node.embedding is not None) == embeddings for node in found)
        assert sorted(ids_of(store.get_nodes([str(least), "5"]))) == [str(least), "5"]
        assert [node.node_id for node in store.iter_nodes(batch_size=1)][:2] == [str(least), "-3"]
        store.delete_nodes([str(least), "5"])
        assert ids_of(store.iter_nodes()) == ["-3", "0", "9", "10", str(most)]


@pytest.mark.parametrize("key", ["pk", "id"])
def test_a_collection_that_is_made_anew_under_it_is_noticed(
    lite_uri: str, collection_name: str, make_nodes: MakeNodes, key: str
) -> None:
    """Else an export would end early, and look complete."""

    def make_anew() -> None:
        schema = client.create_schema(enable_dynamic_field=True)
        schema.add_field(key, DataType.INT64, is_primary=True)
        schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=8)
        index = client.prepare_index_params()
        index.add_index("embedding", index_type="FLAT", metric_type="IP")
        client.drop_collection(collection_name)
        client.create_collection(collection_name, schema=schema, index_params=index)
        client.insert(collection_name, [{key: n, "text": "new", "embedding": [1.0] * 8} for n in range(3)])

    with AsyncMilvusVectorStore(lite_uri, collection_name=collection_name, dim=8) as store:
        client = store.client
        store.add(make_nodes(9, prefix="n"))
        under_way = store.iter_nodes(batch_size=3)
        next(under_way)
        make_anew()
        with pytest.raises(MilvusException, match=r"made anew meanwhile|incompatible types"):
            list(under_way)
        assert ids_of(store.iter_nodes()) == ["0", "1", "2"], "another one begins with what is there now"


# --- the cursor


def test_a_milvus_that_answers_in_another_order_is_found_out() -> None:
    cursor = Cursor("", 10)
    cursor.advance(["a", "b", "b"])
    cursor.advance([])
    for wrong in (["d", "c"], ["a"]):
        with pytest.raises(QueryError, match=r"not answer in the order .* 3\.2\.1"):
            cursor.advance(wrong)


def test_a_cursor_asks_for_what_comes_after() -> None:
    key = PrimaryKey()
    cursor = Cursor("a == 1", 10)
    assert cursor.expression(key) == "a == 1"
    cursor.advance(['"'])
    assert cursor.expression(key) == r'(a == 1 and id > "\"")'
    assert [cursor.halve() for _ in range(5)] == [True, True, True, False, False] and cursor.rows == 1
