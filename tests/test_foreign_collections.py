"""Collections that LlamaIndex did not make: their rows are read, and named, by their own primary keys."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.types import (
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)
from llama_index.vector_stores.milvus import MilvusVectorStore
from pymilvus import DataType, MilvusClient
from pymilvus.exceptions import MilvusException

from llama_index_milvus_async_ext import AsyncMilvusVectorStore
from tests.conftest import Backend
from tests.fault_proxy import FaultProxy
from tests.faults import First, LoseAnswer, Refuse

NUMBERS, TEXTS = DataType.INT64, DataType.VARCHAR


def made(backend: Backend, key_type: DataType, *, key: str = "pk", auto_id: bool = False) -> str:
    """A collection with six rows (unless it makes its own keys), without anything of LlamaIndex's in it."""
    name = f"foreign_{uuid.uuid4().hex}"
    client = MilvusClient(backend.uri)
    schema = client.create_schema(enable_dynamic_field=True, auto_id=auto_id)
    schema.add_field(key, key_type, is_primary=True, **({"max_length": 100} if key_type == TEXTS else {}))
    schema.add_field("words", DataType.VARCHAR, max_length=1000)
    schema.add_field("vec", DataType.FLOAT_VECTOR, dim=2)
    index = client.prepare_index_params()
    index.add_index("vec", index_type="FLAT", metric_type="IP")
    client.create_collection(name, schema=schema, index_params=index, consistency_level="Strong")
    if not auto_id:
        rows = [{"words": f"text {n}", "vec": [float(n), 1.0], "even": n % 2 == 0, "n": n} for n in range(6)]
        client.insert(name, [row | {key: row["n"] if key_type == NUMBERS else str(row["n"])} for row in rows])
    client.close()
    return name


def opened(backend: Backend, name: str, kind: Any = AsyncMilvusVectorStore, **changes: Any) -> Any:
    return kind(
        uri=backend.uri,
        collection_name=name,
        text_key="words",
        embedding_field="vec",
        output_fields=["words", "n"],
        consistency_level="Strong",
        **changes,
    )


@pytest.fixture(scope="module", params=[NUMBERS, TEXTS], ids=lambda kind: kind.name)
def store(request: pytest.FixtureRequest, backend: Backend) -> Iterator[AsyncMilvusVectorStore]:
    with opened(backend, made(backend, request.param)) as store:
        yield store
        store.clear()


@pytest.fixture(scope="module")
def numbered(backend: Backend) -> Iterator[AsyncMilvusVectorStore]:
    with opened(backend, made(backend, NUMBERS)) as store:
        yield store
        store.clear()


def texts_of(nodes: Any) -> list[str]:
    return sorted(node.get_content() for node in nodes)


def test_nodes_are_looked_up_by_the_collections_own_key(store: AsyncMilvusVectorStore) -> None:
    found = store.get_nodes(["2", "4", "99"])
    assert texts_of(found) == ["text 2", "text 4"]
    assert sorted(node.node_id for node in found) == ["2", "4"], "texts, and the same at each look-up"
    assert all(node.embedding is not None and node.embedding[1] == 1.0 for node in found)


async def test_a_query_is_restricted_to_node_ids_and_answers_with_texts(store: AsyncMilvusVectorStore) -> None:
    for mode in (VectorStoreQueryMode.DEFAULT, VectorStoreQueryMode.MMR):
        query = VectorStoreQuery(query_embedding=[1.0, 0.0], similarity_top_k=2, node_ids=["1", "3", "5"], mode=mode)
        found = await store.aquery(query)
        assert sorted(found.ids or []) == sorted(node.node_id for node in found.nodes or [])
        assert set(found.ids or []) < {"1", "3", "5"} and len(found.ids or []) == 2


def test_nodes_are_found_by_filters(store: AsyncMilvusVectorStore) -> None:
    small = MetadataFilters(filters=[MetadataFilter(key="n", value=2, operator=FilterOperator.LT)])
    assert texts_of(store.get_nodes(filters=small)) == ["text 0", "text 1"]


def test_a_key_of_numbers_takes_numbers_and_their_texts_alone(numbered: Any) -> None:
    assert texts_of(numbered.get_nodes([2, "4"])) == ["text 2", "text 4"]
    for call in (numbered.get_nodes, numbered.delete_nodes):
        with pytest.raises(ValueError, match="'four' is no id: 'pk' of this collection is a whole number"):
            call(["2", "four"])
    with pytest.raises(MilvusException, match="'four' is no id"):
        numbered.query(VectorStoreQuery(query_embedding=[1.0, 0.0], node_ids=["four"]))


def test_nodes_are_deleted_by_the_collections_own_key(backend: Backend) -> None:
    for kind in (NUMBERS, TEXTS):
        with opened(backend, made(backend, kind)) as store:
            store.delete_nodes(["1", "3"])
            low = MetadataFilters(filters=[MetadataFilter(key="n", value=3, operator=FilterOperator.LT)])
            store.delete_nodes(["2", "5"], low)
            everything = VectorStoreQuery(query_embedding=[1.0, 0.0], similarity_top_k=9)
            assert texts_of(store.query(everything).nodes) == ["text 0", "text 4", "text 5"]
            store.clear()


def test_search_answers_equal_upstreams_but_for_the_type_of_the_ids(backend: Backend, numbered: Any) -> None:
    query = VectorStoreQuery(query_embedding=[1.0, 0.5], similarity_top_k=4)
    theirs = opened(backend, numbered.collection_name, MilvusVectorStore, use_async_client=False).query(query)
    ours = numbered.query(query)
    assert ours.ids == list(map(str, theirs.ids))
    assert ours.similarities == theirs.similarities
    assert [(node.get_content(), node.metadata) for node in ours.nodes] == [
        (node.get_content(), node.metadata) for node in theirs.nodes
    ]


def test_a_text_that_is_missing_is_found_as_none(lite_uri: str, collection_name: str) -> None:
    with contextlib.closing(MilvusClient(lite_uri)) as client:
        schema = client.create_schema(auto_id=False, enable_dynamic_field=True)
        schema.add_field("id", TEXTS, is_primary=True, max_length=100)
        schema.add_field("text", TEXTS, max_length=100)
        schema.add_field("colour", TEXTS, max_length=100, nullable=True)
        schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=2)
        index = client.prepare_index_params()
        index.add_index("embedding", index_type="FLAT", metric_type="IP")
        client.create_collection(collection_name, schema=schema, index_params=index)
        colours = (None, "red", "")
        rows = [{"id": str(n), "text": "text", "colour": c, "embedding": [1.0, -n]} for n, c in enumerate(colours)]
        client.insert(collection_name, rows)
    with AsyncMilvusVectorStore(lite_uri, collection_name=collection_name, output_fields=["colour"]) as store:
        found = store.query(VectorStoreQuery(query_embedding=[0.0, 1.0], similarity_top_k=3))
        assert [node.metadata for node in found.nodes or []] == [{"colour": colour} for colour in colours]


def a_node(**metadata: Any) -> TextNode:
    return TextNode(id_="a", text="written", embedding=[9.0, 0.0], metadata=metadata)


@pytest.mark.parametrize(
    ("key", "auto_id", "says"),
    [
        ("id", False, "its id is a text, and the collection's primary key 'id' is of type INT64"),
        ("id", True, r"makes its primary keys \('id'\) up itself"),
        ("pk", True, r"makes its primary keys \('pk'\) up itself"),
        ("pk", False, "its metadata has no 'pk', which is the primary key"),
    ],
)
def test_a_node_whose_id_is_no_key_fails_by_name(lite_uri: str, key: str, auto_id: bool, says: str) -> None:
    backend = Backend("lite", lite_uri, "", has_sparse=True)
    with opened(backend, made(backend, NUMBERS, key=key, auto_id=auto_id)) as store:
        report = store.write([a_node()])
        assert not report.written and len(report.failed) == 1
        with pytest.raises(ValueError, match=f"node 'a' can't be stored: .*{says}"):
            raise report.failed[0].error
        store.clear()


def test_a_node_may_bring_its_key_in_its_metadata_as_with_upstream(numbered: Any) -> None:
    numbered.add([a_node(pk=17)])
    (found,) = numbered.get_nodes(["17"])
    assert found.node_id == "a" and found.get_content() == "written", "the node, whatever its row is called"
    assert numbered.query(VectorStoreQuery(query_embedding=[1.0, 0.0])).ids == ["17"]
    numbered.delete_nodes(["17"])
    assert numbered.get_nodes(["17"]) == []


def test_a_collection_that_makes_its_own_keys_takes_inserts(backend: Backend) -> None:
    name = made(backend, NUMBERS, auto_id=True)
    with opened(backend, name, upsert_mode=False) as store:
        store.add([a_node()])
        (found,) = store.query(VectorStoreQuery(query_embedding=[1.0, 0.0])).ids or []
        assert texts_of(store.get_nodes([found])) == ["written"]
        store.clear()


@pytest.mark.parametrize("key_type", [NUMBERS, TEXTS], ids=lambda kind: kind.name)
async def test_rows_of_one_key_are_written_in_the_order_of_their_nodes(backend: Backend, key_type: Any) -> None:
    def of(key: int, version: int) -> TextNode:  # whose own id is another one each time
        pk = key if key_type == NUMBERS else str(key)
        return TextNode(text=f"version {version}", metadata={"pk": pk, "n": version}, embedding=[1.0, 1.0])

    with opened(backend, made(backend, key_type), batch_size=10) as store:
        assert len(store.add([of(3, version) for version in range(9)])) == 9, "each in a request of its own"
        writes = [store.awrite([of(key, version) for key in range(40)]) for version in (10, 11)]
        assert all(report.ok for report in await asyncio.gather(*writes))
        found = store.query(VectorStoreQuery(query_embedding=[1.0, 1.0], similarity_top_k=100))
        texts = sorted(node.get_content() for node in found.nodes or [])
        assert texts == ["version 11"] * 40
        assert store.client.query(store.collection_name, output_fields=["count(*)"]) == [{"count(*)": 40}]
        store.clear()


def test_a_node_is_inserted_as_often_as_it_is_given_where_keys_are_made_up(backend: Backend) -> None:
    name = made(backend, NUMBERS, auto_id=True)
    with opened(backend, name, upsert_mode=False) as store:
        report = store.write([a_node(), a_node()])
        assert report.ok and len(report.written) == 2
        query = VectorStoreQuery(query_embedding=[1.0, 0.0], similarity_top_k=5)
        assert texts_of(store.query(query).nodes) == ["written", "written"]
        store.clear()


def test_what_may_be_stored_under_a_key_of_milvus_own_is_not_sent_again(
    backend: Backend, fault_proxy: FaultProxy
) -> None:
    """It would be stored twice, as no upsert can replace it."""
    name = made(backend, NUMBERS, auto_id=True)
    there = replace(backend, uri=fault_proxy.uri)
    with opened(there, name, upsert_mode=False) as store:
        fault_proxy.script(LoseAnswer(), method="Insert", on=First(1))
        (lost,) = store.write([a_node()]).unknown
        assert "answer lost by the fault proxy" in str(lost.error) and lost.attempts == 1 and lost.retryable
        query = VectorStoreQuery(query_embedding=[1.0, 0.0], similarity_top_k=5)
        assert texts_of(store.query(query).nodes) == ["written"]
        # What was certainly not executed is.
        fault_proxy.script(Refuse(details="failed to connect to all addresses"), method="Insert", on=First(2))
        report = store.write([a_node()])
        assert report.ok and report.retries == 2
        assert texts_of(store.query(query).nodes) == ["written", "written"]
        assert fault_proxy.counts["Insert"] == 4 and not fault_proxy.counts["Upsert"]
        store.clear()
