"""The drop-in vector store: upstream's `MilvusVectorStore`, with bounded, batched and retried requests."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import MetadataFilters, VectorStoreQuery, VectorStoreQueryResult

from llama_index_milvus_async_ext._lane.port import LoopPort, run
from llama_index_milvus_async_ext._lane.thread_port import ThreadPort
from llama_index_milvus_async_ext._store import calls, lookups
from llama_index_milvus_async_ext._store.iterating import Iteration
from llama_index_milvus_async_ext._store.open_store import OpenStore
from llama_index_milvus_async_ext._store.searching import search
from llama_index_milvus_async_ext._store.writing import write
from llama_index_milvus_async_ext.report import WriteReport

if TYPE_CHECKING:
    from llama_index.core.vector_stores.utils import DEFAULT_DOC_ID_KEY, DEFAULT_EMBEDDING_KEY, DEFAULT_TEXT_KEY
    from llama_index.vector_stores.milvus import IndexManagement
    from llama_index.vector_stores.milvus.utils import DEFAULT_SPARSE_EMBEDDING_KEY
    from pymilvus import CollectionSchema, DataType

    from llama_index_milvus_async_ext.retry import RetryPolicy


class AsyncMilvusVectorStore(OpenStore):
    """A `MilvusVectorStore` that is fast under concurrency and loses nothing.

        store = AsyncMilvusVectorStore(uri="./milvus.db", dim=384)
        context = StorageContext.from_defaults(vector_store=store)
        index = VectorStoreIndex.from_documents(documents, storage_context=context, use_async=True)

    It takes every argument of upstream's store, and stores rows in the same form: a collection written by one is read
    by the other. Concurrent calls, from any event loop or thread, travel together in few large requests; at most
    `max_concurrency` requests are in flight; failed ones are retried; a row that Milvus can't take fails alone.

    Args:
        uri: Path of a Milvus Lite file (ending in ".db") or address of a server, as upstream. A user and password in
            it are used as the token.
        token: API key or "user:password", as upstream. Never shown or serialised, except in a pickle.
        upsert_mode: Whether rows replace earlier ones of the same id. True here (upstream: False), so that a repeated
            run does not store rows twice. With False the first attempt inserts; only an attempt that follows one whose
            outcome is not known upserts.
        dim, similarity_metric: As upstream; left out, those of an existing collection are taken.
        max_concurrency: Requests in flight to the endpoint at the most, searches and writes together. In a sweep on a
            2.3.5 server (384, 768 and 1,536 dimensions) 4 and 8 were equal for requests of 1,000 rows (93 and 90 % of
            each dimension's best), 8 ahead for smaller ones, and 2 behind (78 %); 16, tried before, added nothing. To
            save memory, no more than 5,000 rows are under way: six full requests. Milvus Lite gets one write at a time.
        batch_size: Rows in one request at the most. In that sweep large ones did best on the server (1,000: 93 %,
            2,000: 92 %, 500: 82 %, 250: 77 %), and on Lite all were equal (95 to 99 %). 800 is as fast as 1,000, with
            less memory under way.
        max_batch_bytes: Bytes of rows in one request at the most. Milvus takes 64 MiB; 8 MiB holds 1,000 rows of 1,536
            dimensions with a page of text each, and keeps what is lost by a failed attempt small.
        max_batch_queries: Queries in one search request (nq) at the most; Milvus takes 16,384. On Lite 500 was first in
            the sweep (250: 73 %, 100: 39 %). On a server more than 250 are spread over the free slots: four requests of
            250 were first there (97 %; of 100: 90 %, of 500: 85 %). A request also asks for no more than 10,000 hits in
            all, so that the answer fits.
        rpc_timeout_seconds: Bound on one attempt of one request: long enough for a full one to a busy server, short
            enough to notice a frozen one.
        retry: When and for how long failed requests are tried again.
        partition_key_field: Metadata key that is Milvus's partition key of a collection that is made: a field of this
            name, a text, or as `scalar_field_names` and `scalar_field_types` have it. A filter on it touches few
            partitions, but on Milvus Lite. A node without it is refused. Of a collection that is there already it must
            be the partition key; left out, the collection is used as it is. On servers before 2.3.12, which put
            upserted rows into wrong partitions, a row that is replaced is deleted first, and is missing for a moment.
        filterable_metadata: Metadata keys that are stored as fields of their own, to filter by; all others are stored
            once, in the node's JSON, which comes back whole. None stores all keys twice, as upstream. Filters on other
            keys are refused, but for those in expressions that you write yourself.
        schema: A `pymilvus.CollectionSchema` that a collection is made from, and used as it is: with the fields that
            `text_key`, `doc_id_field` and `embedding_field` name, a text `id` as primary key and a dynamic field.
            Further fields are filled from metadata of the same name. One that is there already must have its fields.
        served_at: Not for you: where the process that pickled this store serves its Milvus Lite file.
        **kwargs: All other arguments of `MilvusVectorStore` (`collection_name`, `overwrite`, `enable_sparse`,
            `consistency_level`, ...) and of `pymilvus.MilvusClient` (`db_name`, `secure`, `server_pem_path`, ...).

    Raises:
        ConnectError: The server can't be reached or refuses the token, or another process holds the file.
        ValueError: An argument is wrong, or the existing collection does not fit the arguments.
    """

    if TYPE_CHECKING:
        # `OpenStore`'s, to the letter: of a model of pydantic's that has none, type checkers make one up of its fields.
        def __init__(
            self,
            uri: str = "./milvus_llamaindex.db",
            token: str = "",
            collection_name: str = "llamacollection",
            overwrite: bool = False,
            upsert_mode: bool = True,
            collection_properties: dict[str, Any] | None = None,
            doc_id_field: str = DEFAULT_DOC_ID_KEY,
            text_key: str = DEFAULT_TEXT_KEY,
            scalar_field_names: list[str] | None = None,
            scalar_field_types: list[DataType] | None = None,
            enable_dense: bool = True,
            dim: int | None = None,
            embedding_field: str = DEFAULT_EMBEDDING_KEY,
            enable_sparse: bool = False,
            sparse_embedding_field: str = DEFAULT_SPARSE_EMBEDDING_KEY,
            sparse_embedding_function: Any = None,
            index_management: IndexManagement = IndexManagement.CREATE_IF_NOT_EXISTS,
            batch_size: int = 800,
            index_config: dict[str, Any] | None = None,
            sparse_index_config: dict[str, Any] | None = None,
            search_config: dict[str, Any] | None = None,
            similarity_metric: str | None = None,
            consistency_level: str = "Session",
            output_fields: list[str] | None = None,
            hybrid_ranker: str = "RRFRanker",
            hybrid_ranker_params: dict[str, Any] | None = None,
            use_async_client: bool = True,
            *,
            max_concurrency: int = 8,
            max_batch_bytes: int = 8 << 20,
            max_batch_queries: int = 500,
            rpc_timeout_seconds: float = 30.0,
            retry: RetryPolicy | None = None,
            partition_key_field: str | None = None,
            filterable_metadata: Sequence[str] | None = None,
            schema: CollectionSchema | dict[str, Any] | None = None,
            served_at: str | None = None,
            **kwargs: Any,
        ) -> None: ...

    @classmethod
    def class_name(cls) -> str:
        """Name of the class, as LlamaIndex stores it."""
        return "AsyncMilvusVectorStore"

    # --- writes

    async def awrite(self, nodes: Sequence[BaseNode], **add_kwargs: Any) -> WriteReport:
        """Write nodes, and report what became of each; raises for no node, only for misuse.

            report = await store.awrite(nodes)
            again = await store.awrite([f.node for f in report.failed + report.unknown if f.retryable])

        Of several nodes with one id the last wins. If the call is cancelled, what was not sent fails and what was
        under way is `unknown`; the report of it is in the attribute `report` of the `CancelledError` (of whatever
        interrupts the call, Ctrl-C too; see `WriteReport.of`).

        Args:
            nodes: Nodes with embeddings.
            **add_kwargs: `milvus_partition_name` (str), the partition to write to, which must be there: else each node
                fails; `force_flush` (bool), whether to have Milvus seal what was written (Milvus rations this to once
                in ten seconds).
        """
        return await self.in_call(LoopPort.current(), write, nodes, add_kwargs)

    def write(self, nodes: Sequence[BaseNode], **add_kwargs: Any) -> WriteReport:
        """As `awrite`, blocking."""
        return run(self.in_call(ThreadPort(), write, nodes, add_kwargs))

    async def async_add(self, nodes: Sequence[BaseNode], **add_kwargs: Any) -> list[str]:
        """Write nodes.

        Args:
            nodes: Nodes with embeddings.
            **add_kwargs: As `awrite`.

        Returns:
            The ids, in the order of the nodes.

        Raises:
            WriteError: Some nodes were not written; all others were. The error carries the report.
        """
        report = await self.awrite(nodes, **add_kwargs)
        report.raise_for_failures()
        return report.written

    def add(self, nodes: Sequence[BaseNode], **add_kwargs: Any) -> list[str]:
        """As `async_add`, blocking."""
        report = self.write(nodes, **add_kwargs)
        report.raise_for_failures()
        return report.written

    # --- queries

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """Answer one query. Concurrent queries that differ in nothing but their vector or text share a request.

        Args:
            query: The query; modes default, sparse, text_search, hybrid and mmr.
            **kwargs: As upstream's: `milvus_search_config`, `milvus_partition_names`, `milvus_scalar_filters`,
                `string_expr` (ignored, with a warning, beside filters or ids), `mmr_threshold`, `mmr_prefetch_factor`,
                `mmr_prefetch_k`.

        Raises:
            ValueError: The query lacks what its mode needs, filters by what is not `filterable_metadata`, or names a
                partition that is not there; or the store can't answer its mode. A `MilvusException` as well.
            MilvusException: Milvus rejected it, or could not be reached until the deadline.
        """
        return (await self.aquery_many([query], **kwargs))[0]

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """As `aquery`, blocking."""
        return self.query_many([query], **kwargs)[0]

    async def aquery_many(self, queries: Sequence[VectorStoreQuery], **kwargs: Any) -> list[VectorStoreQueryResult]:
        """Answer many queries, in as few requests as their settings allow.

        Returns:
            One result per query, in their order; a query without hits has an empty one.

        Raises:
            ValueError, MilvusException: As `aquery`, for the first query that could not be answered.
        """
        return await self.in_call(LoopPort.current(), search, queries, kwargs)

    def query_many(self, queries: Sequence[VectorStoreQuery], **kwargs: Any) -> list[VectorStoreQueryResult]:
        """As `aquery_many`, blocking."""
        return run(self.in_call(ThreadPort(), search, queries, kwargs))

    # --- deletes and look-ups

    async def adelete(self, ref_doc_id: str | Iterable[str], **delete_kwargs: Any) -> None:
        """Delete all nodes of a document, or of each of several; an empty list deletes nothing.

        Args:
            ref_doc_id: Id, or any iterable of ids, of documents.
            **delete_kwargs: `milvus_partition_name` (str), the partition to delete from.

        Raises:
            TypeError: `ref_doc_id` is neither a text nor an iterable.
        """
        await self.in_call(LoopPort.current(), lookups.delete_documents, ref_doc_id, delete_kwargs)

    def delete(self, ref_doc_id: str | Iterable[str], **delete_kwargs: Any) -> None:
        """As `adelete`, blocking."""
        run(self.in_call(ThreadPort(), lookups.delete_documents, ref_doc_id, delete_kwargs))

    async def adelete_nodes(
        self, node_ids: Iterable[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """Delete the nodes of these ids, or that match these filters; given both, those that meet both.

        Args:
            node_ids: Ids of nodes, in any iterable; an empty one deletes nothing.
            filters: Metadata filters.
            **delete_kwargs: `milvus_partition_name` (str), the partition to delete from.

        Raises:
            ValueError: Neither is given: to delete everything, use `aclear`.
            TypeError: `node_ids` is a single text, or no iterable.
        """
        await self.in_call(LoopPort.current(), lookups.delete_nodes, node_ids, filters, delete_kwargs)

    def delete_nodes(
        self, node_ids: Iterable[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """As `adelete_nodes`, blocking."""
        run(self.in_call(ThreadPort(), lookups.delete_nodes, node_ids, filters, delete_kwargs))

    async def aget_nodes(
        self, node_ids: Iterable[str] | None = None, filters: MetadataFilters | None = None, **kwargs: Any
    ) -> list[BaseNode]:
        """Get nodes, embeddings included, by their ids or by metadata filters.

        Args:
            node_ids: Ids of nodes, in any iterable; those that are not stored are left out.
            filters: Metadata filters.
            **kwargs: `milvus_partition_names` (list[str]), the partitions to look in.

        Raises:
            ValueError: Neither or both are given.
            TypeError: `node_ids` is a single text, or no iterable.
        """
        return await self.in_call(LoopPort.current(), lookups.get_nodes, node_ids, filters, kwargs)

    def get_nodes(
        self, node_ids: Iterable[str] | None = None, filters: MetadataFilters | None = None, **kwargs: Any
    ) -> list[BaseNode]:
        """As `aget_nodes`, blocking."""
        return run(self.in_call(ThreadPort(), lookups.get_nodes, node_ids, filters, kwargs))

    def aiter_nodes(
        self,
        filters: MetadataFilters | None = None,
        *,
        batch_size: int | None = None,
        embeddings: bool = True,
        **kwargs: Any,
    ) -> AsyncGenerator[BaseNode, None]:
        """All nodes, or those that match, one after the other in the order of their ids; for any number of them.

            async for node in store.aiter_nodes():
                ...

        A page of rows is in memory at a time. A node that is there all along comes exactly once, whatever is written
        and deleted meanwhile; one that is written or deleted meanwhile may come or not. Between the pages nothing is
        held: to give up, leave the loop.

        Args:
            filters: Metadata filters.
            batch_size: Rows to look up at once, up to 16,384; by default 1,000, and 5,000 on Milvus Lite, which reads
                the whole collection for each page. One too large for one answer is halved; a server may give a few
                times as many.
            embeddings: Whether the nodes get their embeddings; without them less is sent.
            **kwargs: `milvus_partition_names` (list[str]), the partitions to look in.

        Raises:
            ValueError: An argument is wrong, or a row holds neither a node nor a text.
            MilvusException: Milvus could not be reached until the deadline.
            RuntimeError: The store was closed meanwhile.
        """
        return Iteration(filters, batch_size, embeddings, kwargs).anodes(self)

    def iter_nodes(
        self,
        filters: MetadataFilters | None = None,
        *,
        batch_size: int | None = None,
        embeddings: bool = True,
        **kwargs: Any,
    ) -> Generator[BaseNode, None, None]:
        """As `aiter_nodes`, blocking."""
        return Iteration(filters, batch_size, embeddings, kwargs).nodes(self)

    async def aclear(self) -> None:
        """Drop the collection, as upstream does; make a new store to write to it again."""
        await self.in_call(LoopPort.current(), calls.clear)

    def clear(self) -> None:
        """As `aclear`, blocking."""
        run(self.in_call(ThreadPort(), calls.clear))
