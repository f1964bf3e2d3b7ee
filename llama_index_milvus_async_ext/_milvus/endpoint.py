"""One Milvus endpoint as this process sees it: its connection, and the lanes of its requests."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, ClassVar, NamedTuple, TypeVar

from pymilvus.exceptions import MilvusException

from llama_index_milvus_async_ext._lane import forks
from llama_index_milvus_async_ext._lane.effects import Retry
from llama_index_milvus_async_ext._lane.entrance import Entrance
from llama_index_milvus_async_ext._lane.lanes import Lane
from llama_index_milvus_async_ext._lane.port import Request
from llama_index_milvus_async_ext._lane.shell import Shell
from llama_index_milvus_async_ext._lane.thread import IoThread
from llama_index_milvus_async_ext._milvus import lite
from llama_index_milvus_async_ext._milvus.errors import COLLECTION_NOT_LOADED, RpcFailure, SchemaChangedError, classify
from llama_index_milvus_async_ext._milvus.opening import connect
from llama_index_milvus_async_ext._milvus.schema import Row, Schema
from llama_index_milvus_async_ext._milvus.search_request import Found, SearchGroup
from llama_index_milvus_async_ext._milvus.settings import ConnectionSettings
from llama_index_milvus_async_ext._milvus.write_lock import WriteLock
from llama_index_milvus_async_ext.retry import RetryPolicy, Verdict

logger = logging.getLogger("llama_index_milvus_async_ext")
T = TypeVar("T")

_RELOAD_SECONDS = 5.0
_SCHEMA_SECONDS = 1.0  # how long a schema is taken to be right although rows are refused by it
# Rows that are not spread over several requests. 1,000 rows at once took a server 81 ms in requests of 500, 89 ms in
# requests of 250, and 114 ms in one.
_LEAST_ROWS = 500
# Rows under way in full requests. gRPC holds two copies of them: with 8,000, a write of 100,000 rows of 768 dimensions
# took 120 MB. Six requests of 800 were as fast as eight of 1,000 (10,000 rows in 801 and 789 ms, medians of nine
# rounds; four of 1,000: 871 ms).
_MOST_ROWS_UNDER_WAY = 5_000
# Queries that are not spread: 1,000 at once took a server 503 ms (Strong) and 288 ms (Bounded) in requests of 250, 524
# and 300 ms in requests of 500. Not on Milvus Lite, which takes as long for a request of one query as of hundreds.
_LEAST_QUERIES = 250
# Hits that one search request may ask for: with 4 kB each, two thirds of what a server may answer at once (64 MiB).
# A larger answer would cost the server its work and then be halved.
_MAX_HITS = 10_000
_LEAST_CAPACITY = 64

Call = Callable[["Endpoint", float], Awaitable[T]]


# Named tuples, as one of each is made and hashed for each call: a frozen dataclass takes five times as long.
class Limits(NamedTuple):
    """The bounds that a store sets on its requests; see `AsyncMilvusVectorStore` for each."""

    max_concurrency: int
    batch_size: int
    max_batch_bytes: int
    max_batch_queries: int
    rpc_timeout_seconds: float
    retry: RetryPolicy


class WriteTarget(NamedTuple):
    """Where rows go, and which columns their parts have."""

    collection: str
    partition: str
    upsert: bool
    text_key: str
    doc_id_field: str
    embedding_field: str | None
    sparse_field: str | None


class Endpoint:
    """A connection that stores with the same settings share, with the lanes of their requests.

    All endpoints of one address share a shell, and so its limit on requests in flight; those that write to one of its
    collections share an entrance, and so the order of equal ids.
    """

    _open: ClassVar[dict[ConnectionSettings, Future[Endpoint | None]]] = {}
    _shells: ClassVar[dict[str, Shell]] = {}
    _entrances: ClassVar[dict[tuple[str, str, str], Entrance]] = {}
    # Held for moments only: while one connects, others are served. Re-entrant, as a store may be collected, and so
    # closed, at any point of the code that holds it.
    _lock: ClassVar[threading.RLock] = threading.RLock()

    @classmethod
    def open(cls, settings: ConnectionSettings) -> Endpoint:
        """The endpoint for these settings, connected; each `open` asks for one `close`.

        Raises:
            ConnectError: The server can't be reached, refuses the token, or the file is in use.
        """
        while True:
            with cls._lock:
                opening = cls._open.get(settings)
                is_mine = opening is None
                if opening is None:
                    opening = cls._open[settings] = Future()
            if is_mine:
                try:
                    opening.set_result(cls(settings))
                except BaseException as error:
                    with cls._lock:
                        cls._open.pop(settings, None)
                    opening.set_exception(error)
                    raise
            endpoint = opening.result()
            with cls._lock:
                if endpoint is not None and cls._open.get(settings) is opening:
                    endpoint._users += 1
                    return endpoint
            # closed meanwhile: open it anew

    @classmethod
    def forget_all(cls) -> None:
        """Start anew, in a forked child: nothing that was inherited works there."""
        for opening in cls._open.values():
            lite.never_collect(opening)
        cls._open, cls._shells, cls._entrances, cls._lock = {}, {}, {}, threading.RLock()

    def __init__(self, settings: ConnectionSettings) -> None:
        self._settings = settings
        self._users = 0
        self.connection = connect(settings)
        self.is_lite = self.connection.server_version().startswith("milvus_lite")
        address = self.connection.address
        io = IoThread.get()
        with self._lock:
            shell = self._shells.get(address)
            if shell is None:
                shell = self._shells[address] = Shell(io.loop, classify, _log_retry, io.takes_turns)
                io.shells.add(shell)
        self.shell = shell
        self._write_lock = WriteLock(address) if self.is_lite else None
        self._write_lanes: dict[tuple[Any, ...], Lane[Any, None]] = {}
        self._reloaded_at: dict[str, float] = {}
        self._torn: set[str] = set()  # collections of a Milvus Lite whose disk was full
        if settings.is_file:
            io.serves_in_process = True

    def close(self) -> None:
        """Give up one use; the last one closes the connection, and lets go of the file."""
        closing: Future[Endpoint | None] = Future()
        with self._lock:
            self._users -= 1
            if self._users > 0:
                return
            self._open[self._settings] = closing  # who opens it now waits until it is closed
        try:
            with lite.files if self._settings.is_file else contextlib.nullcontext():
                self.connection.close()
                if self._settings.is_file:
                    lite.release(self._settings.uri)
        finally:
            with self._lock:
                del self._open[self._settings]
                self._forget_address()
            closing.set_result(None)

    def _forget_address(self) -> None:
        """Let go of what the endpoints of an address share, with the last of them."""
        address = self.connection.address
        open_ = [opening.result() for opening in self._open.values() if opening.done() and not opening.exception()]
        if (
            all(other is None or other.connection.address != address for other in open_)
            and self._shells.get(address) is self.shell
        ):
            del self._shells[address]
            for key in [key for key in self._entrances if key[0] == address]:
                del self._entrances[key]

    @property
    def uri(self) -> str:
        """Where the connection goes: the settings' uri, or where another process serves that file."""
        return self.connection.uri

    # --- lanes

    def write_lane(
        self,
        target: WriteTarget,
        schema: Schema,
        limits: Limits,
        make_encoder: Callable[[], Callable[[Any], tuple[Row, int]]],
    ) -> Lane[Any, None]:
        """The lane for rows of one collection and partition; it is kept, with its encoder.

        Args:
            target: Where the rows go.
            schema: What they are encoded for.
            limits: Bounds on their requests.
            make_encoder: Makes what turns an item into a row and the row's size in bytes.
        """
        key = (target, schema, limits)
        lane = self._write_lanes.get(key)
        if lane is None:
            with self._lock:
                lane = self._write_lanes.get(key)
                if lane is None:
                    lane = self._write_lanes[key] = self._new_write_lane(target, schema, limits, make_encoder())
        return lane

    def _new_write_lane(
        self, target: WriteTarget, schema: Schema, limits: Limits, encode: Callable[[Any], tuple[Row, int]]
    ) -> Lane[Any, None]:
        collection = target.collection

        async def send(rows: list[Row], upsert: bool, timeout: float) -> list[None]:
            count = len(rows)
            async with self.writing(collection, timeout):
                try:
                    await self.connection.write(
                        collection, target.partition, schema, rows, upsert or target.upsert, timeout
                    )
                except MilvusException as failure:
                    await self._check_schema(collection, schema, failure, timeout)
                    raise
            return [None] * count

        in_flight = min(limits.max_concurrency, max(_MOST_ROWS_UNDER_WAY // limits.batch_size, 1))
        entrance = self._entrances.setdefault(
            (self.connection.address, self.connection.db_name, collection), Entrance(_LEAST_CAPACITY, False)
        )
        entrance.tells_repeats |= not target.upsert
        entrance.capacity = max(entrance.capacity, limits.batch_size * (in_flight + 2))
        return Lane(
            kind="rows",
            prepare=encode,
            send=send,
            entrance=entrance,
            policy=limits.retry,
            max_items=limits.batch_size,
            max_bytes=limits.max_batch_bytes,
            max_in_flight=1 if self.is_lite else in_flight,
            ceiling=limits.max_concurrency,
            rpc_timeout_seconds=limits.rpc_timeout_seconds,
            spread_above=_LEAST_ROWS,
            exclusive=self._exclusive,
        )

    def search_request(self, group: SearchGroup, ranker: Any, limits: Limits, queries: Sequence[Any]) -> Request:
        """Searches, each of which may share a request with others of its group; the results are `Found`."""

        async def send(queries: list[Any], _upsert: bool, timeout: float) -> list[Found]:
            with self.reloading(group.collection):
                return await self.connection.search(group, queries, ranker, timeout)

        def make() -> Lane[Any, Found]:
            most = min(limits.max_batch_queries, max(_MAX_HITS // group.limit, 1))
            return Lane(
                kind="queries",
                prepare=_prepare_query,
                send=send,
                entrance=Entrance(max(most * (limits.max_concurrency + 2), _LEAST_CAPACITY)),
                policy=limits.retry,
                max_items=most,
                max_bytes=limits.max_batch_bytes,
                max_in_flight=limits.max_concurrency,
                ceiling=limits.max_concurrency,
                rpc_timeout_seconds=limits.rpc_timeout_seconds,
                spread_above=None if self.is_lite else _LEAST_QUERIES,
                abort_when_unwanted=True,
            )

        return Request(self.shell, lambda: self.shell.lane((self, group, limits), make), queries)

    def call_request(self, call: Call[Any], limits: Limits, changes: str | None = None) -> Request:
        """Any other call, which travels alone.

        Args:
            call: The call, given this endpoint and a time-out in seconds.
            limits: Bounds on it.
            changes: The collection that it changes, if it does: on Milvus Lite one such request is out at a time.
        """

        async def send(calls: list[Call[Any]], _upsert: bool, timeout: float) -> list[Any]:
            async with self.writing(changes, timeout) if changes else contextlib.nullcontext():
                return [await call(self, timeout) for call in calls]

        def make() -> Lane[Any, Any]:
            return Lane(
                kind="calls",
                prepare=lambda call: (call, 0),
                send=send,
                entrance=Entrance(_LEAST_CAPACITY),
                policy=limits.retry,
                max_items=1,
                max_bytes=1,
                max_in_flight=limits.max_concurrency,
                ceiling=limits.max_concurrency,
                rpc_timeout_seconds=limits.rpc_timeout_seconds,
                exclusive=self._exclusive if changes else None,
            )

        return Request(self.shell, lambda: self.shell.lane((self, "calls", limits, changes), make), [call])

    def refreshed_schema(self, collection: str) -> Call[Schema]:
        """The call that asks for a collection's schema again; it returns the one known if nothing has changed."""

        async def call(endpoint: Endpoint, timeout: float) -> Schema:
            schema: Schema = await endpoint.connection.in_thread(endpoint.connection.fetch_schema, collection, timeout)
            return schema

        return call

    async def _check_schema(self, collection: str, schema: Schema, failure: MilvusException, timeout: float) -> None:
        """Raise `SchemaChangedError` if rows were refused because the collection is no longer what it was."""
        verdict = classify(failure)
        is_stale = getattr(failure, "schema_is_stale", False)
        if verdict is not Verdict.BAD_DATA and not is_stale:
            return
        if is_stale or time.monotonic() - schema.confirmed_at > _SCHEMA_SECONDS:
            with contextlib.suppress(MilvusException):
                await self.refreshed_schema(collection)(self, timeout)
        if self.connection.known_schema(collection) is not schema:
            raise SchemaChangedError(
                f"collection {collection!r} has changed: {failure}", verdict.may_have_been_executed
            ) from failure

    # --- what Milvus Lite needs

    @property
    def _exclusive(self) -> str | None:
        # Several writes at once would interleave Lite's write-ahead log, and a crash then lose acknowledged rows.
        return "a write to Milvus Lite" if self.is_lite else None

    @contextlib.asynccontextmanager
    async def writing(self, collection: str, timeout: float) -> AsyncIterator[None]:
        """Hold the right to change a collection: on Milvus Lite, one process of this machine at a time."""
        if self._write_lock is None:
            yield
            return
        release = await self._write_lock.acquire(timeout)
        try:
            try:
                yield
            except MilvusException as failure:
                if classify(failure) is Verdict.FULL:
                    self._torn.add(collection)
                raise
            if collection in self._torn:
                await self._begin_a_log(collection, timeout)
        finally:
            release()

    async def _begin_a_log(self, collection: str, timeout: float) -> None:
        """Have Milvus Lite begin a new write-ahead log, after a full disk has torn a record of the one before.

        What it acknowledges after a torn record is lost when it is killed (200 of 200 rows; with this, none). Never to
        be done while the disk is still full: that makes rows disappear.
        """
        try:
            await self.connection.in_thread(self.connection.client.flush, collection, timeout=timeout)
        except MilvusException as failure:
            raise RpcFailure("INTERNAL", f"stored, but a crash may lose it: {failure}") from failure
        self._torn.discard(collection)

    @contextlib.contextmanager
    def reloading(self, collection: str) -> Iterator[None]:
        """Have Milvus Lite load a collection that it says is released, as it is after each of its restarts."""
        try:
            yield
        except MilvusException as failure:
            now = time.monotonic()
            due = now - self._reloaded_at.get(collection, -_RELOAD_SECONDS) >= _RELOAD_SECONDS
            if self.is_lite and failure.code == COLLECTION_NOT_LOADED and due:
                self._reloaded_at[collection] = now
                task = asyncio.ensure_future(
                    self.connection.in_thread(self.connection.client.load_collection, collection, timeout=30)
                )
                task.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise


def _prepare_query(query: Any) -> tuple[Any, int]:
    return query, 0


def _log_retry(retry: Retry) -> None:
    # A collection that is not loaded yet is no fault: Milvus loads it after a restart, Milvus Lite when it is told to.
    is_loading = getattr(retry.error, "code", None) == COLLECTION_NOT_LOADED
    level = logging.WARNING if retry.attempt == 1 and not is_loading else logging.DEBUG
    logger.log(
        level,
        "request to Milvus: attempt %d failed, next one in %.2f s: %s",
        retry.attempt,
        retry.pause_seconds,
        retry.error,
    )


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=Endpoint.forget_all)
forks.register()  # after all that this module has imported
