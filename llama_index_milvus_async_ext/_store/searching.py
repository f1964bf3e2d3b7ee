"""Searches of a store: from its queries to their results."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import NoneType
from typing import TYPE_CHECKING, Any

from llama_index.core.vector_stores.types import VectorStoreQuery, VectorStoreQueryResult

from llama_index_milvus_async_ext._lane.port import Port
from llama_index_milvus_async_ext._milvus.errors import QueryError, QueryMismatchError
from llama_index_milvus_async_ext._milvus.literals import shown
from llama_index_milvus_async_ext._milvus.schema import Schema
from llama_index_milvus_async_ext._milvus.search_request import SearchGroup
from llama_index_milvus_async_ext._milvus.session import Connected
from llama_index_milvus_async_ext._nodes import sparse
from llama_index_milvus_async_ext._queries.plan import SearchPlan, check_mode, mode_name, needs_sparse, plan_search
from llama_index_milvus_async_ext._queries.results import result_of
from llama_index_milvus_async_ext._store import calls
from llama_index_milvus_async_ext._store.partitions import check_partitions, partitions_of

if TYPE_CHECKING:
    from llama_index_milvus_async_ext._store.open_store import OpenStore

logger = logging.getLogger(__name__)


async def search(
    store: OpenStore,
    connected: Connected,
    port: Port,
    queries: Sequence[VectorStoreQuery],
    options: dict[str, Any],
) -> list[VectorStoreQueryResult]:
    """Answer queries, in as few requests as their settings allow; one result per query, in their order."""
    string_expr = options.get("string_expr")
    if not isinstance(string_expr, (str, NoneType)):
        raise QueryError(f"string_expr must be a text, or None for none, got {shown(string_expr)}")
    partitions = partitions_of(options)
    if partitions is not None:
        options = options | {"milvus_partition_names": partitions}
    texts = _texts(store, queries)
    vectors: dict[int, Any] = dict(texts)
    encoder = store.sparse_encoder
    if texts and encoder is not None:
        encoded = await sparse.of_queries(encoder, list(texts.values()), port.awaits)
        vectors |= zip(texts, encoded, strict=True)
    await check_partitions(store, connected, port, partitions)
    schema = await calls.schema(store, connected, port)
    try:
        plans = _plans(store, connected, schema, queries, vectors, options)
    except QueryMismatchError:
        now = await calls.schema_again(store, connected, port, schema)
        if now is schema:
            raise
        plans = _plans(store, connected, now, queries, vectors, options)
    _warn_of_ignored(string_expr, plans)
    groups: dict[SearchGroup, list[int]] = {}
    for place, plan in enumerate(plans):
        groups.setdefault(plan.group, []).append(place)
    limits = store.limits
    requests = [
        connected.endpoint.search_request(group, plans[places[0]].ranker, limits, [plans[p].query for p in places])
        for group, places in groups.items()
    ]
    results: list[Any] = [None] * len(plans)
    for places, submission in zip(groups.values(), await port.submit(*requests), strict=True):
        calls.raise_failure(submission)
        for place, found in zip(places, submission.results, strict=True):
            assert found is not None
            results[place] = result_of(store, plans[place], found.read())
    return results


def _texts(store: OpenStore, queries: Sequence[VectorStoreQuery]) -> dict[int, str]:
    """The texts of the queries whose mode searches sparse vectors, by their places."""
    texts = {}
    for place, query in enumerate(queries):
        check_mode(store, query)
        if needs_sparse(query):
            if query.query_str is None:
                raise QueryError(f"a query in mode {mode_name(query)!r} needs query_str")
            texts[place] = query.query_str
    return texts


def _warn_of_ignored(string_expr: str | None, plans: Sequence[SearchPlan]) -> None:
    """Say, as upstream does, that an expression of the user's is not what restricts the rows: it may be a tenant's."""
    if string_expr and any(plan.group.expression != string_expr for plan in plans):
        logger.warning(
            "string_expr in vector_store_kwargs is ignored because filters are provided (or doc_ids, or node_ids): "
            "give all of it as filters, or all of it in string_expr"
        )


def _plans(
    store: OpenStore,
    connected: Connected,
    schema: Schema,
    queries: Sequence[VectorStoreQuery],
    vectors: dict[int, Any],
    options: dict[str, Any],
) -> list[SearchPlan]:
    is_lite = connected.endpoint.is_lite
    return [
        plan_search(store, schema, query, vectors.get(place), options, is_lite) for place, query in enumerate(queries)
    ]
