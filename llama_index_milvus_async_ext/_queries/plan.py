"""From a `VectorStoreQuery` to the group of searches that it may share a request with."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any, NamedTuple

import orjson
from llama_index.core.vector_stores.types import VectorStoreQuery, VectorStoreQueryMode
from llama_index.vector_stores.milvus import MilvusVectorStore
from llama_index.vector_stores.milvus.base import DEFAULT_MMR_PREFETCH_FACTOR
from llama_index.vector_stores.milvus.utils import BaseSparseEmbeddingFunction
from pymilvus import DataType, RRFRanker, WeightedRanker

from llama_index_milvus_async_ext._milvus.errors import QueryError, QueryMismatchError
from llama_index_milvus_async_ext._milvus.schema import Schema
from llama_index_milvus_async_ext._milvus.search_request import HybridGroup, SearchGroup
from llama_index_milvus_async_ext._nodes.stored import NODE_FIELDS
from llama_index_milvus_async_ext._nodes.vectors import pack
from llama_index_milvus_async_ext._queries.filterable import check_filterable
from llama_index_milvus_async_ext._queries.filters import search_expression

MAX_TOP_K = 16_384  # of a Milvus server, per query; Milvus Lite has no limit
_SPARSE_MODES = (VectorStoreQueryMode.SPARSE, VectorStoreQueryMode.TEXT_SEARCH)
_VECTOR_TYPES = frozenset(kind for kind in DataType if "VECTOR" in kind.name)


class SearchPlan(NamedTuple):
    """One query, ready for its lane.

    Attributes:
        group: What it shares with the queries that it may travel with.
        ranker: How a hybrid search merges its two halves.
        query: A dense vector (packed), a sparse one, or a text; for hybrid, a pair: the dense vector, and the sparse
            one or the text.
        top_k: Hits that the caller wants.
        mmr_embedding: For maximal marginal relevance, the query vector as numbers; None in other modes.
        mmr_threshold: For maximal marginal relevance, the weight of relevance.
    """

    group: SearchGroup
    ranker: Any
    query: Any
    top_k: int
    mmr_embedding: Sequence[float] | None = None
    mmr_threshold: float | None = None


def plan_search(
    store: MilvusVectorStore,
    schema: Schema,
    query: VectorStoreQuery,
    sparse: Any,
    options: dict[str, Any],
    is_lite: bool,
) -> SearchPlan:
    """Plan one query.

    Args:
        store: The store that is asked; its settings are upstream's.
        schema: The store's collection.
        query: The query.
        sparse: Its sparse vector, or its text where Milvus computes that; None in modes that need neither.
        options: Upstream's keyword arguments of `query`: `milvus_search_config`, `milvus_partition_names`,
            `milvus_scalar_filters`, `string_expr`, `mmr_threshold`, `mmr_prefetch_factor`, `mmr_prefetch_k`.
        is_lite: Whether this is Milvus Lite.

    Raises:
        QueryMismatchError: The query's vector does not fit the collection as `schema` describes it.
        QueryError: The query lacks what its mode needs, or can't be answered by Milvus.
    """
    mode = query.mode
    most = None if is_lite else MAX_TOP_K
    top_k = limit = _checked_number("similarity_top_k", query.similarity_top_k, most)
    check_filterable(store, schema, query.filters, options.get("milvus_scalar_filters"))
    expression = search_expression(
        query,
        store.doc_id_field,
        options.get("milvus_scalar_filters"),
        primary_key=schema.primary_key,
        is_lite=is_lite,
    )
    partitions = options.get("milvus_partition_names")
    outputs = _output_fields(store, schema, query)
    is_mmr = mode == VectorStoreQueryMode.MMR
    if is_mmr:
        limit = _prefetch(top_k, options, most)
        if store.embedding_field not in outputs and "*" not in outputs:
            outputs = (*outputs, store.embedding_field)
    search_params: dict[str, Any] = dict(options.get("milvus_search_config", store.search_config) or {})
    field_name, data, hybrid, ranker = store.embedding_field, None, None, None
    if mode in _SPARSE_MODES:
        field_name, data = store.sparse_embedding_field, sparse
        # As upstream; Milvus Lite searches sparse vectors exactly, and refuses to leave the small values out.
        search_params = {} if is_lite else {"params": {"drop_ratio_search": 0.2}}
    else:
        data = _packed_embedding(query, schema, store.embedding_field)
    if mode == VectorStoreQueryMode.HYBRID:
        data = (data, sparse)
        search_params = {"metric_type": store.similarity_metric, "params": dict(store.search_config or {})}
        hybrid, ranker = _hybrid(store)
    group = SearchGroup(
        collection=store.collection_name,
        field_name=field_name,
        limit=limit,
        expression=expression or options.get("string_expr") or "",
        output_fields=outputs,
        search_params=orjson.dumps(search_params),
        partitions=tuple(partitions) if partitions is not None else None,
        hybrid=hybrid,
    )
    mmr_embedding = query.query_embedding if is_mmr else None
    return SearchPlan(group, ranker, data, top_k, mmr_embedding, options.get("mmr_threshold"))


def check_mode(store: MilvusVectorStore, query: VectorStoreQuery) -> None:
    """Raise `QueryError` for a mode that this store can't answer."""
    mode = query.mode
    if mode in (*_SPARSE_MODES, VectorStoreQueryMode.HYBRID):
        if not store.enable_sparse:
            raise QueryError(
                f"query mode {mode_name(query)!r} needs sparse embeddings: make the store with enable_sparse=True"
            )
    elif mode not in (VectorStoreQueryMode.DEFAULT, VectorStoreQueryMode.MMR):
        known = ", ".join(m.value for m in (VectorStoreQueryMode.DEFAULT, *_SPARSE_MODES)) + ", hybrid, mmr"
        raise QueryError(f"Milvus does not support query mode {mode_name(query)!r}; use one of {known}")


def mode_name(query: VectorStoreQuery) -> str:
    """The query's mode, which may be given as a plain string."""
    return str(getattr(query.mode, "value", query.mode))


def needs_sparse(query: VectorStoreQuery) -> bool:
    """Whether the query's mode searches the sparse vectors."""
    return query.mode in (*_SPARSE_MODES, VectorStoreQueryMode.HYBRID)


def _output_fields(store: MilvusVectorStore, schema: Schema, query: VectorStoreQuery) -> tuple[str, ...]:
    chosen: Sequence[str] | None = query.output_fields
    if chosen is None and store.output_fields:
        chosen = store.output_fields
    if chosen is not None:
        return tuple(chosen) if store.text_key in chosen else (*chosen, store.text_key)
    return node_fields(store, schema)


def node_fields(store: MilvusVectorStore, schema: Schema) -> tuple[str, ...]:
    """What nodes without embeddings are built from: three fields; upstream asks for everything.

    The vector alone would be half the answer.
    """
    if schema.dynamic:
        return (store.text_key, *NODE_FIELDS)
    return tuple(f["name"] for f in schema.described["fields"] if f["type"] not in _VECTOR_TYPES)


def _checked_number(name: str, value: Any, most: int | None) -> int:
    try:
        number = index(value)  # numpy's integers as well
    except TypeError:
        raise QueryError(f"{name} must be a whole number, not {value!r}") from None
    if number < 1 or (most is not None and number > most):
        bounds = f"between 1 and {most}" if most is not None else "at least 1"
        raise QueryError(f"{name} must be {bounds}, got {number}")
    return number


def _prefetch(top_k: int, options: dict[str, Any], most: int | None) -> int:
    """How many hits maximal marginal relevance chooses from."""
    factor, number = options.get("mmr_prefetch_factor"), options.get("mmr_prefetch_k")
    if factor is not None and number is not None:
        raise QueryError("'mmr_prefetch_factor' and 'mmr_prefetch_k' can't be given together")
    if number is not None:
        return _checked_number("mmr_prefetch_k", int(number), most)
    if factor is None:
        product = int(top_k * DEFAULT_MMR_PREFETCH_FACTOR)
        return product if most is None else min(product, most)
    product = int(top_k * factor)
    if product < 1 or (most is not None and product > most):
        raise QueryError(
            f"similarity_top_k={top_k} times mmr_prefetch_factor={factor} asks for {product} hits to choose from, and "
            f"{f'Milvus finds between 1 and {most}' if most is not None else 'there must be at least 1'}: "
            "give another factor, or mmr_prefetch_k"
        )
    return product


def _packed_embedding(query: VectorStoreQuery, schema: Schema, field_name: str) -> bytes:
    embedding = query.query_embedding
    if embedding is None:
        raise QueryError(
            f"a query in mode {mode_name(query)!r} needs query_embedding: give the retriever an embed_model, "
            "or set VectorStoreQuery(query_embedding=...)"
        )
    dim = schema.params(field_name).get("dim")
    if dim is not None and len(embedding) != int(dim):
        raise QueryMismatchError(
            f"the query's embedding has {len(embedding)} dimensions, the collection has {dim}: "
            "use the embedding model that the collection was made for"
        )
    try:
        return pack(embedding)
    except ValueError as error:
        raise QueryError(f"the query's embedding {error}: check the embedding model") from None


def _hybrid(store: MilvusVectorStore) -> tuple[HybridGroup, Any]:
    name, params = store.hybrid_ranker, store.hybrid_ranker_params
    ranker: Any
    if name == "WeightedRanker":
        params = params or {"weights": [1.0, 1.0]}
        ranker = WeightedRanker(*params["weights"])
    elif name == "RRFRanker":
        params = params or {"k": 60}
        ranker = RRFRanker(params["k"])
    else:
        raise QueryError(f"hybrid_ranker must be 'RRFRanker' or 'WeightedRanker', got {name!r}")
    client_side = isinstance(store.sparse_embedding_function, BaseSparseEmbeddingFunction)
    sparse_params = orjson.dumps({"metric_type": "IP" if client_side else "BM25"})
    return HybridGroup(store.sparse_embedding_field, sparse_params, name, orjson.dumps(params)), ranker
