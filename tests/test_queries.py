"""What a query may ask for, and how it is refused: as the plain store's is, or more clearly."""

from __future__ import annotations

import copy
import pickle
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)
from llama_index.vector_stores.milvus import MilvusVectorStore
from pymilvus.exceptions import MilvusException

from llama_index_milvus_async_ext import AsyncMilvusVectorStore
from tests.conftest import Backend

MMR = VectorStoreQueryMode.MMR
COLORS = ["red", "green", None]


@pytest.fixture(scope="module")
def store(backend: Backend) -> Iterator[AsyncMilvusVectorStore]:
    with AsyncMilvusVectorStore(
        uri=backend.uri, collection_name=f"queries_{uuid.uuid4().hex}", dim=2, consistency_level="Strong"
    ) as store:
        store.add(
            [
                TextNode(
                    id_=f"n{number}",
                    text=f"text {number}",
                    metadata={"number": number} | ({"color": COLORS[number % 3]} if COLORS[number % 3] else {}),
                    embedding=[float(number), 1.0],
                    relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=f"d{number % 2}")},
                )
                for number in range(12)
            ]
        )
        yield store
        store.clear()


def a_query(top_k: Any = 3, **changes: Any) -> VectorStoreQuery:
    return VectorStoreQuery(**({"query_embedding": [1.0, 0.0], "similarity_top_k": top_k} | changes))


# -- how many ---------------------------------------------------------------------------------------------------------


async def test_more_hits_than_a_server_gives_are_had_from_lite(store: Any, backend: Backend) -> None:
    for mode in (VectorStoreQueryMode.DEFAULT, MMR):
        if backend.name == "lite":
            assert len((await store.aquery(a_query(20_000, mode=mode))).ids) == 12
        else:
            with pytest.raises(ValueError, match="similarity_top_k must be between 1 and 16384, got 20000"):
                await store.aquery(a_query(20_000, mode=mode))


async def test_mmr_chooses_from_as_many_hits_as_there_may_be(store: Any) -> None:
    """Four times the number asked for is upstream's choice: nobody asked for 20,000."""
    assert len((await store.aquery(a_query(5_000, mode=MMR))).ids) == 12


def test_numbers_of_numpy_are_numbers(store: Any) -> None:
    for number in (np.int64(2), np.int32(2), np.uint8(2)):
        assert store.query(a_query(number)).ids == ["n11", "n10"]
        assert len(store.query(a_query(number, mode=MMR)).ids) == 2
        assert len(store.query(a_query(number, mode=MMR), mmr_prefetch_k=np.int64(4)).ids) == 2


@pytest.mark.parametrize(
    ("top_k", "options", "says"),
    [
        (0, {}, "similarity_top_k must be .*, got 0"),
        (2.5, {}, "similarity_top_k must be a whole number, not 2.5"),
        (2, {"mmr_prefetch_k": 0}, "mmr_prefetch_k must be .*, got 0"),
        (2, {"mmr_prefetch_factor": 0.1}, "similarity_top_k=2 times mmr_prefetch_factor=0.1 asks for 0 hits"),
        (2, {"mmr_prefetch_factor": 2, "mmr_prefetch_k": 4}, "can't be given together"),
    ],
)
def test_a_number_that_makes_no_sense_is_named_as_it_was_given(
    store: Any, top_k: Any, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        store.query(a_query(top_k, mode=MMR), **options)


def test_a_prefetch_over_the_servers_limit_is_named_as_it_was_given(store: Any, backend: Backend) -> None:
    for options, says in (
        ({"mmr_prefetch_factor": 10.0}, "similarity_top_k=5000 times mmr_prefetch_factor=10.0 asks for 50000 hits"),
        ({"mmr_prefetch_k": 50_000}, "mmr_prefetch_k must be between 1 and 16384, got 50000"),
    ):
        if backend.name == "lite":
            assert len(store.query(a_query(5_000, mode=MMR), **options).ids) == 12
        else:
            with pytest.raises(ValueError, match=says):
                store.query(a_query(5_000, mode=MMR), **options)


# -- refusals ---------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[VectorStoreQuery, str]] = [
    (a_query(query_embedding=[1.0, 2.0, 3.0]), "has 3 dimensions, the collection has 2"),
    (a_query(query_embedding=None), "needs query_embedding"),
    (a_query(query_embedding=[1.0, float("nan")]), "holds NaN or infinity"),
    (a_query(top_k=-1), "got -1"),
    (a_query(filters=MetadataFilters(filters=[MetadataFilter(key="k", value=2**63)])), "is no number"),
    (a_query(doc_ids=["\ud800"]), "surrogate"),
    (a_query(mode=VectorStoreQueryMode.SPARSE), "enable_sparse=True"),
    (a_query(mode=VectorStoreQueryMode.SVM), "does not support query mode"),
]


@pytest.mark.parametrize(("query", "says"), REFUSED, ids=[says for _, says in REFUSED])
async def test_a_refused_query_is_a_milvus_exception_and_a_value_error(
    store: Any, query: VectorStoreQuery, says: str
) -> None:
    with pytest.raises(MilvusException, match=says) as refused:
        await store.aquery(query)
    assert isinstance(refused.value, ValueError)
    for again in (copy.copy(refused.value), pickle.loads(pickle.dumps(refused.value))):
        assert type(again) is type(refused.value) and str(again) == str(refused.value)
        assert again.code == refused.value.code


def test_a_refused_filter_is_one_too_where_nodes_are_looked_up_or_deleted(store: Any) -> None:
    unreadable = MetadataFilters(filters=[MetadataFilter(key="k", value=float("nan"))])
    for call in (store.get_nodes, store.delete_nodes):
        with pytest.raises(MilvusException, match="filter on 'k': nan is no number"):
            call(filters=unreadable)
        with pytest.raises(MilvusException, match="5 is no id: 'id' of this collection is a text"):
            call([5])


def test_the_collection_tells_the_dimension_and_not_the_store(backend: Backend, store: Any) -> None:
    with AsyncMilvusVectorStore(uri=backend.uri, collection_name=store.collection_name) as other:
        other.dim = 99
        assert other.query(a_query()).ids == store.query(a_query()).ids
        with pytest.raises(MilvusException, match="has 99 dimensions, the collection has 2"):
            other.query(a_query(query_embedding=[1.0] * 99))


# -- NOT --------------------------------------------------------------------------------------------------------------


def numbers_of(nodes: Any) -> list[int]:
    return sorted(node.metadata["number"] for node in nodes)


def a_filter(key: str, value: Any, operator: FilterOperator = FilterOperator.EQ) -> MetadataFilter:
    return MetadataFilter(key=key, value=value, operator=operator)


def none_of(*parts: MetadataFilter | MetadataFilters) -> MetadataFilters:
    return MetadataFilters(filters=list(parts), condition=FilterCondition.NOT)


async def test_not_finds_what_none_of_its_filters_matches(store: Any) -> None:
    """As LlamaIndex's simple store: rows without the key as well."""
    small = a_filter("number", 4, FilterOperator.LT)
    for condition, expected in [
        (none_of(a_filter("color", "red")), [n for n in range(12) if n % 3]),
        (none_of(a_filter("color", "red"), a_filter("color", "green")), [2, 5, 8, 11]),
        (none_of(small, a_filter("color", "red")), [4, 5, 7, 8, 10, 11]),
        (none_of(none_of(a_filter("color", "red"))), [0, 3, 6, 9]),
        (none_of(a_filter("color", "red", FilterOperator.NE)), [0, 3, 6, 9]),
        (none_of(a_filter("color", ["red"], FilterOperator.NIN)), [0, 3, 6, 9]),
        (MetadataFilters(filters=[small, none_of(a_filter("color", "red"))]), [1, 2]),
        (MetadataFilters(filters=[small, a_filter("color", "red")], condition=None), [0, 3]),
    ]:
        assert numbers_of(store.get_nodes(filters=condition)) == expected
        assert numbers_of((await store.aquery(a_query(12, filters=condition))).nodes) == expected


def test_not_deletes_what_it_finds(store: Any) -> None:
    extra = [TextNode(id_=f"x{n}", text="x", metadata={"number": -n, "x": n}, embedding=[0.0, 1.0]) for n in (1, 2)]
    store.add(extra)
    store.delete_nodes(["x1", "x2"], none_of(a_filter("x", 1)))
    assert [node.node_id for node in store.get_nodes(["x1", "x2"])] == ["x1"]
    store.delete_nodes(["x1"])


@pytest.mark.parametrize(("of_store", "of_query", "metadata"), [(["i"], None, {"i": 0}), (None, ["i"], {})])
def test_metadata_that_is_not_asked_for_does_not_come(
    backend: Backend, collection_name: str, of_store: Any, of_query: Any, metadata: dict[str, Any]
) -> None:
    """Though a server of 2.3 answers with all of it."""
    for kind in (MilvusVectorStore, AsyncMilvusVectorStore):
        store = kind(backend.uri, collection_name=collection_name, dim=2, overwrite=True, output_fields=of_store)
        node = TextNode(id_="n", text="A", embedding=[1.0, 0.0], metadata={"i": 0, "secret": "x"})
        store.add([node])
        found = store.query(VectorStoreQuery(query_embedding=[1.0, 0.0], output_fields=of_query))
        assert found.nodes is not None
        assert (found.nodes[0].get_content(), found.nodes[0].metadata) == ("A", metadata), kind
