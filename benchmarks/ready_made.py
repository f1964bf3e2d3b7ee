"""The ceiling: requests that were built beforehand, sent as fast as the server takes them."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import orjson
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import VectorStoreQuery, VectorStoreQueryResult
from llama_index.core.vector_stores.utils import metadata_dict_to_node, node_to_metadata_dict
from llama_index.vector_stores.milvus import MilvusVectorStore
from pymilvus import MilvusClient
from pymilvus.client import ts_utils
from pymilvus.client.prepare import Prepare
from pymilvus.client.search_result import SearchResult

from benchmarks.backend import METRIC, TOP_K

_OUTPUT_FIELDS = ["text", "_node_content", "_node_type"]


def upstream_rows(nodes: Sequence[BaseNode]) -> list[dict[str, Any]]:
    """The rows that `MilvusVectorStore` hands to pymilvus for these nodes."""
    rows = []
    for node in nodes:
        row = node_to_metadata_dict(node, remove_text=True, text_field="text")
        rows.append(row | {"text": node.get_content(), "id": node.node_id, "embedding": node.embedding})
    return rows


def write_requests(
    client: MilvusClient, collection: str, rows: Sequence[dict[str, Any]], rows_per_request: int, *, upsert: bool
) -> list[Any]:
    """Requests that write the rows."""
    described = client.describe_collection(collection)
    build = Prepare.row_upsert_param if upsert else Prepare.row_insert_param
    return [
        build(
            collection,
            rows[start : start + rows_per_request],
            "",
            described["fields"],
            enable_dynamic=True,
            schema_timestamp=described.get("update_timestamp", 0),
        )
        for start in range(0, len(rows), rows_per_request)
    ]


def search_requests(collection: str, queries: Sequence[VectorStoreQuery], queries_per_request: int) -> list[Any]:
    """Requests that carry the queries."""
    return [
        Prepare.search_requests_with_expr(
            collection_name=collection,
            data=[query.query_embedding for query in queries[start : start + queries_per_request]],
            anns_field="embedding",
            param={"metric_type": METRIC},
            limit=TOP_K,
            expr="",
            output_fields=_OUTPUT_FIELDS,
            use_default_consistency=True,
            guarantee_timestamp=ts_utils.get_eventually_ts(),
        )
        for start in range(0, len(queries), queries_per_request)
    ]


async def send(
    client: MilvusClient,
    method: str,
    requests: Sequence[Any],
    in_flight: int,
    take: Callable[[int, Any], None] | None = None,
) -> None:
    """Send requests by the connection's stub, a number of them at a time.

    Args:
        client: A connected client.
        method: "Insert", "Upsert" or "Search".
        requests: What to send.
        in_flight: Requests without an answer at any time.
        take: Called with the number of each request and its answer.
    """
    stub = client._handler._stub
    loop = asyncio.get_running_loop()
    waiting = iter(enumerate(requests))

    async def sender() -> None:
        for number, request in waiting:
            answered: asyncio.Future[Any] = loop.create_future()
            call = getattr(stub, method).future(request)
            call.add_done_callback(lambda call, to=answered: loop.call_soon_threadsafe(to.set_result, call))
            answer = (await answered).result()
            if answer.status.code != 0:
                raise RuntimeError(answer.status.reason)
            if take is not None:
                take(number, answer)

    await asyncio.gather(*(sender() for _ in range(in_flight)))


async def search(
    client: MilvusClient,
    requests: Sequence[Any],
    queries_per_request: int,
    in_flight: int,
    count: int,
    parser: MilvusVectorStore | None = None,
) -> list[VectorStoreQueryResult]:
    """Send search requests, and build the nodes of the hits as their answers come in.

    Args:
        client: A connected client.
        requests: What to send.
        queries_per_request: Queries in each of them.
        in_flight: Requests without an answer at any time.
        count: Queries in all.
        parser: Upstream's store, if its parser is to build the nodes, of what pymilvus makes of an answer; else this
            is done here, with the least that it takes.
    """
    results: list[Any] = [None] * count
    results_of = _results_of if parser is None else functools.partial(_parsed, parser)

    def take(number: int, answer: Any) -> None:
        for offset, result in enumerate(results_of(answer.results)):
            results[number * queries_per_request + offset] = result

    await send(client, "Search", requests, in_flight, take)
    return results


def _parsed(parser: MilvusVectorStore, found: Any) -> Iterator[VectorStoreQueryResult]:
    for hits in SearchResult(found):
        nodes, similarities, ids = parser._parse_from_milvus_results([hits])
        yield VectorStoreQueryResult(nodes=nodes, similarities=similarities, ids=ids)


def _results_of(found: Any) -> Iterator[VectorStoreQueryResult]:
    columns = {column.field_name: column.scalars for column in found.fields_data}
    texts = list(columns["text"].string_data.data)
    dynamic = list(next(column.scalars for column in found.fields_data if column.is_dynamic).json_data.data)
    ids, scores = list(found.ids.str_id.data), list(found.scores)
    start = 0
    for count in found.topks:
        nodes = []
        for index in range(start, start + count):
            node = metadata_dict_to_node(orjson.loads(dynamic[index]))
            node.set_content(texts[index])
            nodes.append(node)
        end = start + count
        yield VectorStoreQueryResult(nodes=nodes, similarities=scores[start:end], ids=ids[start:end])
        start = end
