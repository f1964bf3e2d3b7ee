"""The retriever: finds nodes in Milvus for any query engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.constants import DEFAULT_SIMILARITY_TOP_K
from llama_index.core.embeddings.utils import EmbedType, resolve_embed_model
from llama_index.core.schema import NodeWithScore, QueryBundle, QueryType
from llama_index.core.settings import Settings
from llama_index.core.vector_stores.types import (
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
    VectorStoreQueryResult,
)
from llama_index.vector_stores.milvus import MilvusVectorStore

from llama_index_milvus_async_ext._flow.awaiting import awaited
from llama_index_milvus_async_ext._lane.port import LoopPort
from llama_index_milvus_async_ext._lane.thread_port import ThreadPort
from llama_index_milvus_async_ext._queries import questions
from llama_index_milvus_async_ext._queries.ids import listed
from llama_index_milvus_async_ext.vector_store import AsyncMilvusVectorStore

T = TypeVar("T")

_MODES_BY_TEXT = (VectorStoreQueryMode.SPARSE, VectorStoreQueryMode.TEXT_SEARCH)
_CONCURRENT_EMBEDDINGS = 8


class AsyncMilvusRetriever(BaseRetriever):
    """Retrieves nodes from Milvus; concurrent questions share requests.

        retriever = AsyncMilvusRetriever(store, embed_model=embed_model, similarity_top_k=5)
        engine = RetrieverQueryEngine.from_args(retriever)
        response = await engine.aquery("What does the lane guarantee?")
        answers = await retriever.aretrieve_many(questions)  # one list of nodes per question, in their order

    Args:
        vector_store: An `AsyncMilvusVectorStore`; a plain `MilvusVectorStore` is taken over with its connection.
        embed_model: Embeds the questions; `Settings.embed_model` by default.
        similarity_top_k: Nodes per question.
        vector_store_query_mode: "default", "sparse", "text_search", "hybrid" or "mmr".
        filters: Metadata filters that nodes must meet.
        alpha, sparse_top_k, hybrid_top_k: Passed on in the query, as `VectorIndexRetriever` does.
        node_ids: Ids of the only nodes to look at, in any iterable.
        doc_ids: Ids of the only documents to look at, in any iterable.
        milvus_partition_names: The only partitions to look in, by the name of the option that `store.query` has. They
            must be there.
        callback_manager, object_map, verbose: As `BaseRetriever`'s.
        **kwargs: `vector_store_kwargs` (dict), keyword arguments for `AsyncMilvusVectorStore.aquery`.

    Raises:
        ValueError: The mode is unknown, or one that the store can't answer (when asked).
    """

    def __init__(
        self,
        vector_store: MilvusVectorStore,
        embed_model: EmbedType | None = None,
        similarity_top_k: int = DEFAULT_SIMILARITY_TOP_K,
        vector_store_query_mode: VectorStoreQueryMode | str = VectorStoreQueryMode.DEFAULT,
        filters: MetadataFilters | None = None,
        alpha: float | None = None,
        node_ids: Iterable[str] | None = None,
        doc_ids: Iterable[str] | None = None,
        sparse_top_k: int | None = None,
        hybrid_top_k: int | None = None,
        callback_manager: CallbackManager | None = None,
        object_map: dict[str, Any] | None = None,
        verbose: bool = False,
        milvus_partition_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(vector_store, MilvusVectorStore):
            raise TypeError(
                f"vector_store must be an AsyncMilvusVectorStore or a MilvusVectorStore, "
                f"got {type(vector_store).__name__}"
            )
        self._vector_store = AsyncMilvusVectorStore.from_vector_store(vector_store)
        self._given_embed_model = resolve_embed_model(embed_model) if embed_model is not None else None
        self._similarity_top_k = similarity_top_k
        self._vector_store_query_mode = VectorStoreQueryMode(vector_store_query_mode)
        self._filters = filters
        self._alpha = alpha
        self._node_ids = listed("node_ids", node_ids) if node_ids is not None else None
        self._doc_ids = listed("doc_ids", doc_ids) if doc_ids is not None else None
        self._sparse_top_k = sparse_top_k
        self._hybrid_top_k = hybrid_top_k
        self._kwargs: dict[str, Any] = dict(kwargs.get("vector_store_kwargs") or {})
        if milvus_partition_names is not None:
            self._kwargs["milvus_partition_names"] = milvus_partition_names
        super().__init__(callback_manager=callback_manager, object_map=object_map, verbose=verbose)

    @property
    def vector_store(self) -> AsyncMilvusVectorStore:
        """The store that is asked."""
        return self._vector_store

    @property
    def similarity_top_k(self) -> int:
        """Nodes per question."""
        return self._similarity_top_k

    @similarity_top_k.setter
    def similarity_top_k(self, similarity_top_k: int) -> None:
        self._similarity_top_k = similarity_top_k

    async def aretrieve_many(self, queries: Sequence[QueryType]) -> list[list[NodeWithScore]]:
        """Retrieve for many questions at once.

        Args:
            queries: Questions; those with an embedding are not embedded again.

        Returns:
            One list of nodes per question, in the order of the questions.

        Raises:
            Exception: What `aretrieve` raises, for the first question that failed.
        """
        with self._vector_store.live().held(LoopPort.current()):  # whoever closes the store waits
            return await self._aretrieved(queries)

    async def _aretrieved(self, queries: Sequence[QueryType]) -> list[list[NodeWithScore]]:
        together = self._embeds and questions.batch_of(self._embed_model) is not None
        bound = self._embed_model.num_workers or _CONCURRENT_EMBEDDINGS if self._embeds and not together else None
        at_once = asyncio.Semaphore(bound) if bound else contextlib.nullcontext()

        async def embedded(query: QueryType) -> QueryBundle:
            bundle = QueryBundle(query) if isinstance(query, str) else query
            async with at_once:
                return await self._aembedded(bundle)

        bundles = _all_or_first_error(await asyncio.gather(*map(embedded, queries), return_exceptions=True))
        return _all_or_first_error(await asyncio.gather(*map(self.aretrieve, bundles), return_exceptions=True))

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self._vector_store.live().while_held(ThreadPort(), lambda: self._retrieved(query_bundle))

    def _retrieved(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        embedding = query_bundle.embedding
        if self._embeds and embedding is None and query_bundle.embedding_strs:
            embedding = self._embed_model.get_agg_embedding_from_queries(query_bundle.embedding_strs)
        query = self._vector_store_query(query_bundle, embedding)
        return _scored(self._vector_store.query(query, **self._kwargs))

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        with self._vector_store.live().held(LoopPort.current()):
            bundle = await self._aembedded(query_bundle)
            query = self._vector_store_query(bundle, bundle.embedding)
            return _scored(await self._vector_store.aquery(query, **self._kwargs))

    @property
    def _embeds(self) -> bool:
        """Whether the mode searches by embedding."""
        return self._vector_store_query_mode not in _MODES_BY_TEXT

    @property
    def _embed_model(self) -> BaseEmbedding:
        # Looked up only where it is needed: Settings.embed_model may have to be loaded, or may not exist.
        return self._given_embed_model or Settings.embed_model

    async def _aembedded(self, bundle: QueryBundle) -> QueryBundle:
        if not self._embeds or bundle.embedding is not None or not bundle.embedding_strs:
            return bundle
        batch = questions.batch_of(self._embed_model)
        if batch is not None:
            embedding = await questions.embedded(self._embed_model, bundle.embedding_strs, batch)
        else:
            asked = self._embed_model.aget_agg_embedding_from_queries(bundle.embedding_strs)
            embedding = await awaited(asked, "the embedding model")
        return QueryBundle(bundle.query_str, bundle.image_path, bundle.custom_embedding_strs, embedding)

    def _vector_store_query(self, bundle: QueryBundle, embedding: list[float] | None) -> VectorStoreQuery:
        return VectorStoreQuery(
            query_embedding=embedding,
            similarity_top_k=self._similarity_top_k,
            doc_ids=self._doc_ids,
            node_ids=self._node_ids,
            query_str=bundle.query_str,
            mode=self._vector_store_query_mode,
            alpha=self._alpha,
            filters=self._filters,
            sparse_top_k=self._sparse_top_k,
            hybrid_top_k=self._hybrid_top_k,
        )

    def __repr__(self) -> str:
        return (
            f"AsyncMilvusRetriever(collection_name={self._vector_store.collection_name!r}, "
            f"uri={self._vector_store.uri!r}, similarity_top_k={self._similarity_top_k}, "
            f"vector_store_query_mode={self._vector_store_query_mode.value!r})"
        )


def _scored(result: VectorStoreQueryResult) -> list[NodeWithScore]:
    return [
        NodeWithScore(node=node, score=score)
        for node, score in zip(result.nodes or [], result.similarities or [], strict=True)
    ]


def _all_or_first_error(outcomes: Sequence[T | BaseException]) -> list[T]:
    """The outcomes, if none of them is an error; else the first one, once all others have ended, too."""
    results: list[T] = []
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
        results.append(outcome)
    return results
