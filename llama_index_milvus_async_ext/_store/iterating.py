"""All nodes of a store, or those that match filters, one after the other."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Iterator
from operator import index
from typing import TYPE_CHECKING, Any

from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import MetadataFilters

from llama_index_milvus_async_ext._lane.port import LoopPort, Port, run
from llama_index_milvus_async_ext._lane.thread_port import ThreadPort
from llama_index_milvus_async_ext._milvus.endpoint import Call
from llama_index_milvus_async_ext._milvus.errors import QueryError
from llama_index_milvus_async_ext._milvus.schema import Schema
from llama_index_milvus_async_ext._milvus.session import Connected
from llama_index_milvus_async_ext._nodes.stored import stored_node
from llama_index_milvus_async_ext._queries.filterable import check_filterable
from llama_index_milvus_async_ext._queries.filters import filter_expression
from llama_index_milvus_async_ext._queries.plan import MAX_TOP_K, node_fields
from llama_index_milvus_async_ext._store import calls
from llama_index_milvus_async_ext._store.paging import Cursor, next_page
from llama_index_milvus_async_ext._store.partitions import check_partitions, partitions_of

if TYPE_CHECKING:
    from llama_index_milvus_async_ext._store.open_store import OpenStore


# 100,000 rows of 384 dimensions and 800 characters took a server 14 s in pages of 1,000, and 21 s in pages of 5,000.
# Milvus Lite reads and sorts the whole collection for each page: 20,000 such rows took it 33 s, and 11 s.
ROWS_ON_SERVER, ROWS_ON_LITE = 1_000, 5_000


class Iteration:
    """One way through the nodes: as far as it has come, and nothing else.

    Each page is a call of its own, so between two of them it holds nothing that somebody would have to let go of.

    Args:
        filters: What the nodes match; None for all.
        batch_size: Rows to look up at once; None for as many as suit the back end.
        embeddings: Whether the nodes get their embeddings.
        options: `milvus_partition_names`.

    Raises:
        ValueError: `batch_size` is none.
    """

    def __init__(
        self, filters: MetadataFilters | None, batch_size: int | None, embeddings: bool, options: dict[str, Any]
    ) -> None:
        if batch_size is not None and not 0 < index(batch_size) <= MAX_TOP_K:
            raise QueryError(f"batch_size must be between 1 and {MAX_TOP_K}, got {batch_size}")
        self._filters = filters
        self._batch_size = batch_size
        self._embeddings = embeddings
        self._partitions = partitions_of(options)
        self._cursor: Cursor | None = None
        self._schema: Schema | None = None  # as it was at the beginning

    async def anodes(self, store: OpenStore) -> AsyncGenerator[BaseNode, None]:
        """The nodes, on the running event loop."""
        while (nodes := await store.in_call(LoopPort.current(), self.next_nodes)) is not None:
            for node in nodes:
                yield node

    def nodes(self, store: OpenStore) -> Generator[BaseNode, None, None]:
        """The nodes, blocking."""
        while (nodes := run(store.in_call(ThreadPort(), self.next_nodes))) is not None:
            yield from nodes

    async def next_nodes(self, store: OpenStore, connected: Connected, port: Port) -> Iterator[BaseNode] | None:
        """The nodes of the next page, each built when it is asked for; None after the last page."""
        if self._cursor is None or self._schema is None:
            is_lite = connected.endpoint.is_lite
            rows_at_once = self._batch_size or (ROWS_ON_LITE if is_lite else ROWS_ON_SERVER)
            self._cursor = Cursor(filter_expression(self._filters, is_lite=is_lite), rows_at_once)
            await check_partitions(store, connected, port, self._partitions)
            self._schema = await calls.schema_now(store, connected, port)
            check_filterable(store, self._schema, self._filters)
        schema = self._schema
        fields = None if self._embeddings else list(node_fields(store, schema))
        found = await rows(store, connected, port, self._cursor, self._partitions, fields)
        if found:
            return (stored_node(store, row, schema.primary_key.name) for row in found)
        if (await calls.schema_now(store, connected, port)).identity != schema.identity:
            raise _made_anew(store)
        return None


async def rows(
    store: OpenStore,
    connected: Connected,
    port: Port,
    cursor: Cursor,
    partitions: list[str] | None,
    fields: list[str] | None = None,
) -> list[dict[str, Any]]:
    """The rows of the next page, these fields of them or all; none after the last page."""

    def ask(expression: str, options: dict[str, Any]) -> Call[list[dict[str, Any]]]:
        return calls.query(store.collection_name, expression, partitions, fields, **options)

    def keys_of(found: list[dict[str, Any]], key_name: str) -> list[Any]:
        try:
            return [row[key_name] for row in found]
        except KeyError:
            raise _made_anew(store) from None

    return await next_page(store, connected, port, cursor, ask, keys_of)


def _made_anew(store: OpenStore) -> QueryError:
    return QueryError(
        f"collection {store.collection_name!r} was made anew meanwhile, and not all rows were seen; repeat it"
    )
