"""What a collection holds of documents: looked up by their ids, or by the source they came from."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from llama_index_milvus_async_ext._flow.stages import in_full
from llama_index_milvus_async_ext._lane.port import Port
from llama_index_milvus_async_ext._milvus.endpoint import Call
from llama_index_milvus_async_ext._milvus.errors import classify
from llama_index_milvus_async_ext._milvus.literals import string_literal
from llama_index_milvus_async_ext._milvus.query_request import LookedUp, Wanted
from llama_index_milvus_async_ext._milvus.schema import PrimaryKey
from llama_index_milvus_async_ext._milvus.session import Connected
from llama_index_milvus_async_ext._nodes.rows import RECORD_FIELD
from llama_index_milvus_async_ext._queries.filters import ids_expression, keys_expression
from llama_index_milvus_async_ext._store import calls
from llama_index_milvus_async_ext._store.paging import Cursor, next_page
from llama_index_milvus_async_ext.retry import Verdict

if TYPE_CHECKING:
    from llama_index_milvus_async_ext._store.open_store import OpenStore

_ROWS_PER_PAGE = 5_000
_DOCUMENTS_PER_LOOK_UP = 500
_STRONG = "Strong"  # what another process has just written counts


class StoredRow(NamedTuple):
    """A row of a document: its primary key, the document's id, and what it says of the document, if anything."""

    key: Any
    document_id: str
    record: dict[str, Any] | None


class StoredRows:
    """Rows as columns: a row is made of them when it is asked for.

    Of a look-up's ten thousand rows, made at once, Python's garbage collection takes longer than all the rest.

    Args:
        keys, document_ids, records: See `StoredRow`.
    """

    def __init__(self, keys: Sequence[Any], document_ids: Sequence[str | None], records: Sequence[Any]) -> None:
        self._keys = keys
        self._document_ids = document_ids
        self._records = records
        self._places: dict[str, list[int]] = {}
        for place, document_id in enumerate(document_ids):
            self._places.setdefault(document_id or "", []).append(place)

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[StoredRow]:
        return map(self._row, range(len(self._keys)))

    def __add__(self, other: StoredRows) -> StoredRows:
        return StoredRows(
            [*self._keys, *other._keys],
            [*self._document_ids, *other._document_ids],
            [*self._records, *other._records],
        )

    def of(self, document_id: str) -> list[StoredRow]:
        """The rows of a document."""
        return [self._row(place) for place in self._places.get(document_id, ())]

    def _row(self, place: int) -> StoredRow:
        record = self._records[place]
        return StoredRow(
            self._keys[place], self._document_ids[place] or "", record if isinstance(record, dict) else None
        )


class Records:
    """The rows of a store's documents.

    Args:
        store: The store.
        connected: Its connection, on which this call has begun.
        port: The caller's.
        partition: The only partition to look at, and to delete from; None for all.
    """

    def __init__(self, store: OpenStore, connected: Connected, port: Port, partition: str | None = None) -> None:
        self._store = store
        self._connected = connected
        self._port = port
        self._partition = partition
        self._partitions = None if partition is None else [partition]

    async def rows_of(self, document_ids: Sequence[str]) -> StoredRows:
        """All rows of these documents, as they are now.

        Raises:
            MilvusException: Milvus rejected the look-up, or could not be reached until the deadline.
        """
        if not document_ids:
            return StoredRows([], [], [])
        expression = ids_expression(self._store.doc_id_field, list(document_ids))
        key = (await calls.schema(self._store, self._connected, self._port)).primary_key
        try:
            found = await calls.call(self._store, self._connected, self._port, self._look_up(key, expression, {}))
        except Exception as error:
            # 2.3 servers answer with all dynamic fields of a row, the node's JSON included: too much for one answer.
            if classify(error) is not Verdict.TOO_LARGE:
                raise
            if len(document_ids) > 1:
                middle = len(document_ids) // 2
                return await self.rows_of(document_ids[:middle]) + await self.rows_of(document_ids[middle:])
            rows = StoredRows([], [], [])
            async for page in self._pages(expression):
                rows += page
            return rows
        return StoredRows(*found.columns())

    async def pages_of(self, document_ids: Sequence[str]) -> AsyncIterator[StoredRows]:
        """As `rows_of`, of any number of documents: some of them at a time."""
        for start in range(0, len(document_ids), _DOCUMENTS_PER_LOOK_UP):
            yield await self.rows_of(document_ids[start : start + _DOCUMENTS_PER_LOOK_UP])

    async def owners(self, keys: Sequence[Any]) -> dict[Any, str]:
        """The documents to which the rows of these primary keys belong, for those keys that have a row.

        Raises:
            MilvusException: As `rows_of`.
        """
        if not keys:
            return {}
        key = (await calls.schema(self._store, self._connected, self._port)).primary_key
        fields, collection = [key.name, self._store.doc_id_field], self._store.collection_name
        found: dict[Any, str] = {}
        for some in calls.slices(list(keys)):
            expression = keys_expression(key, some)
            query = calls.query(collection, expression, self._partitions, fields, consistency_level=_STRONG)
            for row in await calls.call(self._store, self._connected, self._port, query):
                found[row[key.name]] = row.get(self._store.doc_id_field) or ""
        return found

    async def pages_of_source(self, source: str) -> AsyncIterator[StoredRows]:
        """All rows that came from this source, page by page."""
        expression = f'{RECORD_FIELD}["source"] == {string_literal(source)}'
        async for page in self._pages(expression):
            yield page

    async def delete(self, keys: Sequence[Any]) -> None:
        """Delete rows by their primary keys.

        A cancellation waits for what is under way: landing later, it could delete what is written then.
        """
        if keys:
            await in_full(self._delete(keys))

    async def _delete(self, keys: Sequence[Any]) -> None:
        key = (await calls.schema(self._store, self._connected, self._port)).primary_key
        collection = self._store.collection_name
        for some in calls.slices(list(keys)):
            delete = calls.delete(collection, keys_expression(key, some), self._partition, {})
            await calls.call(self._store, self._connected, self._port, delete, changes=True)

    async def _pages(self, expression: str) -> AsyncIterator[StoredRows]:
        key = (await calls.schema(self._store, self._connected, self._port)).primary_key
        cursor = Cursor(expression, _ROWS_PER_PAGE)
        ask = functools.partial(self._look_up, key)
        while True:
            found = await next_page(
                self._store, self._connected, self._port, cursor, ask, lambda found, _: found.columns()[0]
            )
            page = StoredRows(*found.columns())
            if not page:
                return
            yield page

    def _look_up(self, key: PrimaryKey, expression: str, options: dict[str, Any]) -> Call[LookedUp]:
        wanted = Wanted((key.name, self._store.doc_id_field), RECORD_FIELD)
        collection, partitions = self._store.collection_name, self._partitions
        return calls.look_up(collection, expression, wanted, partition_names=partitions, **options)
