"""From a `VectorStoreQuery` to the group of searches that it may share a request with, and from hits to its result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from llama_index.core.indices.query.embedding_utils import get_top_k_mmr_embeddings
from llama_index.core.schema import BaseNode, TextNode
from llama_index.core.vector_stores.types import VectorStoreQuery, VectorStoreQueryMode, VectorStoreQueryResult
from llama_index.core.vector_stores.utils import metadata_dict_to_node
from llama_index.vector_stores.milvus import MilvusVectorStore
from llama_index.vector_stores.milvus.base import DEFAULT_MMR_PREFETCH_FACTOR
from llama_index.vector_stores.milvus.utils import BaseSparseEmbeddingFunction
from pydantic_core import from_json
from pymilvus import DataType, RRFRanker, WeightedRanker

from llama_index_milvus_async_ext._filters import search_expression
from llama_index_milvus_async_ext._vectors import pack
from llama_index_milvus_async_ext._wire import Hits, HybridGroup, Schema, SearchGroup

MAX_TOP_K = 16_384  # of Milvus, per query
_SPARSE_MODES = (VectorStoreQueryMode.SPARSE, VectorStoreQueryMode.TEXT_SEARCH)
_VECTOR_TYPES = frozenset(kind for kind in DataType if "VECTOR" in kind.name)
_NODE_FIELDS = ("_node_content", "_node_type")


@dataclass(frozen=True)
class SearchPlan:
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
        ValueError: The query lacks what its mode needs, or can't be answered by this collection.
    """
    mode = query.mode
    limit = _checked_top_k(query.similarity_top_k)
    expression = search_expression(query, store.doc_id_field, options.get("milvus_scalar_filters"))
    partitions = options.get("milvus_partition_names")
    outputs = _output_fields(store, schema, query)
    is_mmr = mode == VectorStoreQueryMode.MMR
    if is_mmr:
        limit = _prefetch(limit, options)
        if store.embedding_field not in outputs and "*" not in outputs:
            outputs = (*outputs, store.embedding_field)
    search_params: dict[str, Any] = dict(options.get("milvus_search_config", store.search_config) or {})
    field_name, data, hybrid, ranker = store.embedding_field, None, None, None
    if mode in _SPARSE_MODES:
        field_name, data = store.sparse_embedding_field, sparse
        # As upstream; Milvus Lite searches sparse vectors exactly, and refuses to leave the small values out.
        search_params = {} if is_lite else {"params": {"drop_ratio_search": 0.2}}
    else:
        data = _packed_embedding(query, store.dim)
    if mode == VectorStoreQueryMode.HYBRID:
        data = (data, sparse)
        search_params = {"metric_type": store.similarity_metric, "params": dict(store.search_config or {})}
        hybrid, ranker = _hybrid(store)
    group = SearchGroup(
        collection=store.collection_name,
        field_name=field_name,
        limit=limit,
        expression=expression or options.get("string_expr", ""),
        output_fields=outputs,
        search_params=orjson.dumps(search_params),
        partitions=tuple(partitions) if partitions is not None else None,
        hybrid=hybrid,
    )
    mmr_embedding = query.query_embedding if is_mmr else None
    return SearchPlan(group, ranker, data, query.similarity_top_k, mmr_embedding, options.get("mmr_threshold"))


def check_mode(store: MilvusVectorStore, query: VectorStoreQuery) -> None:
    """Raise `ValueError` for a mode that this store can't answer."""
    mode = query.mode
    if mode in (*_SPARSE_MODES, VectorStoreQueryMode.HYBRID):
        if not store.enable_sparse:
            raise ValueError(
                f"query mode {mode_name(query)!r} needs sparse embeddings: make the store with enable_sparse=True"
            )
    elif mode not in (VectorStoreQueryMode.DEFAULT, VectorStoreQueryMode.MMR):
        known = ", ".join(m.value for m in (VectorStoreQueryMode.DEFAULT, *_SPARSE_MODES)) + ", hybrid, mmr"
        raise ValueError(f"Milvus does not support query mode {mode_name(query)!r}; use one of {known}")


def mode_name(query: VectorStoreQuery) -> str:
    """The query's mode, which may be given as a plain string."""
    return str(getattr(query.mode, "value", query.mode))


def needs_sparse(query: VectorStoreQuery) -> bool:
    """Whether the query's mode searches the sparse vectors."""
    return query.mode in (*_SPARSE_MODES, VectorStoreQueryMode.HYBRID)


def result_of(store: MilvusVectorStore, plan: SearchPlan, hits: Hits) -> VectorStoreQueryResult:
    """Build the nodes of a query's hits, as upstream builds them."""
    if plan.mmr_embedding is None:
        nodes = [_node(store, *hit) for hit in zip(hits.ids, hits.entities, strict=True)]
        return VectorStoreQueryResult(nodes=nodes, similarities=hits.scores, ids=hits.ids)
    if not hits.ids:
        return VectorStoreQueryResult(nodes=[], similarities=[], ids=[])
    similarities, ids = get_top_k_mmr_embeddings(
        query_embedding=list(plan.mmr_embedding),
        embeddings=[entity[store.embedding_field] for entity in hits.entities],
        similarity_top_k=plan.top_k,
        embedding_ids=hits.ids,
        mmr_threshold=plan.mmr_threshold,
    )
    entities = dict(zip(hits.ids, hits.entities, strict=True))
    return VectorStoreQueryResult(
        nodes=[_node(store, id_, entities[id_]) for id_ in ids], similarities=similarities, ids=ids
    )


def _node(store: MilvusVectorStore, id_: Any, entity: dict[str, Any]) -> BaseNode:
    if entity.get("_node_type") == "TextNode" and store.text_key in entity:
        # What metadata_dict_to_node does of it, with a quicker parser, and validated once with its text.
        content = from_json(entity["_node_content"])
        content.pop("class_name", None)
        content["text"] = entity[store.text_key]
        return TextNode(**content)
    metadata = {key: entity.get(key) for key in store.output_fields}
    node: BaseNode
    if "_node_content" in entity:
        for key in _NODE_FIELDS:
            metadata.setdefault(key, entity.get(key))
        node = metadata_dict_to_node(metadata)
    else:
        node = TextNode(id_=str(id_), metadata=metadata)  # upstream makes an id up at each query
    if store.text_key in entity:
        node.set_content(entity[store.text_key])
    return node


def stored_node(store: MilvusVectorStore, item: dict[str, Any]) -> BaseNode:
    """Build the node of a stored row, embedding included, as upstream builds it.

    Raises:
        ValueError: The row holds neither a node nor a text.
    """
    text = item.get(store.text_key)
    node: BaseNode
    if "_node_content" in item:
        node = metadata_dict_to_node(item, text=text)
    elif text:
        node = TextNode(text=text, metadata={key: item.get(key) for key in store.output_fields})
    else:
        raise ValueError(
            f"row {item.get('id')!r} of collection {store.collection_name!r} holds neither a node nor a text in "
            f"column {store.text_key!r}; was it written by something else, or is text_key= another?"
        )
    embedding = item.get(store.embedding_field)
    node.embedding = list(embedding) if embedding is not None else None
    return node


def _output_fields(store: MilvusVectorStore, schema: Schema, query: VectorStoreQuery) -> tuple[str, ...]:
    chosen: Sequence[str] | None = query.output_fields
    if chosen is None and store.output_fields:
        chosen = store.output_fields
    if chosen is not None:
        return tuple(chosen) if store.text_key in chosen else (*chosen, store.text_key)
    # Upstream asks for everything. Nodes are built from three fields only; the vector alone would be half the answer.
    if schema.dynamic:
        return (store.text_key, *_NODE_FIELDS)
    return tuple(f["name"] for f in schema.described["fields"] if f["type"] not in _VECTOR_TYPES)


def _checked_top_k(top_k: int) -> int:
    if not isinstance(top_k, int) or not 1 <= top_k <= MAX_TOP_K:
        raise ValueError(f"similarity_top_k must be between 1 and {MAX_TOP_K}, got {top_k!r}")
    return top_k


def _prefetch(top_k: int, options: dict[str, Any]) -> int:
    if options.get("mmr_prefetch_factor") is not None and options.get("mmr_prefetch_k") is not None:
        raise ValueError("'mmr_prefetch_factor' and 'mmr_prefetch_k' can't be given together")
    if options.get("mmr_prefetch_k") is not None:
        return _checked_top_k(int(options["mmr_prefetch_k"]))
    return _checked_top_k(int(top_k * (options.get("mmr_prefetch_factor") or DEFAULT_MMR_PREFETCH_FACTOR)))


def _packed_embedding(query: VectorStoreQuery, dim: int | None) -> bytes:
    embedding = query.query_embedding
    if embedding is None:
        raise ValueError(
            f"a query in mode {mode_name(query)!r} needs query_embedding: give the retriever an embed_model, "
            "or set VectorStoreQuery(query_embedding=...)"
        )
    if dim is not None and len(embedding) != dim:
        raise ValueError(
            f"the query's embedding has {len(embedding)} dimensions, the collection has {dim}: "
            "use the embedding model that the collection was made for"
        )
    try:
        return pack(embedding)
    except ValueError as error:
        raise ValueError(f"the query's embedding {error}: check the embedding model") from None


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
        raise ValueError(f"hybrid_ranker must be 'RRFRanker' or 'WeightedRanker', got {name!r}")
    client_side = isinstance(store.sparse_embedding_function, BaseSparseEmbeddingFunction)
    sparse_params = orjson.dumps({"metric_type": "IP" if client_side else "BM25"})
    return HybridGroup(store.sparse_embedding_field, sparse_params, name, orjson.dumps(params)), ranker
