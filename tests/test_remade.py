"""A collection that another program drops and makes anew is noticed: what fits it now is written and found."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
from llama_index.core.vector_stores.types import VectorStoreQuery
from pymilvus import DataType, MilvusClient
from pymilvus.exceptions import MilvusException
from pymilvus.grpc_gen import common_pb2

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, RetryPolicy, WriteError
from tests.conftest import Backend, MakeNodes
from tests.fault_proxy import FaultProxy
from tests.faults import MilvusError, Nth, rate_limit


@pytest.fixture
def store(backend: Backend, collection_name: str) -> Iterator[AsyncMilvusVectorStore]:
    with AsyncMilvusVectorStore(backend.uri, collection_name=collection_name, dim=8, consistency_level="Strong") as it:
        yield it


def make_anew(store: AsyncMilvusVectorStore, dim: int, *more_fields: tuple[str, DataType, dict[str, Any]]) -> None:
    """As another program would, with a client of its own."""
    client = MilvusClient(store.live().endpoint.uri)
    client.drop_collection(store.collection_name)
    schema = client.create_schema(auto_id=False, enable_dynamic_field=True)
    schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=65_535)
    schema.add_field("doc_id", DataType.VARCHAR, max_length=65_535)
    schema.add_field("text", DataType.VARCHAR, max_length=65_535)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=dim)
    for name, kind, options in more_fields:
        schema.add_field(name, kind, **options)
    index = client.prepare_index_params()
    index.add_index("embedding", index_type="FLAT", metric_type="IP")
    client.create_collection(store.collection_name, schema=schema, index_params=index, consistency_level="Strong")
    client.close()


def test_what_fits_it_now_is_written_and_found_and_what_fitted_it_before_is_refused(
    store: AsyncMilvusVectorStore, make_nodes: MakeNodes
) -> None:
    before, now = make_nodes(3), make_nodes(30, dim=16)
    assert store.write(before).ok
    make_anew(store, 16)
    report = store.write([*now, *before])
    assert report.written == [node.node_id for node in now]
    assert [failed.node.node_id for failed in report.failed] == [node.node_id for node in before]
    assert "has 8 dimensions, the collection has 16" in str(report.failed[0].error)
    assert all(failed.attempts >= 1 for failed in report.failed), "by Milvus, and then before they were sent again"
    found = store.query(VectorStoreQuery(query_embedding=now[3].embedding, similarity_top_k=30))
    assert sorted(found.ids or []) == sorted(report.written)


def test_the_retries_before_and_after_it_was_noticed_are_added_up(
    proxy: FaultProxy, collection_name: str, make_nodes: MakeNodes
) -> None:
    quick = RetryPolicy(initial_backoff_seconds=0.001, max_backoff_seconds=0.01)
    with AsyncMilvusVectorStore(proxy.uri, collection_name=collection_name, dim=8, retry=quick) as store:
        assert store.write(make_nodes(1)).ok
        make_anew(store, 16)
        proxy.script(rate_limit(), method=("Insert", "Upsert"), on=lambda number: number in (1, 3))
        report = store.write([*make_nodes(2, dim=16), *make_nodes(1)])
    assert (len(report.written), report.retries) == (2, 2)
    assert [failed.attempts for failed in report.failed] == [2]


async def test_a_query_that_fits_it_now_is_answered(store: AsyncMilvusVectorStore, make_nodes: MakeNodes) -> None:
    assert store.write(make_nodes(1)).ok
    make_anew(store, 16)
    query = VectorStoreQuery(query_embedding=[0.5] * 16, similarity_top_k=1)
    answers = await asyncio.gather(*(store.aquery(query) for _ in range(5)))
    assert all(answer.ids == [] for answer in answers)
    with pytest.raises(MilvusException, match="8 dimensions"):
        await store.aquery(VectorStoreQuery(query_embedding=[0.5] * 8, similarity_top_k=1))


def test_a_new_required_field_refuses_nodes_without_it_by_name_and_in_few_requests(
    store: AsyncMilvusVectorStore, make_nodes: MakeNodes
) -> None:
    assert store.write(make_nodes(1)).ok
    make_anew(store, 8, ("colour", DataType.VARCHAR, {"max_length": 20}))
    schema = store.live().endpoint.connection.known_schema(store.collection_name)
    assert schema is not None
    schema.confirmed_at = 0.0  # long ago: for a second after, Milvus is not asked again because of rows that it refuses
    nodes = make_nodes(500)
    before = store.statistics().requests
    report = store.write(nodes)
    assert store.statistics().requests - before < 10, "without halving them"
    assert not report.written
    with_it = make_nodes(20)
    for node in with_it:
        node.metadata["colour"] = "red"
    before = store.statistics().requests
    report = store.write([*nodes[:3], *with_it])
    assert report.written == [node.node_id for node in with_it]
    assert all("'colour'" in str(failed.error) for failed in report.failed)
    assert store.statistics().requests - before < 10


NUMBER, TEXT = (DataType.INT64, {}), (DataType.VARCHAR, {"max_length": 4})


@pytest.mark.parametrize(
    ("before", "now", "fitted_before", "fits_now"),
    [
        (NUMBER, TEXT, 2000, "year"),
        (TEXT, NUMBER, "year", 2000),
        ((DataType.INT8, {}), NUMBER, 2, 2000),
        (TEXT, (DataType.VARCHAR, {"max_length": 40}), "year", "éééé"),
        (NUMBER, (DataType.BOOL, {}), 2, True),
    ],
    ids=["text", "number", "wider", "longer", "truth"],
)
def test_a_column_that_takes_something_else_now_is_noticed(
    lite_uri: str, collection_name: str, make_nodes: MakeNodes, before: Any, now: Any, fitted_before: Any, fits_now: Any
) -> None:
    arguments: dict[str, Any] = {"uri": lite_uri, "collection_name": collection_name, "consistency_level": "Strong"}
    with AsyncMilvusVectorStore(dim=8, **arguments) as store:
        make_anew(store, 8, ("value", *before))
    with AsyncMilvusVectorStore(**arguments) as store:
        one, two, three = make_nodes(3)
        one.metadata["value"] = fitted_before
        assert store.write([one]).ok
        make_anew(store, 8, ("value", *now))
        two.metadata["value"] = fits_now
        report = store.write([two, three])
        assert report.written == [two.node_id]
        assert [failed.node for failed in report.failed] == [three]
        rows = store.client.query(collection_name, filter="id != ''", output_fields=["value"])
        assert [row["value"] for row in rows] == [fits_now]
        if type(fitted_before) is not type(fits_now):
            assert f"column 'value' holds {now[0].name} values" in str(store.write([one]).failed[0].error)


def test_a_server_that_says_the_schema_has_changed_is_asked_for_it_at_once(
    proxy: FaultProxy, collection_name: str, make_nodes: MakeNodes
) -> None:
    arguments: dict[str, Any] = {"collection_name": collection_name, "dim": 8, "consistency_level": "Strong"}
    with AsyncMilvusVectorStore(proxy.uri, **arguments) as store:
        assert store.write(make_nodes(1)).ok
        make_anew(store, 8, ("colour", DataType.VARCHAR, {"max_length": 20}))
        nodes = make_nodes(20)
        for node in nodes:
            node.metadata["colour"] = "red"
        proxy.clear()
        proxy.script(MilvusError(109, "schema mismatch", common_pb2.SchemaMismatch), method="Upsert", on=Nth(1))
        assert store.write(nodes).written == [node.node_id for node in nodes]
        assert (proxy.counts["Upsert"], proxy.counts["DescribeCollection"]) == (2, 1)


def test_what_may_have_been_stored_before_it_was_noticed_is_not_called_failed_because_it_fits_no_longer(
    proxy: FaultProxy, collection_name: str, make_nodes: MakeNodes
) -> None:
    with AsyncMilvusVectorStore(proxy.uri, collection_name=collection_name, dim=8) as store:
        assert store.write(make_nodes(1)).ok
        make_anew(store, 16)
        # Each shard of a server looks at its rows by itself: others may have been taken.
        proxy.script(MilvusError(109, "schema mismatch", common_pb2.SchemaMismatch), method="Upsert", on=Nth(1))
        nodes = make_nodes(2)
        report = store.write(nodes)
    assert [(unknown.node, unknown.attempts) for unknown in report.unknown] == [(node, 1) for node in nodes]
    assert "the collection has 16" in str(report.unknown[0].error) and not report.failed


def test_rows_that_are_refused_one_by_one_do_not_have_the_schema_asked_for_one_by_one(
    proxy: FaultProxy, collection_name: str, make_nodes: MakeNodes
) -> None:
    with AsyncMilvusVectorStore(proxy.uri, collection_name=collection_name, dim=8) as store:
        schema = store.live().endpoint.connection.known_schema(collection_name)
        assert schema is not None
        schema.confirmed_at = 0.0  # long ago
        proxy.clear()
        proxy.script(MilvusError(1100, "refused"), method="Upsert")
        assert len(store.write(make_nodes(16)).failed) == 16
        assert proxy.counts["Upsert"] > 16, "the batch was halved down to each row"
        assert proxy.counts["DescribeCollection"] <= 2, "because of the first refusal, and of what was left in the end"


def test_only_what_was_refused_is_sent_again(lite_uri: str, collection_name: str, make_nodes: MakeNodes) -> None:
    arguments: dict[str, Any] = {"uri": lite_uri, "collection_name": collection_name}
    with AsyncMilvusVectorStore(dim=8, **arguments) as store:
        make_anew(store, 8, ("value", *TEXT))
    with AsyncMilvusVectorStore(**arguments) as store:
        make_anew(store, 8, ("value", DataType.VARCHAR, {"max_length": 40}))
        nodes = make_nodes(6)
        for place, node in enumerate(nodes):
            node.metadata["value"] = "four" if place % 2 else "much longer"
        before = store.statistics().rows
        assert store.write(nodes).written == [node.node_id for node in nodes]
        assert store.statistics().rows - before == 6


async def test_a_key_of_another_name_and_type_is_noticed_by_look_ups_searches_and_deletes(
    lite_uri: str, collection_name: str
) -> None:
    client = MilvusClient(lite_uri)

    def make(key: str, key_type: DataType, **options: Any) -> None:
        client.drop_collection(collection_name)
        schema = client.create_schema(auto_id=False, enable_dynamic_field=True)
        schema.add_field(key, key_type, is_primary=True, **options)
        schema.add_field("text", DataType.VARCHAR, max_length=100)
        schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=2)
        index = client.prepare_index_params()
        index.add_index("embedding", index_type="FLAT", metric_type="IP")
        client.create_collection(collection_name, schema=schema, index_params=index)

    query = VectorStoreQuery(query_embedding=[1.0, 0.0], node_ids=["a"])
    for ask in (
        lambda store: store.get_nodes(["a"]),
        lambda store: store.aget_nodes(["a"]),
        lambda store: store.query(query),
        lambda store: store.aquery(query),
        lambda store: store.delete_nodes(["a"]),
        lambda store: store.adelete_nodes(["a"]),
    ):
        make("number", DataType.INT64)
        with AsyncMilvusVectorStore(lite_uri, collection_name=collection_name) as store:
            with pytest.raises(MilvusException, match="'a' is no id"):
                store.get_nodes(["a"])
            make("name", DataType.VARCHAR, max_length=100)
            client.insert(collection_name, [{"name": "a", "text": "found", "embedding": [1.0, 0.0]}])
            answer = ask(store)
            found = await answer if inspect.isawaitable(answer) else answer
            nodes = getattr(found, "nodes", found)
            expected = [("a", "found")] if found is not None else []
            assert [(node.node_id, node.get_content()) for node in nodes or []] == expected
            assert len(store.get_nodes(["a"])) == (found is not None), "else it is deleted"
    client.close()


async def test_concurrent_callers_all_notice(store: AsyncMilvusVectorStore, make_nodes: MakeNodes) -> None:
    assert store.write(make_nodes(1)).ok
    make_anew(store, 16)
    nodes = make_nodes(50, dim=16)
    reports = await asyncio.gather(*(store.awrite([node]) for node in nodes))
    assert all(report.ok for report in reports)
    with pytest.raises(WriteError):
        await store.async_add(make_nodes(1))


def test_code_written_for_the_plain_store_catches_failures_as_before(
    store: AsyncMilvusVectorStore, make_nodes: MakeNodes
) -> None:
    with pytest.raises(MilvusException):
        store.add(make_nodes(1, dim=9))
    with pytest.raises(MilvusException):
        store.query(VectorStoreQuery(query_embedding=[0.5] * 9, similarity_top_k=1))
