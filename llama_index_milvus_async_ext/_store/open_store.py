"""A store that is open: its settings, its connection, its calls, its end, and its copies."""

from __future__ import annotations

import functools
import os
from collections.abc import Awaitable, Callable, Sequence
from operator import attrgetter
from typing import Any, TypeVar

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.vector_stores.utils import DEFAULT_DOC_ID_KEY, DEFAULT_EMBEDDING_KEY, DEFAULT_TEXT_KEY
from llama_index.vector_stores.milvus import IndexManagement, MilvusVectorStore
from llama_index.vector_stores.milvus.utils import DEFAULT_SPARSE_EMBEDDING_KEY, BaseSparseEmbeddingFunction
from pymilvus import AsyncMilvusClient, CollectionSchema, DataType, MilvusClient
from typing_extensions import Self

from llama_index_milvus_async_ext._flow.uninterrupted import auninterrupted, uninterrupted
from llama_index_milvus_async_ext._lane import forks
from llama_index_milvus_async_ext._lane.port import Port
from llama_index_milvus_async_ext._milvus import lite
from llama_index_milvus_async_ext._milvus.endpoint import Endpoint
from llama_index_milvus_async_ext._milvus.limits import Limits
from llama_index_milvus_async_ext._milvus.opening import first_answer
from llama_index_milvus_async_ext._milvus.quiet import silence_pymilvus
from llama_index_milvus_async_ext._milvus.search_request import warmed_up
from llama_index_milvus_async_ext._milvus.session import Connected
from llama_index_milvus_async_ext._milvus.settings import ConnectionSettings
from llama_index_milvus_async_ext._milvus.use import Use, closed_if_dropped
from llama_index_milvus_async_ext._store import copying, making, tracing
from llama_index_milvus_async_ext._store.arguments import as_fields, limits_of, without_fields
from llama_index_milvus_async_ext._store.existing import construct, existing, make_beside_others, needs_nothing
from llama_index_milvus_async_ext._store.opening import Known, arguments_of, check_hooks, fitted
from llama_index_milvus_async_ext._store.statistics import StoreStatistics
from llama_index_milvus_async_ext._store.write_lanes import RecentLane
from llama_index_milvus_async_ext.retry import RetryPolicy

T = TypeVar("T")

_LIMITS_OF = attrgetter(*Limits._fields)


class OpenStore(MilvusVectorStore):
    """What `AsyncMilvusVectorStore` is but for its writes and reads; see there for the arguments."""

    upsert_mode: bool = Field(default=True, description="Whether rows replace earlier ones of the same id.")
    max_concurrency: int = Field(default=8, description="Requests in flight to the endpoint at the most.")
    batch_size: int = Field(default=800, description="Rows in one request at the most.")
    max_batch_bytes: int = Field(default=8 << 20, description="Bytes of rows in one request at the most.")
    max_batch_queries: int = Field(default=500, description="Queries in one search request at the most.")
    rpc_timeout_seconds: float = Field(default=30.0, description="Bound on one attempt of one request, in seconds.")
    retry: RetryPolicy = Field(default_factory=RetryPolicy, description="When failed requests are tried again.")
    partition_key_field: str | None = Field(default=None, description="Field by whose value rows are partitioned.")
    filterable_metadata: tuple[str, ...] | None = Field(
        default=None, description="Metadata keys that are stored as fields to filter by; None for all."
    )

    _settings: ConnectionSettings = PrivateAttr()
    _connected: Connected | None = PrivateAttr(default=None)
    _recent_write_lane: RecentLane | None = PrivateAttr(default=None)
    _schema: dict[str, Any] | None = PrivateAttr(default=None)

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
    ) -> None:
        check_hooks(type(self))
        limits = limits_of(
            OpenStore,
            retry,
            max_concurrency=max_concurrency,
            batch_size=batch_size,
            max_batch_bytes=max_batch_bytes,
            max_batch_queries=max_batch_queries,
            rpc_timeout_seconds=rpc_timeout_seconds,
        )
        given: dict[str, Any] = dict(
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
            batch_size=limits.batch_size,
            index_config=index_config,
            sparse_index_config=sparse_index_config,
            search_config=search_config,
            similarity_metric=similarity_metric,
            consistency_level=consistency_level,
            output_fields=output_fields,
            hybrid_ranker=hybrid_ranker,
            hybrid_ranker_params=hybrid_ranker_params or {},
        )
        arguments = as_fields(OpenStore, given)
        own = limits._asdict() | as_fields(OpenStore, {"overwrite": overwrite, "use_async_client": use_async_client})
        wanted = making.Wanted.of(partition_key_field, schema, limits.rpc_timeout_seconds)
        filterable = making.filterable_of(filterable_metadata)
        making.check_arguments(arguments, wanted)
        settings = ConnectionSettings(uri, token, without_fields(OpenStore, kwargs), served_at)
        # Not in the main thread, where a Ctrl-C could leave one of gRPC's own locks locked for ever.
        opening = functools.partial(self._opened, settings, arguments, wanted)
        use = uninterrupted("milvus-open", opening, self._undo)
        for name, value in own.items():
            setattr(self, name, value)
        self.uri = settings.uri
        self.partition_key_field = partition_key_field
        self.filterable_metadata = filterable
        self._schema = making.described(wanted.schema) if wanted.schema is not None else None
        self._settings = settings
        self._connected = Connected(use, settings, self._made_by_upstream())
        closed_if_dropped(self, self._connected.close)

    def _opened(self, settings: ConnectionSettings, arguments: dict[str, Any], wanted: making.Wanted) -> Use[Endpoint]:
        """Connect, find or make the collection, and be a store on it, as upstream's constructor leaves one."""
        use, name, timeout = Endpoint.open(settings), arguments["collection_name"], wanted.timeout
        endpoint, connection = use.of, use.of.connection
        try:
            with forks.quiet.busy(), endpoint.creating(), silence_pymilvus():
                find = functools.partial(existing, connection, name, timeout)
                found = None if arguments["overwrite"] else first_answer(settings, find)
                if found is None and wanted.schema is not None:
                    making.make_from(wanted.schema, connection.client, arguments, timeout)
                    found, arguments["overwrite"] = find(), False
                if found is not None:
                    making.check_made(found.schema, name, wanted)
                arguments |= fitted(found, arguments)
                if found is not None and needs_nothing(type(self), found, arguments):
                    construct(self, arguments)
                else:
                    where: dict[str, Any] = {"uri": endpoint.uri, "token": settings.token, "use_async_client": False}
                    make = functools.partial(super().__init__, **where, **arguments, **settings.client_options)
                    with making.partitioned_by(wanted.partition_key_field):
                        make_beside_others(make, self._discard_made)
                    making.check_made(connection.fetch_schema(name, timeout), name, wanted)
        except BaseException:
            self._undo(use)
            raise
        return use

    def _undo(self, use: Use[Endpoint]) -> None:
        self._discard_made()
        use.close()

    @classmethod
    async def aopen(cls, *args: Any, **kwargs: Any) -> Self:
        """Open a store without blocking the event loop; the arguments are the constructor's.

            store = await AsyncMilvusVectorStore.aopen(uri="http://localhost:19530", dim=384)

        Raises:
            ConnectError, ValueError: As the constructor.
        """
        opening = functools.partial(warmed_up, cls, *args, **kwargs)
        return await auninterrupted("milvus-open", opening, lambda store: store.close())

    @classmethod
    def from_vector_store(cls, vector_store: MilvusVectorStore, **limits: Any) -> Self:
        """Take over a plain store: the same database, as the same user, and the same collection and settings.

        Rows are upserted, whatever the plain store's `upsert_mode`: its default, False, doubles rows on a second run.

        Args:
            vector_store: The plain store; it stays usable. One of this class is returned as it is.
            **limits: Arguments that this class adds, such as `max_concurrency`.
        """
        if isinstance(vector_store, cls):
            return vector_store
        settings = ConnectionSettings.of_client(vector_store.client)
        arguments = arguments_of(vector_store) | {"upsert_mode": True} | limits
        arguments.setdefault("batch_size", cls.model_fields["batch_size"].default)
        return cls(uri=settings.uri, token=settings.token, **arguments, **settings.options)

    # --- connections

    @property
    def client(self) -> MilvusClient:
        """Pymilvus's client, for what this class does not offer."""
        made = self._made_by_upstream()
        if self._connected is None and made is not None:  # upstream's constructor asks before there is anything else
            return made
        return self.live().client

    @property
    def aclient(self) -> AsyncMilvusClient | None:
        """Pymilvus's async client; unlike this store it serves one event loop only."""
        return self.live().async_client if self.use_async_client else None

    # Upstream's own names for them, where there is nothing until somebody asks.
    _milvusclient = client
    _async_milvusclient = aclient

    def _discard_made(self) -> None:
        """Close what upstream made before it failed: it would keep a file from being let go of."""
        if (made := self._made_by_upstream()) is not None:
            made.close()

    def _made_by_upstream(self) -> MilvusClient | None:
        """The client that upstream's constructor has made, if it has run."""
        client: MilvusClient | None = (getattr(self, "__pydantic_private__", None) or {}).get("_milvusclient")
        return client

    def live(self) -> Connected:
        """What the store is connected with in this process; for this package."""
        # From pydantic's dict of private attributes, as to ask for `self._connected` costs a call over a microsecond.
        connected: Connected | None = (self.__pydantic_private__ or {})["_connected"]
        assert connected is not None, "set at the end of __init__"
        connected.check_open()
        if connected.pid != os.getpid():  # forked: nothing that was connected in the parent works here
            lite.never_collect(connected)
            connected = self._connected = Connected(Endpoint.open(self._settings), self._settings)
            closed_if_dropped(self, connected.close)
        return connected

    def close(self) -> None:
        """Wait for the calls that are under way, then close the connection. May be called again.

        Raises:
            RuntimeError: Called in a coroutine while calls of its event loop are under way, for which it would wait
                for ever; the store stays open. Use `aclose`, or `async with`.
        """
        if self._connected is not None:
            self._connected.finish()

    async def aclose(self) -> None:
        """As `close`, without blocking the event loop."""
        if self._connected is not None:
            await self._connected.afinish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def statistics(self) -> StoreStatistics:
        """What has gone to the endpoint so far, and what is on its way."""
        return StoreStatistics.of(self.live().endpoint.shell.core, self.max_concurrency)

    # --- copies

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return copying.reduced(self, OpenStore)

    def __copy__(self) -> Self:
        return copying.copied(self, OpenStore)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return copying.copied(self, OpenStore, {} if memo is None else memo)

    def arguments_again(self) -> dict[str, Any]:
        """The constructor's arguments that open this store once more, as it is now; for its copies."""
        endpoint, key = self.live().endpoint, self.partition_key_field
        served_at = None
        if self._settings.is_file:  # in the child of a child, by the process that holds the file
            is_here = endpoint.uri == self._settings.uri
            served_at = f"{endpoint.connection.address}#{os.getpid()}" if is_here else self._settings.served_at
        connection = {"uri": self._settings.uri, "token": self._settings.token, "served_at": served_at}
        own: dict[str, Any] = {
            "partition_key_field": Known(key) if key is not None else None,
            "filterable_metadata": self.filterable_metadata,
            "schema": self._schema,
        }
        return arguments_of(self) | self.limits._asdict() | own | connection | self._settings.options

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """As upstream's, with the schema that was given, if one was."""
        return super().to_dict(**kwargs) | ({"schema": self._schema} if self._schema is not None else {})

    # --- for this package

    def _add_fields_to_schema(self, schema: CollectionSchema) -> CollectionSchema:
        return making.with_partition_key(super()._add_fields_to_schema(schema))

    async def in_call(self, port: Port, function: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """One public call: whoever closes the store waits for its end."""
        connected, call = self.live(), object()
        try:
            connected.begin(call, port)
            if tracing.is_listened_to():
                return await tracing.traced_call(function, self, connected, port, *arguments)
            return await function(self, connected, port, *arguments)
        finally:
            connected.calls.pop(call, None)

    @property
    def limits(self) -> Limits:
        """The bounds on this store's requests; for this package."""
        return Limits._make(_LIMITS_OF(self))

    @property
    def sparse_encoder(self) -> BaseSparseEmbeddingFunction | None:
        """The function that computes sparse vectors in the client; None if Milvus does, or there are none."""
        function = self.sparse_embedding_function
        return function if self.enable_sparse and isinstance(function, BaseSparseEmbeddingFunction) else None
