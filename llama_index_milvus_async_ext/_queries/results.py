"""From the hits of a query to its result."""

from __future__ import annotations

from llama_index.core.indices.query.embedding_utils import get_top_k_mmr_embeddings
from llama_index.core.vector_stores.types import VectorStoreQueryResult
from llama_index.vector_stores.milvus import MilvusVectorStore

from llama_index_milvus_async_ext._milvus.search_request import Hits
from llama_index_milvus_async_ext._nodes.stored import found_node
from llama_index_milvus_async_ext._queries.plan import SearchPlan


def result_of(store: MilvusVectorStore, plan: SearchPlan, hits: Hits) -> VectorStoreQueryResult:
    """Build the nodes of a query's hits, as upstream builds them; their ids are texts, whatever the key is."""
    if plan.mmr_embedding is None:
        nodes = [found_node(store, *hit) for hit in zip(hits.ids, hits.entities, strict=True)]
        return VectorStoreQueryResult(nodes=nodes, similarities=hits.scores, ids=list(map(str, hits.ids)))
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
        nodes=[found_node(store, id_, entities[id_]) for id_ in ids], similarities=similarities, ids=list(map(str, ids))
    )
