"""Deletes and look-ups of a store, by ids or filters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import MetadataFilters

from llama_index_milvus_async_ext._lane.port import Port
from llama_index_milvus_async_ext._milvus.errors import QueryError, QueryMismatchError, classify
from llama_index_milvus_async_ext._milvus.session import Connected
from llama_index_milvus_async_ext._nodes.stored import stored_node
from llama_index_milvus_async_ext._queries.filterable import check_filterable
from llama_index_milvus_async_ext._queries.filters import filter_expression, ids_expression, keys_expression
from llama_index_milvus_async_ext._queries.ids import listed
from llama_index_milvus_async_ext._store import calls
from llama_index_milvus_async_ext._store.iterating import rows
from llama_index_milvus_async_ext._store.paging import Cursor
from llama_index_milvus_async_ext._store.partitions import (
    check_partition,
    check_partitions,
    partition_of,
    partitions_of,
)
from llama_index_milvus_async_ext.retry import Verdict

if TYPE_CHECKING:
    from llama_index_milvus_async_ext._store.open_store import OpenStore

_ROWS_PER_PAGE = 5_000


async def delete_documents(
    store: OpenStore,
    connected: Connected,
    port: Port,
    ref_doc_id: str | Iterable[str],
    options: dict[str, Any],
) -> None:
    """Delete all nodes of documents."""
    ids = [ref_doc_id] if isinstance(ref_doc_id, str) else listed("ref_doc_id", ref_doc_id)
    await _delete(
        store, connected, port, [ids_expression(store.doc_id_field, some) for some in calls.slices(ids)], options
    )


async def delete_nodes(
    store: OpenStore,
    connected: Connected,
    port: Port,
    node_ids: Iterable[str] | None,
    filters: MetadataFilters | None,
    options: dict[str, Any],
) -> None:
    """Delete the nodes of these ids, or that match these filters; given both, those that meet both."""
    expressions, _ = await _expressions(store, connected, port, node_ids, filters)
    await _delete(store, connected, port, expressions, options)


async def get_nodes(
    store: OpenStore,
    connected: Connected,
    port: Port,
    node_ids: Iterable[str] | None,
    filters: MetadataFilters | None,
    options: dict[str, Any],
) -> list[BaseNode]:
    """The nodes of these ids, or that match these filters."""
    if node_ids is not None and filters is not None and filters.filters:
        raise QueryError("give node_ids or filters, not both")
    expressions, key_name = await _expressions(store, connected, port, node_ids, filters)
    partitions = partitions_of(options)
    await check_partitions(store, connected, port, partitions)
    nodes: list[BaseNode] = []
    for expression in expressions:
        found = await _rows(store, connected, port, expression, partitions)
        nodes += [stored_node(store, row, key_name) for row in found]
    return nodes


async def _rows(
    store: OpenStore, connected: Connected, port: Port, expression: str, partitions: list[str] | None
) -> list[dict[str, Any]]:
    """All rows that match: at once, or page by page where that is too much for one answer."""
    try:
        return await calls.call(store, connected, port, calls.query(store.collection_name, expression, partitions))
    except Exception as error:
        if classify(error) is not Verdict.TOO_LARGE:
            raise
    found: list[dict[str, Any]] = []
    cursor = Cursor(expression, _ROWS_PER_PAGE)
    while page := await rows(store, connected, port, cursor, partitions):
        found += page
    return found


async def _delete(
    store: OpenStore,
    connected: Connected,
    port: Port,
    expressions: Sequence[str],
    options: dict[str, Any],
) -> None:
    partition = partition_of(options)
    # None is no option, as for pymilvus: a time-out of None would be none at all.
    others = {
        name: value
        for name, value in options.items()
        if value is not None and not name.startswith("milvus_partition_name")
    }
    await check_partition(store, connected, port, partition)
    for expression in expressions:
        delete = calls.delete(store.collection_name, expression, partition, others)
        await calls.call(store, connected, port, delete, changes=True)


async def _expressions(
    store: OpenStore,
    connected: Connected,
    port: Port,
    node_ids: Iterable[str] | None,
    filters: MetadataFilters | None,
) -> tuple[list[str], str]:
    """Filter expressions that together name the nodes, each short enough for a request; and the key's name."""
    ids = listed("node_ids", node_ids) if node_ids is not None else None
    matching = filter_expression(filters, is_lite=connected.endpoint.is_lite)
    if ids is None:
        if filters is None:
            raise QueryError("either node_ids or filters must be given")
        if not matching:
            raise QueryError("the filters restrict nothing, and would name every node")
    schema = await calls.schema(store, connected, port)
    check_filterable(store, schema, filters)
    if ids is None:
        return [matching], schema.primary_key.name
    try:
        expressions = [keys_expression(schema.primary_key, some) for some in calls.slices(ids)]
    except QueryMismatchError:
        now = await calls.schema_again(store, connected, port, schema)
        expressions = [keys_expression(now.primary_key, some) for some in calls.slices(ids)]
        schema = now
    named = [f"{each} and ({matching})" if matching else each for each in expressions]
    return named, schema.primary_key.name
