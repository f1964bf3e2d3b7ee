"""From a query to what is asked of Milvus, and from the hits to the result; without Milvus."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from llama_index.core.vector_stores.types import (
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)
from llama_index.vector_stores.milvus.utils import BaseSparseEmbeddingFunction
from pymilvus import CollectionSchema, DataType, FieldSchema, RRFRanker, WeightedRanker

from llama_index_milvus_async_ext._milvus.errors import QueryError, QueryMismatchError
from llama_index_milvus_async_ext._milvus.schema import Schema
from llama_index_milvus_async_ext._milvus.search_request import Hits, HybridGroup, SearchGroup
from llama_index_milvus_async_ext._queries.plan import (
    MAX_TOP_K,
    SearchPlan,
    check_mode,
    mode_name,
    needs_sparse,
    plan_search,
)
from llama_index_milvus_async_ext._queries.results import result_of

MODE = VectorStoreQueryMode
TEXT_AND_NODE = ("words", "_node_content", "_node_type")
EMBEDDING = [1.0, 2.0]
PACKED = struct.pack("<2f", *EMBEDDING)


def a_store(**changes: Any) -> Any:
    settings: dict[str, Any] = {
        "collection_name": "c",
        "doc_id_field": "document",
        "text_key": "words",
        "embedding_field": "dense",
        "sparse_embedding_field": "sparse",
        "sparse_embedding_function": None,
        "enable_sparse": True,
        "similarity_metric": "COSINE",
        "search_config": {"ef": 10},
        "output_fields": [],
        "hybrid_ranker": "RRFRanker",
        "hybrid_ranker_params": {},
    }
    return SimpleNamespace(**(settings | changes))


def a_schema(*extra: FieldSchema, dynamic: bool = True, key: DataType = DataType.VARCHAR) -> Schema:
    fields = [
        FieldSchema("id", key, is_primary=True, max_length=100),
        FieldSchema("words", DataType.VARCHAR, max_length=100),
        *extra,
        FieldSchema("dense", DataType.FLOAT_VECTOR, dim=2),
        FieldSchema("sparse", DataType.SPARSE_FLOAT_VECTOR),
    ]
    return Schema(CollectionSchema(fields, enable_dynamic_field=dynamic).to_dict())


def planned(
    mode: Any = MODE.DEFAULT,
    *,
    store: Any = None,
    schema: Schema | None = None,
    sparse: Any = None,
    is_lite: bool = False,
    options: dict[str, Any] | None = None,
    **changes: Any,
) -> SearchPlan:
    query = VectorStoreQuery(**({"query_embedding": EMBEDDING, "similarity_top_k": 3, "mode": mode} | changes))
    return plan_search(store or a_store(), schema or a_schema(), query, sparse, options or {}, is_lite)


def test_a_plain_query_asks_for_what_nodes_are_built_from() -> None:
    assert planned() == SearchPlan(
        group=SearchGroup("c", "dense", 3, "", TEXT_AND_NODE, orjson.dumps({"ef": 10})),
        ranker=None,
        query=PACKED,
        top_k=3,
    )
    assert planned(store=a_store(search_config=None)).group.search_params == b"{}"
    assert planned(options={"milvus_search_config": {"ef": 70}}).group.search_params == b'{"ef":70}'


def test_partitions_are_those_asked_for() -> None:
    assert planned(options={"milvus_partition_names": ["a", "b"]}).group.partitions == ("a", "b")
    assert planned(options={"milvus_partition_names": []}).group.partitions == ()


def test_all_that_restricts_the_rows_is_in_the_expression() -> None:
    scalars = {"milvus_scalar_filters": [{"key": "tags", "value": "x"}], "string_expr": "instead == 1"}
    filters = MetadataFilters(filters=[MetadataFilter(key="color", value="red")])
    group = planned(filters=filters, doc_ids=["d"], node_ids=["5"], options=scalars).group
    for part in ('color == "red"', 'document in ["d"]', 'id in ["5"]', 'ARRAY_CONTAINS(tags, "x")'):
        assert part in group.expression
    assert "instead" not in group.expression, "as upstream: it counts where there is nothing else"
    assert planned(options={"string_expr": "instead == 1"}).group.expression == "instead == 1"
    assert planned(node_ids=["5"], schema=a_schema(key=DataType.INT64)).group.expression == "id in [5]"


def test_what_is_written_for_lite_alone_is_for_lite_alone() -> None:
    filters = MetadataFilters(filters=[MetadataFilter(key="color", value="red")], condition="not")
    assert "not null" in planned(filters=filters, is_lite=True).group.expression
    assert "not null" not in planned(filters=filters).group.expression


@pytest.mark.parametrize("mode", [MODE.SPARSE, MODE.TEXT_SEARCH])
def test_a_sparse_query_needs_no_embedding(mode: VectorStoreQueryMode) -> None:
    plan = planned(mode, sparse="words to find", query_embedding=None)
    assert (plan.group.field_name, plan.query, plan.ranker) == ("sparse", "words to find", None)
    assert orjson.loads(plan.group.search_params) == {"params": {"drop_ratio_search": 0.2}}
    assert planned(mode, sparse="w", is_lite=True).group.search_params == b"{}"


class Encoder(BaseSparseEmbeddingFunction):
    def encode_queries(self, queries: list[str]) -> list[dict[int, float]]:
        raise NotImplementedError

    def encode_documents(self, documents: list[str]) -> list[dict[int, float]]:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("name", "given", "used", "ranker"),
    [
        ("RRFRanker", {}, {"k": 60}, RRFRanker(60)),
        ("RRFRanker", {"k": 7}, {"k": 7}, RRFRanker(7)),
        ("WeightedRanker", {}, {"weights": [1.0, 1.0]}, WeightedRanker(1.0, 1.0)),
        ("WeightedRanker", {"weights": [0.2, 0.8]}, {"weights": [0.2, 0.8]}, WeightedRanker(0.2, 0.8)),
    ],
)
@pytest.mark.parametrize(("encoder", "metric"), [(Encoder(), "IP"), (None, "BM25")])
def test_a_hybrid_query_has_two_halves(
    name: str, given: Any, used: Any, ranker: Any, encoder: Any, metric: str
) -> None:
    store = a_store(hybrid_ranker=name, hybrid_ranker_params=given, sparse_embedding_function=encoder)
    plan = planned(MODE.HYBRID, sparse={7: 0.5}, store=store)
    assert plan.query == (PACKED, {7: 0.5})
    assert plan.group.field_name == "dense"
    assert orjson.loads(plan.group.search_params) == {"metric_type": "COSINE", "params": {"ef": 10}}
    assert plan.group.hybrid == HybridGroup("sparse", orjson.dumps({"metric_type": metric}), name, orjson.dumps(used))
    assert type(plan.ranker) is type(ranker) and plan.ranker.dict() == ranker.dict()
    bare = planned(MODE.HYBRID, sparse="w", store=a_store(search_config=None))
    assert orjson.loads(bare.group.search_params)["params"] == {}


def test_an_unknown_ranker_is_named() -> None:
    with pytest.raises(QueryError, match=r"^hybrid_ranker must be 'RRFRanker' or 'WeightedRanker', got 'Best'$"):
        planned(MODE.HYBRID, sparse="w", store=a_store(hybrid_ranker="Best"))


@pytest.mark.parametrize(
    ("options", "top_k", "is_lite", "limit"),
    [
        ({}, 3, False, 12),
        ({}, 5_000, False, MAX_TOP_K),
        ({}, 5_000, True, 20_000),
        ({"mmr_prefetch_factor": 2.5}, 3, False, 7),
        ({"mmr_prefetch_factor": 1 / 3}, 3, False, 1),
        ({"mmr_prefetch_factor": 2}, MAX_TOP_K // 2, False, MAX_TOP_K),
        ({"mmr_prefetch_factor": 2}, MAX_TOP_K, True, 2 * MAX_TOP_K),
        ({"mmr_prefetch_k": 5}, 3, False, 5),
        ({"mmr_prefetch_k": 1}, 3, False, 1),
        ({"mmr_prefetch_k": MAX_TOP_K}, 3, False, MAX_TOP_K),
        ({"mmr_prefetch_k": MAX_TOP_K + 1}, 3, True, MAX_TOP_K + 1),
    ],
)
def test_mmr_chooses_from_more_hits_than_are_wanted(
    options: dict[str, Any], top_k: int, is_lite: bool, limit: int
) -> None:
    plan = planned(MODE.MMR, options={"mmr_threshold": 0.3, **options}, similarity_top_k=top_k, is_lite=is_lite)
    assert (plan.group.limit, plan.top_k) == (limit, top_k)
    assert (plan.mmr_embedding, plan.mmr_threshold) == (EMBEDDING, 0.3)
    assert planned(options=options).group.limit == 3, "in this mode alone"


def test_mmr_needs_the_vectors_of_the_hits() -> None:
    assert planned(MODE.MMR).group.output_fields == (*TEXT_AND_NODE, "dense")
    assert planned(MODE.MMR, output_fields=["dense"]).group.output_fields == ("dense", "words")
    assert planned(MODE.MMR, output_fields=["*"]).group.output_fields == ("*", "words")


@pytest.mark.parametrize(
    ("top_k", "options", "is_lite", "says"),
    [
        (0, {}, False, "^similarity_top_k must be between 1 and 16384, got 0$"),
        (0, {}, True, "^similarity_top_k must be at least 1, got 0$"),
        (MAX_TOP_K + 1, {}, False, "^similarity_top_k must be between 1 and 16384, got 16385$"),
        (2.0, {}, False, "^similarity_top_k must be a whole number, not 2.0$"),
        (2, {"mmr_prefetch_k": MAX_TOP_K + 1}, False, "^mmr_prefetch_k must be between 1 and 16384, got 16385$"),
        (2, {"mmr_prefetch_k": 0}, True, "^mmr_prefetch_k must be at least 1, got 0$"),
        (
            MAX_TOP_K,
            {"mmr_prefetch_factor": 1.0001},
            False,
            "^similarity_top_k=16384 times mmr_prefetch_factor=1.0001 asks for 16385 hits to choose from, and Milvus "
            "finds between 1 and 16384: give another factor, or mmr_prefetch_k$",
        ),
        (2, {"mmr_prefetch_factor": 0.4}, True, "asks for 0 hits to choose from, and there must be at least 1: give"),
        (2, {"mmr_prefetch_factor": 2, "mmr_prefetch_k": 4}, False, "^'mmr_prefetch_factor' and 'mmr_prefetch_k' can"),
    ],
)
def test_a_number_out_of_range_is_named_as_it_was_given(
    top_k: Any, options: dict[str, Any], is_lite: bool, says: str
) -> None:
    with pytest.raises(QueryError, match=says):
        planned(MODE.MMR, options=options, similarity_top_k=top_k, is_lite=is_lite)


def test_as_many_hits_as_there_may_be_are_no_problem() -> None:
    for top_k, is_lite in ((1, False), (MAX_TOP_K, False), (1, True), (MAX_TOP_K + 1, True)):
        plan = planned(similarity_top_k=top_k, is_lite=is_lite)
        assert (plan.group.limit, plan.top_k) == (top_k, top_k)


def test_the_text_is_among_the_chosen_fields() -> None:
    chosen = a_store(output_fields=["year"])
    assert planned(store=chosen).group.output_fields == ("year", "words")
    assert planned(store=chosen, output_fields=["size"]).group.output_fields == ("size", "words"), "the query's first"
    assert planned(store=chosen, output_fields=["words", "size"]).group.output_fields == ("words", "size")
    assert planned(store=chosen, output_fields=[]).group.output_fields == ("words",)


def test_without_dynamic_fields_all_but_the_vectors_are_asked_for() -> None:
    schema = a_schema(FieldSchema("year", DataType.INT64), dynamic=False)
    assert planned(schema=schema).group.output_fields == ("id", "words", "year")


def test_an_embedding_that_does_not_fit_the_collection_is_refused() -> None:
    with pytest.raises(QueryMismatchError, match=r"^the query's embedding has 3 dimensions, the collection has 2: use"):
        planned(query_embedding=[1.0, 2.0, 3.0])
    with pytest.raises(QueryError, match=r"^the query's embedding holds NaN or infinity: check") as refused:
        planned(query_embedding=[1.0, float("nan")])
    assert not isinstance(refused.value, QueryMismatchError)
    for mode in (MODE.DEFAULT, MODE.MMR, MODE.HYBRID):
        with pytest.raises(QueryError, match=f"^a query in mode '{mode.value}' needs query_embedding: give"):
            planned(mode, query_embedding=None)
    assert planned(store=a_store(embedding_field="of no dimension")).query == PACKED


# -- modes ------------------------------------------------------------------------------------------------------------


def in_mode(mode: Any) -> VectorStoreQuery:
    query = VectorStoreQuery()
    query.mode = mode
    return query


def test_modes_of_sparse_vectors_need_a_store_that_has_them() -> None:
    for mode in (MODE.SPARSE, MODE.TEXT_SEARCH, MODE.HYBRID):
        check_mode(a_store(), in_mode(mode))
        assert needs_sparse(in_mode(mode))
        with pytest.raises(QueryError, match=f"^query mode '{mode.value}' needs sparse embeddings: make .*enable_spar"):
            check_mode(a_store(enable_sparse=False), in_mode(mode))
    for mode in (MODE.DEFAULT, MODE.MMR):
        check_mode(a_store(enable_sparse=False), in_mode(mode))
        assert not needs_sparse(in_mode(mode))


def test_a_mode_that_milvus_does_not_have_is_named_with_those_that_it_has() -> None:
    for mode in (MODE.SVM, "svm"):
        assert mode_name(in_mode(mode)) == "svm"
        with pytest.raises(
            QueryError,
            match=r"^Milvus does not support query mode 'svm'; use one of default, sparse, text_search, hybrid, mmr$",
        ):
            check_mode(a_store(), in_mode(mode))


# -- results ----------------------------------------------------------------------------------------------------------


def some_hits(vectors: list[list[float]], ids: list[Any]) -> Hits:
    entities = [{"words": f"text {id_}", "dense": vector} for id_, vector in zip(ids, vectors, strict=True)]
    return Hits(ids, [0.9 - 0.1 * place for place in range(len(ids))], entities)


def test_hits_become_nodes_in_their_order() -> None:
    result = result_of(a_store(), planned(), some_hits([[1.0, 0.0], [0.0, 1.0]], [7, 8]))
    assert result.ids == ["7", "8"] and result.similarities == [0.9, 0.8]
    assert [(node.node_id, node.get_content()) for node in result.nodes or ()] == [("7", "text 7"), ("8", "text 8")]


def test_mmr_takes_different_ones_among_the_hits() -> None:
    hits = some_hits([[1.0, 2.0], [1.0, 2.1], [2.0, -1.0]], [7, 8, 9])
    for threshold, ids in ((0.01, ["7", "9"]), (1.0, ["7", "8"])):
        plan = planned(MODE.MMR, similarity_top_k=2, options={"mmr_threshold": threshold})
        result = result_of(a_store(), plan, hits)
        assert result.ids == ids
        assert [(node.node_id, node.get_content()) for node in result.nodes or ()] == [
            (id_, f"text {id_}") for id_ in ids
        ]
        assert len(result.similarities or ()) == 2
    nothing = result_of(a_store(), planned(MODE.MMR), some_hits([], []))
    assert (nothing.nodes, nothing.similarities, nothing.ids) == ([], [], [])
