"""A store on a collection that is there: the same as by upstream's constructor, with fewer questions."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
from llama_index.core.vector_stores.types import VectorStoreQuery
from llama_index.vector_stores.milvus import IndexManagement, MilvusVectorStore
from pymilvus import DataType, MilvusClient, MilvusException

from llama_index_milvus_async_ext import AsyncMilvusVectorStore
from llama_index_milvus_async_ext._milvus.indexes import metrics
from llama_index_milvus_async_ext._store import existing, open_store
from tests.conftest import Backend, MakeNodes
from tests.fault_proxy import FaultProxy
from tests.faults import MilvusError, Nth
from tests.leftovers import nothing_is_left_of

DIM = 8

ARGUMENTS: dict[str, dict[str, Any]] = {
    "none": {},
    "a metric": {"similarity_metric": "cosine", "index_config": {"index_type": "FLAT"}},
    "a mode": {"upsert_mode": False, "consistency_level": "Bounded", "index_management": IndexManagement.NO_VALIDATION},
    "fields": {"output_fields": ["a"], "scalar_field_names": ["a"], "scalar_field_types": [DataType.INT64]},
    "configurations": {"search_config": {"ef": 20}, "hybrid_ranker_params": {"k": 3}, "use_async_client": False},
}


@pytest.mark.parametrize("given", ARGUMENTS.values(), ids=ARGUMENTS)
def test_a_store_is_the_same_as_by_upstreams_constructor(
    backend: Backend, collection_name: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    where: dict[str, Any] = {"uri": backend.uri, "collection_name": collection_name, "dim": DIM, **given}
    AsyncMilvusVectorStore(**where).close()
    constructed: list[bool] = []
    monkeypatch.setattr(
        open_store, "construct", lambda *arguments: constructed.append(True) or existing.construct(*arguments)
    )
    with AsyncMilvusVectorStore(**where) as quick:
        assert constructed == [True]
        monkeypatch.setattr(open_store, "needs_nothing", lambda *_: False)
        with AsyncMilvusVectorStore(**where) as slow:
            assert constructed == [True]
            assert quick.model_dump() == slow.model_dump()
            assert quick.model_fields_set == slow.model_fields_set
            private = [dict(store.__pydantic_private__ or {}) for store in (quick, slow)]
            for attributes in private:
                for name in ("_connected", "_settings", "_milvusclient", "_async_milvusclient"):
                    attributes.pop(name, None)
            assert private[0] == private[1]
            assert vars(quick).keys() == vars(slow).keys()


def test_another_version_of_upstreams_constructor_is_run_itself(
    backend: Backend, collection_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    where: dict[str, Any] = {"uri": backend.uri, "collection_name": collection_name, "dim": DIM}
    AsyncMilvusVectorStore(**where).close()

    def never(*_: Any) -> None:
        raise AssertionError("constructed here")

    monkeypatch.setattr(open_store, "construct", never)
    with pytest.raises(AssertionError):
        AsyncMilvusVectorStore(**where)
    monkeypatch.setattr(existing, "_ARGUMENTS", existing._ARGUMENTS | {"new_argument"})
    AsyncMilvusVectorStore(**where).close()


def test_a_collection_without_an_index_gets_one_as_by_upstream(
    backend: Backend, collection_name: str, make_nodes: MakeNodes
) -> None:
    where: dict[str, Any] = {"uri": backend.uri, "collection_name": collection_name, "dim": DIM}
    MilvusVectorStore(**where, use_async_client=False)
    client = MilvusClient(backend.uri)
    client.release_collection(collection_name)
    for index in client.list_indexes(collection_name):
        client.drop_index(collection_name, index)
    with AsyncMilvusVectorStore(**where) as store:
        assert len(client.list_indexes(collection_name)) == 1
        client.load_collection(collection_name)
        assert len(store.add(make_nodes(3, dim=DIM))) == 3
    client.close()


def test_what_is_known_of_indexes_is_the_same_by_the_public_client(backend: Backend, collection_name: str) -> None:
    with AsyncMilvusVectorStore(
        backend.uri, collection_name=collection_name, dim=DIM, similarity_metric="cosine"
    ) as store:
        connection = store.live().endpoint.connection
        quick = metrics(connection, collection_name, 10)
        connection.stub_method = lambda _: None  # type: ignore[method-assign]
        assert quick == metrics(connection, collection_name, 10) == {"embedding": "COSINE"}
        assert existing.existing(connection, "absent", 10) is None


def test_a_store_opens_with_two_questions_if_another_one_is_open(proxy: FaultProxy, collection_name: str) -> None:
    where: dict[str, Any] = {"uri": proxy.uri, "collection_name": collection_name, "dim": DIM}
    with AsyncMilvusVectorStore(**where):
        before = len(proxy.requests)
        with AsyncMilvusVectorStore(**where):
            asked = [record.method for record in proxy.requests[before:]]
    assert asked == ["DescribeCollection", "DescribeIndex"]


def test_an_index_is_made_also_where_the_strategy_is_given_as_a_text(backend: Backend, collection_name: str) -> None:
    where: dict[str, Any] = {"uri": backend.uri, "collection_name": collection_name, "dim": DIM}
    with AsyncMilvusVectorStore(**where) as store:
        client = store.client
        client.release_collection(collection_name)
        client.drop_index(collection_name, "embedding")
        assert not client.list_indexes(collection_name)
        with AsyncMilvusVectorStore(**where, index_management="create_if_not_exists"):  # type: ignore[arg-type]
            assert client.list_indexes(collection_name) == ["embedding"]


def test_a_class_that_makes_indexes_of_its_own_is_asked_for_them(backend: Backend, collection_name: str) -> None:
    where: dict[str, Any] = {"uri": backend.uri, "collection_name": collection_name, "dim": DIM}
    AsyncMilvusVectorStore(**where).close()
    asked: list[bool] = []

    class Indexing(AsyncMilvusVectorStore):
        def _create_index_if_required(self) -> None:
            asked.append(True)
            super()._create_index_if_required()

    Indexing(**where).close()
    assert asked == [True]


def test_a_collection_that_another_process_makes_just_now_is_opened(proxy: FaultProxy, collection_name: str) -> None:
    where: dict[str, Any] = {"uri": proxy.uri, "collection_name": collection_name, "dim": DIM}
    AsyncMilvusVectorStore(**where).close()
    absent = proxy.script(MilvusError(100, "can't find collection"), method="DescribeCollection", on=Nth(1))
    AsyncMilvusVectorStore(**where).close()
    assert absent.struck == 1


@pytest.mark.parametrize("method", ["CreateCollection", "CreateIndex"])
def test_a_collection_that_another_process_makes_at_the_same_time_is_opened(
    proxy: FaultProxy, collection_name: str, method: str
) -> None:
    """Milvus Lite refuses to make it, or its index, a second time."""
    refused = proxy.script(MilvusError(1, "collection 'c' already exists"), method=method, on=Nth(1))
    with AsyncMilvusVectorStore(proxy.uri, collection_name=collection_name, dim=DIM) as store:
        assert refused.struck == 1
        assert store.client.list_indexes(collection_name) == ["embedding"]
    assert nothing_is_left_of(proxy)


def test_an_index_that_can_not_be_made_is_an_error(lite_uri: str, collection_name: str) -> None:
    """Its message has the word "existing" in it; one of a collection that another process is just making, "exists"."""
    refused = {"index_type": "SPARSE_WAND"}
    with pytest.raises(MilvusException, match="requires SPARSE_INVERTED_INDEX"):
        AsyncMilvusVectorStore(
            lite_uri, collection_name=collection_name, dim=DIM, enable_sparse=True, sparse_index_config=refused
        )


def test_a_collection_that_somebody_has_released(backend: Backend, collection_name: str, make_nodes: MakeNodes) -> None:
    """Milvus Lite releases all of them at each of its starts, so it is told to load; a server's stays released."""
    with AsyncMilvusVectorStore(backend.uri, collection_name=collection_name, dim=DIM) as store:
        nodes = make_nodes(3, dim=DIM)
        store.add(nodes)
        store.client.release_collection(collection_name)
        query = VectorStoreQuery(query_embedding=nodes[0].embedding, similarity_top_k=1)
        if backend.name == "lite":
            assert store.query(query).ids == [nodes[0].node_id]
            return
        calls: list[Callable[[], Any]] = [
            lambda: store.query(query),
            lambda: store.get_nodes([nodes[0].node_id]),
            lambda: store.delete("nobody's"),
            lambda: next(store.iter_nodes()),
        ]
        for call in calls:
            before = store.statistics().retries
            with pytest.raises(MilvusException, match=f"load_collection\\('{collection_name}'\\)") as raised:
                call()
            assert raised.value.code == 101
            assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)
            assert store.statistics().retries == before, "it would be no use"
        store.client.load_collection(collection_name)
        assert store.query(query).ids == [nodes[0].node_id]
