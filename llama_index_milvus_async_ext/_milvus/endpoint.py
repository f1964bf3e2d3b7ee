"""One Milvus endpoint as this process sees it: its connection, and the lanes of its requests."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, ClassVar, TypeVar

from pymilvus.exceptions import MilvusException

from llama_index_milvus_async_ext._flow.uninterrupted import uninterrupted
from llama_index_milvus_async_ext._lane import forks
from llama_index_milvus_async_ext._lane.entrance import Entrance
from llama_index_milvus_async_ext._lane.journey import Request
from llama_index_milvus_async_ext._lane.lanes import Lane
from llama_index_milvus_async_ext._lane.shell import Shell
from llama_index_milvus_async_ext._lane.thread import IoThread
from llama_index_milvus_async_ext._milvus import lite, sizes
from llama_index_milvus_async_ext._milvus.errors import RpcFailure, SchemaChangedError, classify
from llama_index_milvus_async_ext._milvus.limits import Limits, OfInserts, WriteTarget
from llama_index_milvus_async_ext._milvus.loading import Loading
from llama_index_milvus_async_ext._milvus.opening import connect
from llama_index_milvus_async_ext._milvus.quiet import log_retry
from llama_index_milvus_async_ext._milvus.schema import Row, Schema
from llama_index_milvus_async_ext._milvus.search_request import Found, SearchGroup, warm_up
from llama_index_milvus_async_ext._milvus.settings import ConnectionSettings
from llama_index_milvus_async_ext._milvus.sharing import Sharing
from llama_index_milvus_async_ext._milvus.time_left import TimeLeft
from llama_index_milvus_async_ext._milvus.use import Use
from llama_index_milvus_async_ext._milvus.write_lock import WriteLock
from llama_index_milvus_async_ext.retry import Verdict

T = TypeVar("T")

_SCHEMA_SECONDS = 1.0  # how long a schema is taken to be right although rows are refused by it
# Lanes of searches that are remembered: filters may differ from search to search, and be long.
_MOST_SEARCH_LANES, _LONGEST_REMEMBERED = 256, 4_096
_LAST_ANSWERS_SECONDS, _LOOK_SECONDS = 2.0, 0.005

Call = Callable[["Endpoint", float], Awaitable[T]]


class Endpoint:
    """A connection that stores with the same settings share, with the lanes of their requests.

    All endpoints of one address share a shell, and so its limit on requests in flight; those that write to one of its
    collections share an entrance, and so the order of equal ids.
    """

    _sharing: ClassVar[Sharing[Endpoint]] = Sharing()

    @classmethod
    def open(cls, settings: ConnectionSettings) -> Use[Endpoint]:
        """A use of the endpoint for these settings, connected.

        Raises:
            ConnectError: The server can't be reached, refuses the token, or the file is in use.
        """
        # Half opened, Milvus Lite would hold a file for ever; and a use that nobody counts down, a connection.
        opening = functools.partial(cls._sharing.join, settings, lambda: cls(settings))
        return uninterrupted("milvus-open", lambda: Use(opening()), Use.close)

    @classmethod
    def forget_all(cls) -> None:
        """Start anew, in a forked child: nothing that was inherited works there."""
        lite.never_collect(cls._sharing.everything)
        cls._sharing = Sharing()

    def __init__(self, settings: ConnectionSettings) -> None:
        self._settings = settings
        self.connection = connect(settings)
        try:
            self.is_lite = settings.is_file or self.connection.server_version().startswith("milvus_lite")
            self._write_lock = WriteLock(self.connection.address) if self.is_lite else None
        except BaseException:
            self.connection.close()
            raise
        self._shared = self._sharing.join_address(self.connection.address, _new_shell)
        self.shell = self._shared.shell
        self._write_lanes: dict[tuple[Any, ...], Lane[Any, None]] = {}
        self._search_lanes: dict[tuple[SearchGroup, Limits], Callable[[], Lane[Any, Found]]] = {}
        self._lock = threading.Lock()
        self.loading = Loading(self.connection, self.is_lite)
        self._torn: set[str] = set()  # collections of a Milvus Lite whose disk was full
        if settings.is_file:
            IoThread.get().serves_in_process = True

    def close(self) -> None:
        """Give up one use; the last one closes the connection, and lets go of the file."""
        uninterrupted("milvus-close", lambda: self._sharing.leave(self._settings, self._disconnect))

    def _disconnect(self) -> None:
        self._sharing.leave_address(self.connection.address)
        if self._settings.is_file and not self._shared.users and not IoThread.get().is_current:
            # A write that was given up may still be out: a file that is closed under it makes Lite print a traceback.
            until = time.monotonic() + _LAST_ANSWERS_SECONDS
            while self.shell.core.in_flight and time.monotonic() < until:
                time.sleep(_LOOK_SECONDS)
        with lite.files if self._settings.is_file else contextlib.nullcontext():
            self.connection.close()
            if self._settings.is_file:
                lite.release(self._settings.uri)

    def creating(self) -> contextlib.AbstractContextManager[Any]:
        """To be held while a collection is opened or made: Milvus Lite makes one twice, and fails."""
        return self._shared.creating if self.is_lite else contextlib.nullcontext()

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
                    self._forget_former(target, schema)
                    lane = self._write_lanes[key] = self._new_write_lane(target, schema, limits, make_encoder())
        return lane

    def _forget_former(self, target: WriteTarget, schema: Schema) -> None:
        """Let go of the lanes of schemas that the collection has no longer."""
        for key in list(self._write_lanes):
            if key[0].collection == target.collection and key[1] is not schema and self._write_lanes[key].idle:
                del self._write_lanes[key]

    def _new_write_lane(
        self, target: WriteTarget, schema: Schema, limits: Limits, encode: Callable[[Any], tuple[Row, int]]
    ) -> Lane[Any, None]:
        collection, only_inserts = target.collection, schema.primary_key.auto_id

        async def send(rows: list[Row], upsert: bool, timeout: float) -> list[None]:
            count, left = len(rows), TimeLeft(timeout)
            upsert = (upsert or target.upsert) and not only_inserts
            async with self.writing(collection, left):
                try:
                    await self.connection.write(collection, target.partition, schema, rows, upsert, left())
                except MilvusException as failure:
                    await self._check_schema(collection, schema, failure, left)
                    raise
            return [None] * count

        capacity = max(limits.batch_size * (limits.writes_in_flight + 2), sizes.LEAST_CAPACITY)
        entrance = self._shared.entrance(self.connection.db_name or "default", collection, capacity, not target.upsert)
        return Lane(
            kind="rows",
            prepare=encode,
            send=send,
            entrance=entrance,
            policy=OfInserts.under(limits.retry) if only_inserts else limits.retry,
            max_items=limits.batch_size,
            max_bytes=limits.max_batch_bytes,
            max_in_flight=1 if self.is_lite else limits.writes_in_flight,
            ceiling=limits.max_concurrency,
            rpc_timeout_seconds=limits.rpc_timeout_seconds,
            spread_above=sizes.LEAST_ROWS,
            exclusive=self._exclusive,
            gives_way=sizes.BESIDE_SEARCHES,
        )

    def search_request(self, group: SearchGroup, ranker: Any, limits: Limits, queries: Sequence[Any]) -> Request:
        """Searches, each of which may share a request with others of its group; the results are `Found`."""
        warm_up()
        find = self._search_lanes.get((group, limits))
        if find is None:
            find = self._search_lane(group, ranker, limits)
            if len(self._search_lanes) >= _MOST_SEARCH_LANES:
                self._search_lanes.clear()
            if len(group.expression) <= _LONGEST_REMEMBERED:
                self._search_lanes[group, limits] = find
        return Request(self.shell, find, queries, None, "search_request")

    def _search_lane(self, group: SearchGroup, ranker: Any, limits: Limits) -> Callable[[], Lane[Any, Found]]:
        """What finds, or makes, the lane of a group's searches."""

        async def send(queries: list[Any], _upsert: bool, timeout: float) -> list[Found]:
            answer = self.connection.search(group, queries, ranker, timeout)
            return await self.loading.of(group.collection, answer, timeout)

        def make() -> Lane[Any, Found]:
            most = limits.queries_per_request(group.limit)
            return Lane(
                kind="queries",
                prepare=_prepare_query,
                send=send,
                entrance=Entrance(max(most * (limits.max_concurrency + 2), sizes.LEAST_CAPACITY)),
                policy=limits.retry,
                max_items=most,
                max_bytes=limits.max_batch_bytes,
                max_in_flight=limits.max_concurrency,
                ceiling=limits.max_concurrency,
                rpc_timeout_seconds=limits.rpc_timeout_seconds,
                spread_above=None if self.is_lite else sizes.LEAST_QUERIES,
                abort_when_unwanted=True,
                urgent=True,
            )

        return functools.partial(self.shell.lane, (self, group, limits), make)

    def call_request(self, call: Call[Any], limits: Limits, changes: str | None = None) -> Request:
        """Any other call, which travels alone.

        Args:
            call: The call, given this endpoint and a time-out in seconds.
            limits: Bounds on it.
            changes: The collection that it changes, if it does: on Milvus Lite one such request is out at a time.
        """

        async def send(calls: list[Call[Any]], _upsert: bool, timeout: float) -> list[Any]:
            left = TimeLeft(timeout)
            async with self.writing(changes, left) if changes else contextlib.nullcontext():
                return [await call(self, left()) for call in calls]

        def make() -> Lane[Any, Any]:
            return Lane(
                kind="calls",
                prepare=lambda call: (call, 0),
                send=send,
                entrance=Entrance(sizes.LEAST_CAPACITY),
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
            return await endpoint.connection.refresh_schema(collection, timeout)

        return call

    async def _check_schema(self, collection: str, schema: Schema, failure: MilvusException, left: TimeLeft) -> None:
        """Raise `SchemaChangedError` if rows were refused because the collection is no longer what it was."""
        verdict = classify(failure)
        is_stale = getattr(failure, "schema_is_stale", False)
        if verdict is not Verdict.BAD_DATA and not is_stale:
            return
        if is_stale or time.monotonic() - schema.confirmed_at > _SCHEMA_SECONDS:
            with contextlib.suppress(MilvusException):
                await self.connection.refresh_schema(collection, left())
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
    async def writing(self, collection: str, left: TimeLeft) -> AsyncIterator[None]:
        """Hold the right to change a collection: on Milvus Lite, one process of this machine at a time."""
        if self._write_lock is None:
            yield
            return
        release = await self._write_lock.acquire(left())
        try:
            try:
                yield
            except MilvusException as failure:
                if classify(failure) is Verdict.FULL:
                    self._torn.add(collection)
                raise
            if collection in self._torn:
                await self._begin_a_log(collection, left())
        finally:
            release()

    async def _begin_a_log(self, collection: str, timeout: float) -> None:
        """Have Milvus Lite begin a new write-ahead log, after a full disk has torn a record of the one before.

        What it acknowledges after a torn record is lost when it is killed (200 of 200 rows; with this, none). Never to
        be done while the disk is still full: that makes rows disappear.
        """
        try:
            await self.connection.ask("flush", collection, timeout=timeout)
        except MilvusException as failure:
            raise RpcFailure("INTERNAL", f"stored, but a crash may lose it: {failure}") from failure
        self._torn.discard(collection)


def _new_shell() -> Shell:
    io = IoThread.get()
    shell = Shell(io.loop, classify, log_retry, io.takes_turns)
    io.shells.add(shell)
    return shell


def _prepare_query(query: Any) -> tuple[Any, int]:
    return query, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=Endpoint.forget_all)
forks.register()  # after all that this module has imported
