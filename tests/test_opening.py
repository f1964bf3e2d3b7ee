"""Opening a collection that is there: what is asked for is compared where it decides something, and only there."""

from __future__ import annotations

import ast
import copy
import inspect
import pickle
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.types import VectorStoreQuery, VectorStoreQueryMode
from llama_index.vector_stores.milvus import MilvusVectorStore
from llama_index.vector_stores.milvus.utils import BM25BuiltInFunction

from llama_index_milvus_async_ext import AsyncMilvusVectorStore
from tests.conftest import Backend, MakeNodes
from tests.fault_proxy import FaultProxy
from tests.faults import First, Refuse

Open = Callable[..., AsyncMilvusVectorStore]


@pytest.fixture
def open_store(backend: Backend, collection_name: str) -> Any:
    stores: list[AsyncMilvusVectorStore] = []

    def opened(**arguments: Any) -> AsyncMilvusVectorStore:
        stores.append(AsyncMilvusVectorStore(uri=backend.uri, collection_name=collection_name, **arguments))
        return stores[-1]

    yield opened
    for store in stores:
        store.close()


def metric_of(store: AsyncMilvusVectorStore) -> str:
    return str(store.client.describe_index(store.collection_name, "embedding")["metric_type"])


@pytest.mark.parametrize(
    "arguments",
    [
        {"similarity_metric": "COSINE", "index_config": {"metric_type": "L2"}},
        {"index_config": {"metric_type": "L2"}},
        {"index_config": {"index_type": "FLAT", "metric_type": "L2"}, "similarity_metric": "euclidean"},
    ],
    ids=str,
)
def test_a_store_opens_again_with_the_arguments_that_made_it(
    open_store: Open, make_nodes: MakeNodes, arguments: dict[str, Any]
) -> None:
    nodes = make_nodes(3)
    with open_store(dim=8, consistency_level="Strong", **arguments) as store:
        assert metric_of(store) == "L2", "as upstream's: index_config has the last word"
        store.add(nodes)
        again = [open_store(dim=8, **arguments), open_store(), copy.deepcopy(store), pickle.loads(pickle.dumps(store))]
        for other in again:
            with other:
                query = VectorStoreQuery(query_embedding=nodes[0].embedding, similarity_top_k=3)
                assert other.query(query).similarities == store.query(query).similarities


def test_a_plain_store_is_taken_over_whatever_it_was_opened_with(
    backend: Backend, collection_name: str, make_nodes: MakeNodes
) -> None:
    where: dict[str, Any] = {"uri": backend.uri, "collection_name": collection_name, "use_async_client": False}
    MilvusVectorStore(dim=8, similarity_metric="COSINE", **where)
    for reopened in (MilvusVectorStore(**where), MilvusVectorStore(dim=99, similarity_metric="L2", **where)):
        with AsyncMilvusVectorStore.from_vector_store(reopened) as store:
            assert store.dim == 8
            (node,) = nodes = make_nodes(1)
            store.add(nodes)
            found = store.query(VectorStoreQuery(query_embedding=node.embedding))
            assert found.similarities == [pytest.approx(1.0, abs=1e-5)], "by the cosine"


def test_another_metric_that_is_asked_for_is_refused_and_nothing_is_said_of_deleting(open_store: Open) -> None:
    open_store(dim=8, similarity_metric="COSINE").close()
    for asked in ({"similarity_metric": "IP"}, {"index_config": {"metric_type": "IP"}}):
        with pytest.raises(ValueError, match=r"is indexed with metric COSINE, but .*'IP' is asked for") as refused:
            open_store(**asked)
        assert "leave it out" in str(refused.value) and "overwrite" not in str(refused.value)
    assert open_store(similarity_metric="cosine", dim=8).dim == 8


def test_a_metric_in_small_letters_is_the_same(lite_uri: str, collection_name: str) -> None:
    config = {"index_type": "FLAT", "metric_type": "l2"}
    AsyncMilvusVectorStore(lite_uri, collection_name=collection_name, dim=8, similarity_metric="L2").close()
    with AsyncMilvusVectorStore(lite_uri, collection_name=collection_name, index_config=config) as store:
        assert store.similarity_metric == "L2"


def test_another_dimension_that_is_asked_for_is_refused(open_store: Open) -> None:
    open_store(dim=8).close()
    with pytest.raises(ValueError, match="has dimension 8, but dim=9 is asked for") as refused:
        open_store(dim=9)
    assert "overwrite" not in str(refused.value)
    with pytest.raises(ValueError, match="has no field 'vec'"):
        open_store(dim=8, embedding_field="vec")


def test_a_hybrid_search_asks_for_the_metric_of_the_index(lite_uri: str, collection_name: str) -> None:
    arguments: dict[str, Any] = {"uri": lite_uri, "collection_name": collection_name, "enable_sparse": True}
    arguments |= {"sparse_embedding_function": BM25BuiltInFunction(), "consistency_level": "Strong"}
    near, long = (TextNode(id_=f"{x}", text="word", embedding=[x, 0.0]) for x in (1.0, 10.0))
    query = VectorStoreQuery(
        query_embedding=[1.0, 0.0], query_str="another", mode=VectorStoreQueryMode.HYBRID, similarity_top_k=2
    )
    with AsyncMilvusVectorStore(dim=2, index_config={"metric_type": "L2"}, **arguments) as store:
        store.add([near, long])
        with AsyncMilvusVectorStore(**arguments) as again, copy.deepcopy(store) as copied:
            for each in (store, again, copied):
                assert each.query(query).ids == ["1.0", "10.0"], "the nearest first, not the longest"


# -- subclasses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["_prepare_before_search", "_parse_from_milvus_results", "_async_default_search"])
def test_a_subclass_whose_hook_would_be_left_out_is_refused(lite_uri: str, collection_name: str, hook: str) -> None:
    def of_one_tenant(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(MilvusVectorStore, hook)(self, *args, **kwargs)

    tenants = type("TenantStore", (AsyncMilvusVectorStore,), {hook: of_one_tenant, "__module__": __name__})
    with pytest.raises(TypeError, match=f"TenantStore overrides {hook}, .*: override query_many and aquery_many"):
        tenants(uri=lite_uri, collection_name=collection_name, dim=8)


def test_a_subclass_with_other_methods_is_not(lite_uri: str, collection_name: str) -> None:
    class OwnStore(AsyncMilvusVectorStore):
        def _add_dense_index_params(self, index_params: Any) -> Any:
            self.index_config = {"metric_type": "L2"}
            return super()._add_dense_index_params(index_params)

        def _own(self) -> None:
            """Nothing of upstream's."""

    with OwnStore(uri=lite_uri, collection_name=collection_name, dim=8) as store:
        assert metric_of(store) == "L2"


def test_the_list_of_bypassed_hooks_is_that_of_the_installed_upstream() -> None:
    """What upstream's public methods call, directly or not, of its own, and what the constructor calls is none of."""
    from llama_index_milvus_async_ext._store.opening import BYPASSED_HOOKS

    calls = {
        name: {
            node.attr
            for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(method))))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
        }
        for name, method in vars(MilvusVectorStore).items()
        if inspect.isfunction(method)
    }

    def reached_from(names: set[str]) -> set[str]:
        reached: set[str] = set()
        while names:
            reached |= names
            names = {each for name in names for each in calls[name] if each in calls} - reached
        return reached

    public = {name for name in calls if not name.startswith("_")}
    hooks = {name for name in reached_from(public) if name.startswith("_")}
    assert hooks - reached_from({"__init__"}) == set(BYPASSED_HOOKS)


def test_a_store_opens_by_a_connection_that_has_not_heard_yet_that_its_server_is_back(
    proxy: FaultProxy, collection_name: str
) -> None:
    with AsyncMilvusVectorStore(proxy.uri, collection_name=collection_name, dim=8):
        proxy.clear()
        away = ("DescribeCollection", "Connect")
        proxy.script(Refuse(), method=away, on=First(4))
        with AsyncMilvusVectorStore(proxy.uri, collection_name=collection_name, dim=8) as second:
            assert second.dim == 8
        assert proxy.counts["Connect"] >= 2
        proxy.script(Refuse(), method=away)
        with pytest.raises(Exception, match=f"can't connect to {proxy.uri}: no Milvus server answers there"):
            AsyncMilvusVectorStore(proxy.uri, collection_name=collection_name, dim=8)
