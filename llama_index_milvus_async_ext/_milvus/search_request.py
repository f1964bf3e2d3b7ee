"""Searches that share a request, and the hits of each in its answer."""

from __future__ import annotations

import functools
import itertools
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import orjson
from pymilvus.client import ts_utils
from pymilvus.client.prepare import Prepare
from pymilvus.client.search_result import SearchResult
from pymilvus.grpc_gen import common_pb2, schema_pb2

from llama_index_milvus_async_ext._lane import forks

T = TypeVar("T")


class HybridGroup(NamedTuple):
    """The second, sparse half of hybrid searches, and how the two halves are ranked together."""

    field_name: str
    search_params: bytes
    ranker: str
    ranker_params: bytes


class SearchGroup(NamedTuple):
    """What searches must have in common to share a request: all but the query itself.

    `search_params` and `ranker` are the JSON of what upstream passes, so that the whole is hashable.
    """

    collection: str
    field_name: str
    limit: int
    expression: str
    output_fields: tuple[str, ...]
    search_params: bytes
    partitions: tuple[str, ...] | None = None
    hybrid: HybridGroup | None = None


class Hits(NamedTuple):
    """The hits of one query: parallel lists, best first; `entities` holds the output fields of each hit."""

    ids: list[str]
    scores: list[float]
    entities: list[dict[str, Any]]


def search_request(group: SearchGroup, queries: Sequence[Any], session_timestamp: int, ranker: Any = None) -> Any:
    """Build a SearchRequest, or a HybridSearchRequest, with one query vector (or text) per query.

    Args:
        group: What the queries share.
        queries: Dense vectors (packed), sparse ones, or texts; for hybrid, pairs of a dense vector and a sparse one
            or a text.
        session_timestamp: The last write of this process to the collection, for Session consistency.
        ranker: The ranker of a hybrid search.
    """
    common: dict[str, Any] = {
        "partition_names": list(group.partitions) if group.partitions is not None else None,
        "output_fields": list(group.output_fields),
        "use_default_consistency": True,
        "guarantee_timestamp": session_timestamp or ts_utils.get_eventually_ts(),
    }
    if group.hybrid is None:
        return _request_of_one_field(group, group.field_name, group.search_params, queries, common)
    in_halves = common | {"output_fields": None}
    dense, sparse = zip(*queries, strict=True)
    halves = [
        _request_of_one_field(group, group.field_name, group.search_params, dense, in_halves),
        _request_of_one_field(group, group.hybrid.field_name, group.hybrid.search_params, sparse, in_halves),
    ]
    return Prepare.hybrid_search_request_with_ranker(group.collection, halves, ranker, group.limit, **common)


@functools.cache
def warm_up() -> None:
    """Build a request, so that pymilvus imports what it imports with the first one: scipy, in 80 ms.

    In the thread of whoever asks first: the I/O thread has others to serve. And not beside a fork, which would leave
    the child with half of an import that nobody completes.
    """
    with forks.quiet.busy():
        search_request(SearchGroup("c", "v", 1, "", (), b"{}"), [b"\0\0\0\0"], 0)


def warmed_up(call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Make a call in this thread, and before it what else the first search would make its own thread wait for."""
    warm_up()
    return call(*args, **kwargs)


def _request_of_one_field(
    group: SearchGroup, field_name: str, search_params: bytes, queries: Sequence[Any], common: dict[str, Any]
) -> Any:
    request = Prepare.search_requests_with_expr(
        collection_name=group.collection,
        # Of packed vectors one, in the place of all: pymilvus would pack each anew.
        data=as_pymilvus_takes_them(queries[:1] if isinstance(queries[0], bytes) else queries),
        anns_field=field_name,
        param=orjson.loads(search_params),
        limit=group.limit,
        expr=group.expression,
        **common,
    )
    _put_dense_vectors(request, queries)
    return request


def as_pymilvus_takes_them(queries: Sequence[Any]) -> list[Any]:
    """The queries, packed vectors as lists of numbers."""
    if isinstance(queries[0], bytes):
        return [list(struct.unpack(f"<{len(query) // 4}f", query)) for query in queries]
    return list(queries)


def _put_dense_vectors(request: Any, queries: Sequence[Any]) -> None:
    """Put packed vectors into a request as they are."""
    if isinstance(queries[0], bytes):
        vectors = common_pb2.PlaceholderValue(tag="$0", type=common_pb2.PlaceholderType.FloatVector, values=queries)
        request.nq = len(queries)
        request.placeholder_group = common_pb2.PlaceholderGroup(placeholders=[vectors]).SerializeToString()


class Answer:
    """The answer to a search request; the hits of a query are read when they are asked for.

    So that they are read on the thread of whoever asked, not on the I/O thread, which has others to serve.

    Args:
        results: A `SearchResultData` message.
        wanted: The output fields that were asked for.
    """

    def __init__(self, results: Any, wanted: Sequence[str]) -> None:
        self._results = results
        self._ends = list(itertools.accumulate(results.topks))
        self._columns = _quick_columns(results, wanted)
        self._read: list[Hits] | None = None  # by pymilvus, where the columns are not of the usual sort

    def hits(self, place: int) -> Hits:
        """The hits of the query at this place of the request."""
        if not self._ends:  # Milvus leaves the list of counts out when no query has a hit
            return Hits([], [], [])
        if self._columns is None:
            if self._read is None:
                self._read = hits_of_pymilvus(SearchResult(self._results))
            return self._read[place]
        columns, dynamic, names = self._columns
        start, end = self._ends[place - 1] if place else 0, self._ends[place]
        entities: list[dict[str, Any]] = [{} for _ in range(start, end)]
        for name, column in columns.items():
            for entity, value in zip(entities, column[start:end], strict=True):
                entity[name] = value
        for entity, fields in zip(entities, dynamic[start:end], strict=False):
            given = orjson.loads(fields)  # by older servers all of them, whatever was asked for
            for name in names:
                if name in given:
                    entity[name] = given[name]
        return Hits(self._results.ids.str_id.data[start:end], self._results.scores[start:end], entities)


class Found(NamedTuple):
    """The hits of one query, not yet read."""

    answer: Answer | list[Hits]
    place: int

    def read(self) -> Hits:
        """The hits."""
        return self.answer.hits(self.place) if isinstance(self.answer, Answer) else self.answer[self.place]


def hits_of_pymilvus(found: SearchResult) -> list[Hits]:
    return [Hits(list(hits.ids), list(hits.distances), [hit["entity"] for hit in hits]) for hits in found]


def _has(message: Any, name: str) -> bool:
    """Whether a message has a field, which an older pymilvus may not know."""
    return any(field.name == name for field, _ in message.ListFields())


def _quick_columns(
    results: Any, wanted: Sequence[str]
) -> tuple[dict[str, Sequence[str]], Sequence[bytes], list[str]] | None:
    """The columns of an answer that holds nothing but text and dynamic fields, with the names of those that are wanted.

    None for any other.
    """
    if "*" in wanted or any(_has(results, name) for name in ("element_indices", "highlight_results")):
        return None
    if not results.ids.HasField("str_id") and any(results.topks):
        return None
    columns: dict[str, Sequence[str]] = {}
    dynamic: Sequence[bytes] = ()
    for column in results.fields_data:
        if column.valid_data:
            return None
        if column.type == schema_pb2.DataType.VarChar:
            columns[column.field_name] = column.scalars.string_data.data
        elif column.type == schema_pb2.DataType.JSON and column.is_dynamic:
            dynamic = column.scalars.json_data.data
        else:
            return None
    return columns, dynamic, [name for name in wanted if name not in columns]
