"""One Milvus endpoint as this process sees it: its connection, its limit and its lanes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import grpc
from pymilvus.exceptions import ConnectError, MilvusException

from llama_index_milvus_async_ext._io import IoThread
from llama_index_milvus_async_ext._lane import Lane
from llama_index_milvus_async_ext._limit import Limit
from llama_index_milvus_async_ext._rows import RowEncoder
from llama_index_milvus_async_ext._wire import Connection, ConnectionSettings, Hits, Row, Schema, SearchGroup
from llama_index_milvus_async_ext.retry import (
    COLLECTION_NOT_LOADED,
    RetryPolicy,
    RpcFailure,
)

try:
    import fcntl
except ImportError:  # not on Windows, where Milvus Lite does not lock its folder either
    fcntl = None  # type: ignore[assignment]

_MAX_LANES = 256
_RELOAD_SECONDS = 5.0
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
# While a caller of this process embeds, the I/O thread lets go of Python's lock for a moment after so many rows, about
# half a millisecond's work. The other thread would else get it only after five milliseconds, at each turn of its event
# loop: embedding and writing took a tenth longer. Writing alone takes a tenth longer with the pauses: there are none.
_ROWS_IN_ONE_GO = 32
_PAUSE_SECONDS = 1e-6  # the least that lets another thread in; the system makes some 60 microseconds of it


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
    """A connection that stores with the same settings share, with the lanes of their requests."""

    _open: ClassVar[dict[ConnectionSettings, Endpoint]] = {}
    _limits: ClassVar[dict[str, Limit]] = {}
    _write_locks: ClassVar[dict[tuple[str, str], asyncio.Lock]] = {}
    # Re-entrant, as a store may be collected, and so closed, at any point of the code that holds it.
    _lock: ClassVar[threading.RLock] = threading.RLock()

    @classmethod
    def open(cls, settings: ConnectionSettings, on_retry: Callable[[BaseException, int, float], None]) -> Endpoint:
        """The endpoint for these settings, connected; each `open` asks for one `close`.

        Raises:
            ConnectError: The server can't be reached, refuses the token, or the file is in use.
        """
        with cls._lock:
            endpoint = cls._open.get(settings)
            if endpoint is None:
                endpoint = cls._open[settings] = cls(settings, on_retry)
            endpoint._users += 1
            return endpoint

    @classmethod
    def forget_all(cls) -> None:
        """Start anew, in a forked child: nothing that was inherited works there."""
        cls._open, cls._limits, cls._write_locks, cls._lock = {}, {}, {}, threading.RLock()

    def __init__(self, settings: ConnectionSettings, on_retry: Callable[[BaseException, int, float], None]) -> None:
        self._settings = settings
        self._on_retry = on_retry
        self._users = 0
        self.connection = connect(settings)
        self.is_lite = self.connection.server_version().startswith("milvus_lite")
        self.limit = self._limits.setdefault(self.connection.address, Limit())
        self._lanes: dict[tuple[Any, ...], Lane[Any, Any]] = {}
        self.lanes_forgotten = 0  # how often; whoever keeps a lane asks for it anew after that
        self._gone = Counter[str]()
        self._reloaded_at: dict[str, float] = {}
        self._lock_path = f"{settings.uri}.lock" if settings.is_file else None
        if settings.is_file:
            IoThread.get().serves_in_process = True

    def close(self) -> None:
        """Give up one use; the last one closes the connection."""
        with self._lock:
            self._users -= 1
            if self._users > 0:
                return
            self._open.pop(self._settings, None)
        self.connection.close()

    @property
    def uri(self) -> str:
        """Where the connection goes: the settings' uri, or where another process serves that file."""
        return self.connection.uri

    # --- lanes

    def write_lane(self, target: WriteTarget, schema: Schema, limits: Limits) -> Lane[Any, None]:
        """The lane for rows of one collection and partition; an item is a node, or a node and its sparse vector."""

        async def send(rows: list[Row], upsert: bool, timeout: float) -> list[None]:
            collection, count = target.collection, len(rows)
            async with self.writing(collection, timeout):
                current = await self.connection.schema(collection, timeout)
                upsert = upsert or target.upsert
                await self.connection.write(collection, target.partition, current, rows, upsert, timeout)
            return [None] * count

        def build() -> Lane[Any, None]:
            encoder = RowEncoder(
                schema,
                text_key=target.text_key,
                doc_id_field=target.doc_id_field,
                embedding_field=target.embedding_field,
                sparse_field=target.sparse_field,
            )
            encoded = itertools.count(1)
            io = IoThread.get()

            def prepare(item: Any) -> tuple[Row, int]:
                if not next(encoded) % _ROWS_IN_ONE_GO and io.takes_turns:
                    time.sleep(_PAUSE_SECONDS)
                return encoder.encode(*item) if type(item) is tuple else encoder.encode(item)

            return self._lane(
                prepare,
                send,
                limits,
                limits.batch_size,
                limits.max_batch_bytes,
                max_in_flight=1
                if self.is_lite
                else min(limits.max_concurrency, max(_MOST_ROWS_UNDER_WAY // limits.batch_size, 1)),
                spread_above=_LEAST_ROWS,
            )

        return self._known(("rows", target, schema, limits), build)

    def read_lane(self, group: SearchGroup, ranker: Any, limits: Limits) -> Lane[Any, Hits]:
        """The lane for searches that may share requests."""

        async def send(queries: list[Any], _upsert: bool, timeout: float) -> list[Hits]:
            with self.reloading(group.collection):
                return await self.connection.search(group, queries, ranker, timeout)

        def build() -> Lane[Any, Hits]:
            queries = min(limits.max_batch_queries, max(_MAX_HITS // group.limit, 1))
            return self._lane(
                _prepare_query,
                send,
                limits,
                queries,
                limits.max_batch_bytes,
                spread_above=None if self.is_lite else _LEAST_QUERIES,
                abort_when_unwanted=True,
            )

        return self._known(("queries", group, limits), build)

    def call_lane(self, limits: Limits) -> Lane[Any, Any]:
        """The lane for all other calls: each item is `call(timeout_seconds) -> result`, and travels alone."""

        async def send(calls: list[Callable[[float], Awaitable[Any]]], _upsert: bool, timeout: float) -> list[Any]:
            return [await call(timeout) for call in calls]

        return self._known(("calls", limits), lambda: self._lane(lambda call: (call, 0), send, limits, 1, 1))

    def counts(self) -> Counter[str]:
        """Requests, retries, rows and queries so far, and what is under way and waiting now."""
        total = Counter(self._gone)
        for (kind, *_), lane in list(self._lanes.items()):
            total.update(_counts(kind, lane))
            total.update(waiting=lane.waiting)
        total.update(in_flight=self.limit.in_flight, limit=self.limit.current)
        return total

    def _lane(
        self,
        prepare: Callable[[Any], tuple[Any, int]],
        send: Callable[[list[Any], bool, float], Awaitable[Sequence[Any]]],
        limits: Limits,
        max_items: int,
        max_bytes: int,
        *,
        max_in_flight: int | None = None,
        spread_above: int | None = None,
        abort_when_unwanted: bool = False,
    ) -> Lane[Any, Any]:
        return Lane(
            prepare=prepare,
            send=send,
            limit=self.limit,
            policy=limits.retry,
            max_items=max_items,
            max_bytes=max_bytes,
            max_in_flight=limits.max_concurrency if max_in_flight is None else max_in_flight,
            ceiling=limits.max_concurrency,
            rpc_timeout_seconds=limits.rpc_timeout_seconds,
            spread_above=spread_above,
            abort_when_unwanted=abort_when_unwanted,
            on_retry=self._on_retry,
        )

    def _known(self, key: tuple[Any, ...], build: Callable[[], Lane[Any, Any]]) -> Lane[Any, Any]:
        lane = self._lanes.get(key)
        if lane is None:
            with self._lock:
                if len(self._lanes) >= _MAX_LANES:
                    self._forget_idle_lanes()
                lane = self._lanes.get(key)
                if lane is None:
                    lane = self._lanes[key] = build()
                    IoThread.get().post(lambda: self.limit.allow(key[-1].max_concurrency))
        return lane

    def _forget_idle_lanes(self) -> None:
        # Each filter expression has a lane of its own. One that is handed out just now may be dropped here too: it
        # goes on working, and only shares no request with its successor.
        for key, lane in list(self._lanes.items()):
            if lane.idle:
                self._gone.update(_counts(key[0], lane))
                del self._lanes[key]
        self.lanes_forgotten += 1  # at the end: whoever reads the new number finds no lane that is dropped here

    # --- what Milvus Lite needs

    @contextlib.asynccontextmanager
    async def writing(self, collection: str, timeout: float) -> AsyncIterator[None]:
        """Hold the right to change a collection: on Milvus Lite one request at a time, over all processes.

        Several at once would interleave its write-ahead log, and a crash would then lose acknowledged rows.
        """
        if not self.is_lite:
            yield
            return
        lock = self._write_locks.setdefault((self.connection.address, collection), asyncio.Lock())
        async with lock:
            release = await self._lock_file(timeout)
            try:
                yield
            finally:
                release()

    async def _lock_file(self, timeout: float) -> Callable[[], None]:
        if self._lock_path is None or fcntl is None:
            return lambda: None
        descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting = asyncio.ensure_future(self.connection.in_thread(fcntl.flock, descriptor, fcntl.LOCK_EX))
            try:
                await asyncio.wait_for(asyncio.shield(waiting), timeout)
            except BaseException as error:
                waiting.add_done_callback(lambda _: os.close(descriptor))  # which gives a late lock back
                if isinstance(error, asyncio.TimeoutError):
                    raise RpcFailure("UNAVAILABLE", f"{self._lock_path} is held by another process", False) from None
                raise
        return lambda: os.close(descriptor)

    @contextlib.contextmanager
    def reloading(self, collection: str) -> Any:
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


def _counts(kind: str, lane: Lane[Any, Any]) -> dict[str, int]:
    return {"requests": lane.requests, "retries": lane.retries, kind: lane.items_sent}


def connect(settings: ConnectionSettings) -> Connection:
    """Connect, or say what is in the way.

    Raises:
        ConnectError: The server can't be reached, refuses the token, or the file is in use.
    """
    try:
        return Connection(settings)
    except (MilvusException, grpc.RpcError, OSError) as error:
        raise ConnectError(code=2, message=_explanation(settings, error)) from error


def _explanation(settings: ConnectionSettings, error: BaseException) -> str:
    uri = settings.uri
    if settings.is_file:
        if not Path(uri).parent.is_dir():
            return f"{uri} can't be opened: its folder does not exist"
        return (
            f"{uri} can't be opened: most likely another process holds it, as Milvus Lite serves a file to one; "
            "close it there, or start `milvus-lite server` on the folder and give all processes its http:// address"
        )
    failure = RpcFailure.cause_of(error)
    reason = {
        "UNAVAILABLE": "no Milvus server answers there; check that it runs, the host and the port, and whether it "
        "expects TLS (https://) or not (http://)",
        "UNAUTHENTICATED": "it refuses the token; check token= (such as 'user:password' or an API key)",
        "PERMISSION_DENIED": "it refuses the token; check token= and the rights of its user",
        "DEADLINE_EXCEEDED": "it accepts connections, but does not answer; is it a healthy Milvus server?",
        "UNIMPLEMENTED": "the server there is no Milvus server, or the port is not its gRPC port (19530 by default)",
    }.get(failure.status if failure is not None else "")
    return f"can't connect to {uri}: {reason or error}"


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=Endpoint.forget_all)
