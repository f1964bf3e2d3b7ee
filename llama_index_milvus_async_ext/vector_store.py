"""The drop-in vector store: upstream's `MilvusVectorStore`, with bounded, batched and retried requests."""

from __future__ import annotations

import asyncio
import copy
import inspect
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeVar, cast

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import MetadataFilters, VectorStoreQuery, VectorStoreQueryResult
from llama_index.core.vector_stores.utils import DEFAULT_DOC_ID_KEY, DEFAULT_EMBEDDING_KEY, DEFAULT_TEXT_KEY
from llama_index.vector_stores.milvus import IndexManagement, MilvusVectorStore
from llama_index.vector_stores.milvus.utils import DEFAULT_SPARSE_EMBEDDING_KEY, BaseSparseEmbeddingFunction
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.dispatcher import Dispatcher
from llama_index_instrumentation.event_handlers import NullEventHandler
from pymilvus import AsyncMilvusClient, DataType, MilvusClient
from pymilvus.exceptions import MilvusException

from llama_index_milvus_async_ext._endpoint import Endpoint, Limits, WriteTarget
from llama_index_milvus_async_ext._filters import filter_expression, ids_expression
from llama_index_milvus_async_ext._io import IoThread
from llama_index_milvus_async_ext._lane import Lane, Submission
from llama_index_milvus_async_ext._search import (
    SearchPlan,
    check_mode,
    mode_name,
    needs_sparse,
    plan_search,
    result_of,
    stored_node,
)
from llama_index_milvus_async_ext._session import Connected, close_with, fitted, log_retry
from llama_index_milvus_async_ext._wire import ConnectionSettings, Hits, Schema, SearchGroup, silence_pymilvus
from llama_index_milvus_async_ext.events import MilvusWriteEvent
from llama_index_milvus_async_ext.report import FailedNode, WriteReport
from llama_index_milvus_async_ext.retry import RetryPolicy

dispatcher = get_dispatcher(__name__)
T = TypeVar("T")

_IDS_PER_REQUEST = 1_000
_LIMITS_OF = attrgetter(*Limits._fields)
# What decides which lane a store's rows take, besides their partition.
_WRITE_SETTINGS_OF = attrgetter(
    *("collection_name", "upsert_mode", "text_key", "doc_id_field", "enable_dense", "embedding_field"),
    *("enable_sparse", "sparse_embedding_field", "sparse_embedding_function"),
    *Limits._fields,
)


@dataclass(frozen=True)
class StoreStatistics:
    """What has gone to a store's endpoint, and what is on its way there now.

    Stores with the same connection settings share an endpoint, and these numbers.

    Attributes:
        requests: Requests sent, repeated ones included.
        rows: Rows in them.
        queries: Queries in them.
        retries: Requests that were sent again.
        in_flight: Requests without an answer yet.
        waiting: Rows, queries and other calls that wait to be sent.
        limit: Requests that may be in flight now; falls when the server is overloaded, and grows back.
    """

    requests: int
    rows: int
    queries: int
    retries: int
    in_flight: int
    waiting: int
    limit: int


class AsyncMilvusVectorStore(MilvusVectorStore):
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
        served_at: Not for you: where the process that pickled this store serves its Milvus Lite file.
        **kwargs: All other arguments of `MilvusVectorStore` (`collection_name`, `overwrite`, `enable_sparse`,
            `consistency_level`, ...) and of `pymilvus.MilvusClient` (`db_name`, `secure`, `server_pem_path`, ...).

    Raises:
        ConnectError: The server can't be reached or refuses the token, or another process holds the file.
        ValueError: An argument is wrong, or the existing collection does not fit the arguments.
    """

    upsert_mode: bool = Field(default=True, description="Whether rows replace earlier ones of the same id.")
    max_concurrency: int = Field(default=8, description="Requests in flight to the endpoint at the most.")
    batch_size: int = Field(default=800, description="Rows in one request at the most.")
    max_batch_bytes: int = Field(default=8 << 20, description="Bytes of rows in one request at the most.")
    max_batch_queries: int = Field(default=500, description="Queries in one search request at the most.")
    rpc_timeout_seconds: float = Field(default=30.0, description="Bound on one attempt of one request, in seconds.")
    retry: RetryPolicy = Field(default_factory=RetryPolicy, description="When failed requests are tried again.")

    _settings: ConnectionSettings = PrivateAttr()
    _connected: Connected | None = PrivateAttr(default=None)
    _recent_write_lane: tuple[tuple[Any, ...], Lane[Any, None]] | None = PrivateAttr(default=None)

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
        served_at: str | None = None,
        **kwargs: Any,
    ) -> None:
        own = {
            "max_concurrency": max_concurrency,
            "batch_size": batch_size,
            "max_batch_bytes": max_batch_bytes,
            "max_batch_queries": max_batch_queries,
            "rpc_timeout_seconds": rpc_timeout_seconds,
        }
        for name, value in own.items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        settings = ConnectionSettings(uri, token, kwargs, served_at)
        endpoint = Endpoint.open(settings, log_retry)
        try:
            with silence_pymilvus():
                if not overwrite:
                    wanted = [embedding_field] * enable_dense + [sparse_embedding_field] * enable_sparse
                    dim, similarity_metric = fitted(
                        endpoint, collection_name, wanted, embedding_field, dim, similarity_metric
                    )
                super().__init__(
                    uri=endpoint.uri,
                    token=settings.token,
                    collection_name=collection_name,
                    overwrite=overwrite,
                    upsert_mode=upsert_mode,
                    collection_properties=collection_properties,
                    doc_id_field=doc_id_field,
                    text_key=text_key,
                    scalar_field_names=scalar_field_names,
                    scalar_field_types=scalar_field_types,
                    enable_dense=enable_dense,
                    dim=dim,
                    embedding_field=embedding_field,
                    enable_sparse=enable_sparse,
                    sparse_embedding_field=sparse_embedding_field,
                    sparse_embedding_function=sparse_embedding_function,
                    index_management=index_management,
                    batch_size=batch_size,
                    index_config=index_config,
                    sparse_index_config=sparse_index_config,
                    search_config=search_config,
                    similarity_metric=similarity_metric or "IP",
                    consistency_level=consistency_level,
                    output_fields=output_fields,
                    hybrid_ranker=hybrid_ranker,
                    hybrid_ranker_params=hybrid_ranker_params or {},
                    use_async_client=use_async_client,
                    **{"dedicated": True, **settings.options},
                )
                endpoint.connection.fetch_schema(collection_name, rpc_timeout_seconds)
        except BaseException:
            endpoint.close()
            raise
        for name, value in own.items():
            setattr(self, name, value)
        self.uri = settings.uri
        self.retry = retry or RetryPolicy()
        self._settings = settings
        self._connected = Connected(endpoint, self._milvusclient, self._async_milvusclient)
        close_with(self, self._connected)

    @classmethod
    def class_name(cls) -> str:
        """Name of the class, as LlamaIndex stores it."""
        return "AsyncMilvusVectorStore"

    @classmethod
    def from_vector_store(cls, vector_store: MilvusVectorStore, **limits: Any) -> AsyncMilvusVectorStore:
        """Take over a plain store: the same database, as the same user, and the same collection and settings.

        Rows are upserted, whatever the plain store's `upsert_mode`: its default, False, doubles rows on a second run.

        Args:
            vector_store: The plain store; it stays usable. One of this class is returned as it is.
            **limits: Arguments that this class adds, such as `max_concurrency`.
        """
        if isinstance(vector_store, cls):
            return vector_store
        settings = ConnectionSettings.of_client(vector_store.client)
        arguments = _arguments(vector_store) | {"upsert_mode": True} | limits
        arguments.setdefault("batch_size", cls.model_fields["batch_size"].default)
        return cls(uri=settings.uri, token=settings.token, **arguments, **settings.options)

    # --- connections

    @property
    def client(self) -> MilvusClient:
        """Pymilvus's client, for what this class does not offer."""
        # Upstream's constructor asks for it before there is anything else.
        return self._milvusclient if self._connected is None else self._live().client

    @property
    def aclient(self) -> AsyncMilvusClient | None:
        """Pymilvus's async client; unlike this store it serves one event loop only."""
        return self._live().async_client

    def _live(self) -> Connected:
        # From pydantic's dict of private attributes, as to ask for `self._connected` costs a call over a microsecond.
        connected: Connected | None = (self.__pydantic_private__ or {})["_connected"]
        assert connected is not None, "set at the end of __init__"
        if connected.closed:
            raise RuntimeError("this AsyncMilvusVectorStore is closed; make a new one")
        if connected.pid != os.getpid():  # forked: nothing that was connected in the parent works here
            connected = self._connected = Connected.anew(self._settings, self.use_async_client)
            close_with(self, connected)
        return connected

    def close(self) -> None:
        """Wait for the calls that are under way, then close the connection. May be called again."""
        if self._connected is not None:
            self._connected.finish()

    async def aclose(self) -> None:
        """As `close`, without blocking the event loop."""
        if self._connected is not None:
            await asyncio.to_thread(self._connected.finish)

    def __enter__(self) -> AsyncMilvusVectorStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> AsyncMilvusVectorStore:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def statistics(self) -> StoreStatistics:
        """What has gone to the endpoint so far, and what is on its way."""
        endpoint = self._live().endpoint
        counts = IoThread.get().call(endpoint.counts)
        return StoreStatistics(**{name: counts[name] for name in StoreStatistics.__dataclass_fields__})

    # --- copies

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # pydantic's way would drop what does not pickle, connect elsewhere and apply `overwrite` again.
        served_at = self._live().endpoint.connection.address if self._settings.is_file else None
        own = self._limits()._asdict()
        arguments = _arguments(self) | own | {"served_at": served_at}
        connection = (self._settings.uri, self._settings.token, self._settings.options)
        return (_rebuilt, (type(self), connection, arguments))

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> AsyncMilvusVectorStore:
        rebuild, arguments = self.__reduce_ex__(2)
        copied: AsyncMilvusVectorStore = rebuild(*arguments)
        return copied

    def __copy__(self) -> AsyncMilvusVectorStore:
        return self.__deepcopy__()

    # --- writes

    async def awrite(self, nodes: Sequence[BaseNode], **add_kwargs: Any) -> WriteReport:
        """Write nodes, and report what became of each; raises for no node, only for misuse.

            report = await store.awrite(nodes)
            again = await store.awrite([f.node for f in report.failed + report.unknown if f.retryable])

        Of several nodes with one id the last wins. If the call is cancelled, what was not sent fails and what was
        under way is `unknown`; the report of it is in the attribute `report` of the `CancelledError`.

        Args:
            nodes: Nodes with embeddings.
            **add_kwargs: `milvus_partition_name` (str), the partition to write to; `force_flush` (bool), whether to
                have Milvus seal what was written (Milvus rations this to once in ten seconds).
        """
        nodes = list(nodes)
        sparse = None if self._sparse_encoder() is None else await self._asparse_of_nodes(nodes)
        return await self._awrite(nodes, sparse, **add_kwargs)

    def write(self, nodes: Sequence[BaseNode], **add_kwargs: Any) -> WriteReport:
        """As `awrite`, blocking."""
        nodes = list(nodes)
        return IoThread.get().run(self._awrite(nodes, self._sparse_of_nodes(nodes), **add_kwargs))

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

    def start_write(self, nodes: list[BaseNode]) -> Future[WriteReport]:
        """Begin to write nodes, and return at once; the result is that of `write`."""
        return IoThread.get().start(self._awrite(nodes, self._sparse_of_nodes(nodes)))

    async def _awrite(
        self,
        nodes: list[BaseNode],
        sparse: list[Any] | None,
        milvus_partition_name: str | None = None,
        force_flush: bool = False,
        **_: Any,
    ) -> WriteReport:
        started = time.perf_counter()
        connected = self._live()
        with connected:
            schema = connected.endpoint.connection.known_schema(self.collection_name)
            if schema is None:
                try:
                    schema = await self._aschema(connected)
                except MilvusException as error:  # nothing can be sent: that, too, is an outcome of each node
                    return self._report(nodes, Submission.failed(len(nodes), error), started)
            lane = self._write_lane(connected.endpoint, schema, milvus_partition_name or "")
            values: list[Any] = nodes if sparse is None else list(zip(nodes, sparse, strict=True))
            keys = [node.node_id for node in nodes]
            try:
                submission = await IoThread.get().submit(lane, values, keys)
            except asyncio.CancelledError as cancelled:
                interrupted = getattr(cancelled, "submission", None)
                if interrupted is not None:
                    cancelled.report = self._report(nodes, interrupted, started)  # type: ignore[attr-defined]
                raise
            if force_flush:
                await self._acall(_flush(self.collection_name))
        return self._report(nodes, submission, started)

    def _write_lane(self, endpoint: Endpoint, schema: Schema, partition: str) -> Lane[Any, None]:
        # The last one, if nothing has changed: comparing the settings takes 0.6 us, looking a lane up by them 2 us.
        key = (endpoint, endpoint.lanes_forgotten, schema, partition, _WRITE_SETTINGS_OF(self))
        private: dict[str, Any] = self.__pydantic_private__ or {}  # as in `_live`
        recent = private["_recent_write_lane"]
        if recent is None or recent[0] != key:
            lane = endpoint.write_lane(self._write_target(partition), schema, self._limits())
            recent = private["_recent_write_lane"] = (key, lane)
        known: Lane[Any, None] = recent[1]
        return known

    def _write_target(self, partition: str) -> WriteTarget:
        return WriteTarget(
            collection=self.collection_name,
            partition=partition,
            upsert=self.upsert_mode,
            text_key=self.text_key,
            doc_id_field=self.doc_id_field,
            embedding_field=self.embedding_field if self.enable_dense else None,
            sparse_field=self.sparse_embedding_field if self._sparse_encoder() is not None else None,
        )

    def _report(self, nodes: list[BaseNode], submission: Submission[Any], started: float) -> WriteReport:
        failures = submission.failures
        report = WriteReport(
            written=[node.node_id for index, node in enumerate(nodes) if index not in failures],
            retries=submission.retries,
            elapsed_seconds=time.perf_counter() - started,
        )
        for index, failure in sorted(failures.items()):
            failed = FailedNode(nodes[index], failure.error, failure.attempts, failure.retryable)
            (report.unknown if failure.ambiguous else report.failed).append(failed)
        if _is_anyone_listening():
            dispatcher.event(
                MilvusWriteEvent(
                    collection_name=self.collection_name,
                    written=len(report.written),
                    failed=len(report.failed),
                    unknown=len(report.unknown),
                    retries=report.retries,
                    elapsed_seconds=report.elapsed_seconds,
                )
            )
        return report

    def _sparse_encoder(self) -> BaseSparseEmbeddingFunction | None:
        """The function that computes sparse vectors in the client; None if Milvus does, or there are none."""
        function = self.sparse_embedding_function
        return function if self.enable_sparse and isinstance(function, BaseSparseEmbeddingFunction) else None

    async def _asparse_of_nodes(self, nodes: list[BaseNode]) -> list[Any] | None:
        encoder = self._sparse_encoder()
        if encoder is None or not nodes:
            return None
        try:
            return list(await encoder.async_encode_documents([node.get_content() for node in nodes]))
        except Exception:
            return self._sparse_one_by_one(encoder, nodes)

    def _sparse_of_nodes(self, nodes: list[BaseNode]) -> list[Any] | None:
        encoder = self._sparse_encoder()
        if encoder is None or not nodes:
            return None
        try:
            return list(encoder.encode_documents([node.get_content() for node in nodes]))
        except Exception:
            return self._sparse_one_by_one(encoder, nodes)

    @staticmethod
    def _sparse_one_by_one(encoder: BaseSparseEmbeddingFunction, nodes: list[BaseNode]) -> list[Any]:
        """Find the node that the batch failed for; its error takes the place of its vector."""
        vectors: list[Any] = []
        for node in nodes:
            try:
                vectors.append(encoder.encode_documents([node.get_content()])[0])
            except Exception as error:
                vectors.append(error)
        return vectors

    # --- queries

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """Answer one query. Concurrent queries that differ in nothing but their vector or text share a request.

        Args:
            query: The query; modes default, sparse, text_search, hybrid and mmr.
            **kwargs: As upstream's: `milvus_search_config`, `milvus_partition_names`, `milvus_scalar_filters`,
                `string_expr`, `mmr_threshold`, `mmr_prefetch_factor`, `mmr_prefetch_k`.

        Raises:
            ValueError: The query lacks what its mode needs, or the store can't answer its mode.
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
        connected = self._live()
        texts = self._query_texts(queries)
        sparse: dict[int, Any] = dict(texts)
        encoder = self._sparse_encoder()
        if texts and encoder is not None:
            sparse |= zip(texts, await encoder.async_encode_queries(list(texts.values())), strict=True)
        schema = await self._aschema(connected)
        plans = self._plans(connected, schema, queries, sparse, kwargs)
        return self._results(plans, await self._ahits(connected, plans))

    def query_many(self, queries: Sequence[VectorStoreQuery], **kwargs: Any) -> list[VectorStoreQueryResult]:
        """As `aquery_many`, blocking."""
        connected = self._live()
        io = IoThread.get()
        texts = self._query_texts(queries)
        sparse: dict[int, Any] = dict(texts)
        encoder = self._sparse_encoder()
        if texts and encoder is not None:
            sparse |= zip(texts, encoder.encode_queries(list(texts.values())), strict=True)
        schema = connected.endpoint.connection.known_schema(self.collection_name)
        if schema is None:
            schema = io.run(self._aschema(connected))
        plans = self._plans(connected, schema, queries, sparse, kwargs)
        return self._results(plans, io.run(self._ahits(connected, plans)))

    def _query_texts(self, queries: Sequence[VectorStoreQuery]) -> dict[int, str]:
        """The texts of the queries whose mode searches sparse vectors, by their places."""
        texts = {}
        for index, query in enumerate(queries):
            check_mode(self, query)
            if needs_sparse(query):
                if query.query_str is None:
                    raise ValueError(f"a query in mode {mode_name(query)!r} needs query_str")
                texts[index] = query.query_str
        return texts

    def _plans(
        self,
        connected: Connected,
        schema: Schema,
        queries: Sequence[VectorStoreQuery],
        sparse: dict[int, Any],
        options: dict[str, Any],
    ) -> list[SearchPlan]:
        is_lite = connected.endpoint.is_lite
        return [
            plan_search(self, schema, query, sparse.get(index), options, is_lite) for index, query in enumerate(queries)
        ]

    def _results(self, plans: list[SearchPlan], found: Sequence[Hits]) -> list[VectorStoreQueryResult]:
        return [result_of(self, plan, hits) for plan, hits in zip(plans, found, strict=True)]

    async def _ahits(self, connected: Connected, plans: list[SearchPlan]) -> Sequence[Hits]:
        """The hits of each plan; plans of one group travel together."""
        groups: dict[SearchGroup, list[int]] = {}
        for index, plan in enumerate(plans):
            groups.setdefault(plan.group, []).append(index)
        limits = self._limits()
        io = IoThread.get()

        def search(indices: list[int]) -> Coroutine[Any, Any, Submission[Hits]]:
            first = plans[indices[0]]
            lane = connected.endpoint.read_lane(first.group, first.ranker, limits)
            return io.submit(lane, [plans[index].query for index in indices])

        found: list[Any] = [None] * len(plans)
        with connected:
            if len(groups) == 1:
                submissions = [await search(*groups.values())]
            else:
                submissions = await asyncio.gather(*map(search, groups.values()))
        for indices, submission in zip(groups.values(), submissions, strict=True):
            _raise_failure(submission)
            for index, hits in zip(indices, submission.results, strict=True):
                found[index] = hits
        return found

    # --- deletes and look-ups

    async def adelete(self, ref_doc_id: str | list[str], **delete_kwargs: Any) -> None:
        """Delete all nodes of a document, or of each of several; an empty list deletes nothing.

        Args:
            ref_doc_id: Id, or ids, of documents.
            **delete_kwargs: `milvus_partition_name` (str), the partition to delete from.
        """
        ids = [ref_doc_id] if isinstance(ref_doc_id, str) else ref_doc_id
        for start in range(0, len(ids), _IDS_PER_REQUEST):
            named = ids_expression(self.doc_id_field, ids[start : start + _IDS_PER_REQUEST])
            await self._acall(self._delete_matching(named, **delete_kwargs))

    def delete(self, ref_doc_id: str | list[str], **delete_kwargs: Any) -> None:
        """As `adelete`, blocking."""
        IoThread.get().run(self.adelete(ref_doc_id, **delete_kwargs))

    async def adelete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """Delete the nodes of these ids, or that match these filters; given both, those that meet both.

        Args:
            node_ids: Ids of nodes; an empty list deletes nothing.
            filters: Metadata filters.
            **delete_kwargs: `milvus_partition_name` (str), the partition to delete from.

        Raises:
            ValueError: Neither is given: to delete everything, use `aclear`.
        """
        for expression in self._node_expressions(node_ids, filters):
            await self._acall(self._delete_matching(expression, **delete_kwargs))

    def delete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """As `adelete_nodes`, blocking."""
        IoThread.get().run(self.adelete_nodes(node_ids, filters, **delete_kwargs))

    async def aget_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **kwargs: Any
    ) -> list[BaseNode]:
        """Get nodes, embeddings included, by their ids or by metadata filters.

        Args:
            node_ids: Ids of nodes; those that are not stored are left out.
            filters: Metadata filters.
            **kwargs: `milvus_partition_names` (list[str]), the partitions to look in.

        Raises:
            ValueError: Neither or both are given.
        """
        return [stored_node(self, item) for item in await self._aitems(node_ids, filters, **kwargs)]

    def get_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **kwargs: Any
    ) -> list[BaseNode]:
        """As `aget_nodes`, blocking."""
        items = IoThread.get().run(self._aitems(node_ids, filters, **kwargs))
        return [stored_node(self, item) for item in items]

    async def aclear(self) -> None:
        """Drop the collection, as upstream does; make a new store to write to it again."""
        await self._acall(self._drop())

    def clear(self) -> None:
        """As `aclear`, blocking."""
        IoThread.get().run(self._acall(self._drop()))

    async def _aitems(
        self, node_ids: list[str] | None, filters: MetadataFilters | None, **kwargs: Any
    ) -> list[dict[str, Any]]:
        if node_ids is not None and filters is not None and filters.filters:
            raise ValueError("give node_ids or filters, not both")
        items: list[dict[str, Any]] = []
        for expression in self._node_expressions(node_ids, filters):
            items += await self._acall(self._query(expression, kwargs.get("milvus_partition_names")))
        return items

    def _node_expressions(self, node_ids: list[str] | None, filters: MetadataFilters | None) -> list[str]:
        """Filter expressions that together name the nodes, each short enough for a request."""
        matching = filter_expression(filters)
        if node_ids is None:
            if not matching:
                raise ValueError("either node_ids or filters must be given")
            return [matching]
        expressions = []
        for start in range(0, len(node_ids), _IDS_PER_REQUEST):
            named = ids_expression("id", node_ids[start : start + _IDS_PER_REQUEST])
            expressions.append(f"{named} and ({matching})" if matching else named)
        return expressions

    def _delete_matching(
        self, expression: str, milvus_partition_name: str | None = None, **options: Any
    ) -> _Call[None]:
        async def call(endpoint: Endpoint, timeout: float) -> None:
            async with endpoint.writing(self.collection_name, timeout):
                await endpoint.connection.in_thread(
                    endpoint.connection.client.delete,
                    collection_name=self.collection_name,
                    filter=expression,
                    partition_name=milvus_partition_name,
                    timeout=timeout,
                    **options,
                )

        return call

    def _query(self, expression: str, partitions: list[str] | None) -> _Call[list[dict[str, Any]]]:
        async def call(endpoint: Endpoint, timeout: float) -> list[dict[str, Any]]:
            with endpoint.reloading(self.collection_name):
                found = await endpoint.connection.in_thread(
                    endpoint.connection.client.query,
                    collection_name=self.collection_name,
                    filter=expression,
                    partition_names=partitions,
                    timeout=timeout,
                )
            return list(found)

        return call

    def _drop(self) -> _Call[None]:
        async def call(endpoint: Endpoint, timeout: float) -> None:
            async with endpoint.writing(self.collection_name, timeout):
                await endpoint.connection.in_thread(
                    endpoint.connection.client.drop_collection, self.collection_name, timeout=timeout
                )
            endpoint.connection.forget_schema(self.collection_name)

        return call

    async def _aschema(self, connected: Connected) -> Schema:
        known = connected.endpoint.connection.known_schema(self.collection_name)
        if known is not None:
            return known

        async def call(endpoint: Endpoint, timeout: float) -> Schema:
            return await endpoint.connection.schema(self.collection_name, timeout)

        return await self._acall(call)

    async def _acall(self, call: _Call[T]) -> T:
        connected = self._live()
        endpoint = connected.endpoint
        with connected:
            submission = await IoThread.get().submit(
                endpoint.call_lane(self._limits()), [lambda timeout: call(endpoint, timeout)]
            )
        _raise_failure(submission)
        return cast(T, submission.results[0])

    def _limits(self) -> Limits:
        return Limits._make(_LIMITS_OF(self))


_Call = Callable[[Endpoint, float], Awaitable[T]]


def _is_anyone_listening() -> bool:
    """Whether an event would reach a handler; to make one takes longer than to find that out."""
    current: Dispatcher | None = dispatcher
    while current is not None:
        if any(type(handler) is not NullEventHandler for handler in current.event_handlers):
            return True
        current = current.parent if current.propagate else None
    return False


def _flush(collection: str) -> _Call[None]:
    async def call(endpoint: Endpoint, timeout: float) -> None:
        await endpoint.connection.in_thread(endpoint.connection.client.flush, collection, timeout=timeout)

    return call


def _rebuilt(
    cls: type[AsyncMilvusVectorStore], connection: tuple[str, str, dict[str, Any]], arguments: dict[str, Any]
) -> AsyncMilvusVectorStore:
    uri, token, options = connection
    return cls(uri=uri, token=token, **arguments, **options)


def _arguments(store: MilvusVectorStore) -> dict[str, Any]:
    """The constructor's arguments that a store has now, but for its connection and `overwrite`."""
    names = inspect.signature(MilvusVectorStore.__init__).parameters
    left_out = {"self", "kwargs", "uri", "token", "overwrite", "batch_size"}
    return {name: getattr(store, name) for name in names if name not in left_out}


def _raise_failure(submission: Submission[Any]) -> None:
    """Raise the first failure of a submission, if it has any."""
    if submission.failures:
        error = submission.failures[min(submission.failures)].error
        # Several callers may share the error of one request: each gets a copy of its own to raise.
        raise copy.copy(error) from (error.__cause__ if error.__cause__ is not error else None)
