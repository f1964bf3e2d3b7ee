"""Calls that travel alone: schemas, deletes, look-ups, flushes, drops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from llama_index_milvus_async_ext._lane.items import DeadlinePassedError, Submission
from llama_index_milvus_async_ext._lane.port import Port
from llama_index_milvus_async_ext._milvus import deleting
from llama_index_milvus_async_ext._milvus.endpoint import Call, Endpoint
from llama_index_milvus_async_ext._milvus.errors import DeadlineError, fresh
from llama_index_milvus_async_ext._milvus.query_request import LookedUp, Wanted
from llama_index_milvus_async_ext._milvus.schema import Schema
from llama_index_milvus_async_ext._milvus.session import Connected
from llama_index_milvus_async_ext._milvus.time_left import TimeLeft
from llama_index_milvus_async_ext._queries.filters import keys_expression

if TYPE_CHECKING:
    from llama_index_milvus_async_ext._store.open_store import OpenStore

T = TypeVar("T")

_IDS_PER_REQUEST = 1_000


async def call(store: OpenStore, connected: Connected, port: Port, what: Call[T], changes: bool = False) -> T:
    """Make a call, retried as the store's policy says.

    Raises:
        MilvusException: Milvus rejected it, or could not be reached until the deadline.
    """
    request = connected.endpoint.call_request(what, store.limits, store.collection_name if changes else None)
    submission, *_ = await port.submit(request)
    raise_failure(submission)
    return cast(T, submission.results[0])


async def schema(store: OpenStore, connected: Connected, port: Port) -> Schema:
    """The schema of the store's collection, asked for once."""
    known = connected.endpoint.connection.known_schema(store.collection_name)
    return known if known is not None else await schema_now(store, connected, port)


async def schema_again(store: OpenStore, connected: Connected, port: Port, known: Schema) -> Schema:
    """The schema of the store's collection as it is now, for what does not fit the one that is known.

    Perhaps somebody has made the collection anew. If nothing has changed it is the very same object.
    """
    now = connected.endpoint.connection.known_schema(store.collection_name)
    if now is not None and now is not known:
        return now
    return await schema_now(store, connected, port)


async def schema_now(store: OpenStore, connected: Connected, port: Port) -> Schema:
    """The schema of the store's collection, asked for now; the very same object as before if nothing has changed."""
    return await call(store, connected, port, connected.endpoint.refreshed_schema(store.collection_name))


async def clear(store: OpenStore, connected: Connected, port: Port) -> None:
    """Drop the store's collection."""
    await call(store, connected, port, drop(store.collection_name), changes=True)


def raise_failure(submission: Submission[Any]) -> None:
    """Raise the first failure of a submission, if it has any."""
    failed = submission.failed_indices()
    if failed:
        failure = submission.failure(failed[0])
        assert failure is not None
        if isinstance(failure.error, DeadlinePassedError):  # the lane knows no Milvus
            raise DeadlineError(str(failure.error))
        # Several callers may share the error of one request: each gets a copy of its own to raise.
        raise fresh(failure.error)


def delete(collection: str, expression: str, partition: str | None, options: dict[str, Any]) -> Call[None]:
    """Delete what matches, in one partition or in all."""

    async def run(endpoint: Endpoint, timeout: float) -> None:
        left, expressions = TimeLeft(timeout), [expression]
        if partition and endpoint.is_lite:
            # Milvus Lite takes the rows of other partitions as well (3.2.2): it gets the keys of this one's.
            expressions = await _key_expressions(endpoint, collection, expression, partition, left)
        for each in expressions:
            asked = endpoint.connection.in_thread(
                deleting.delete,
                endpoint.connection,
                collection,
                is_lite=endpoint.is_lite,
                filter=each,
                partition_name=partition,
                **{"timeout": left()} | options,
            )
            await endpoint.loading.of(collection, asked, left())

    return run


async def _key_expressions(
    endpoint: Endpoint, collection: str, expression: str, partition: str, left: TimeLeft
) -> list[str]:
    """What names the rows of a partition that match, by their keys."""
    schema = endpoint.connection.known_schema(collection)
    if schema is None:
        schema = await endpoint.connection.refresh_schema(collection, left())
    key = schema.primary_key
    rows = await query(collection, expression, [partition], [key.name])(endpoint, left())
    return [keys_expression(key, some) for some in slices([row[key.name] for row in rows])]


def slices(ids: Sequence[T]) -> list[Sequence[T]]:
    """The ids, in as many parts as it takes requests to name them."""
    return [ids[start : start + _IDS_PER_REQUEST] for start in range(0, len(ids), _IDS_PER_REQUEST)]


def query(
    collection: str,
    expression: str,
    partitions: Sequence[str] | None,
    fields: Sequence[str] | None = None,
    **options: Any,
) -> Call[list[dict[str, Any]]]:
    """Look up what matches: these fields of it, or all. The options are pymilvus's, such as `limit`."""

    async def run(endpoint: Endpoint, timeout: float) -> list[dict[str, Any]]:
        asked = endpoint.connection.ask(
            "query",
            collection_name=collection,
            filter=expression,
            output_fields=fields,
            partition_names=partitions,
            timeout=timeout,
            **options,
        )
        return list(await endpoint.loading.of(collection, asked, timeout))

    return run


def look_up(collection: str, expression: str, wanted: Wanted, **options: Any) -> Call[LookedUp]:
    """Look up what matches, as it is now, in the quickest way. The options are pymilvus's, such as `limit`."""

    async def run(endpoint: Endpoint, timeout: float) -> LookedUp:
        asked = endpoint.connection.look_up(collection, expression, wanted, timeout, options)
        return await endpoint.loading.of(collection, asked, timeout)

    return run


def flush(collection: str) -> Call[None]:
    """Seal what was written."""

    async def run(endpoint: Endpoint, timeout: float) -> None:
        await endpoint.connection.ask("flush", collection, timeout=timeout)

    return run


def drop(collection: str) -> Call[None]:
    """Drop the collection."""

    async def run(endpoint: Endpoint, timeout: float) -> None:
        await endpoint.connection.ask("drop_collection", collection, timeout=timeout)
        endpoint.connection.forget_schema(collection)

    return run
