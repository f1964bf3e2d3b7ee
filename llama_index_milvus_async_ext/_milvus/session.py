"""A store's connection, from its opening to its end."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import threading
import weakref
from collections.abc import Iterator

from pymilvus import AsyncMilvusClient, MilvusClient

from llama_index_milvus_async_ext._lane import forks
from llama_index_milvus_async_ext._lane.port import LoopPort, Port
from llama_index_milvus_async_ext._lane.thread import IoThread
from llama_index_milvus_async_ext._milvus import lite
from llama_index_milvus_async_ext._milvus.endpoint import Endpoint
from llama_index_milvus_async_ext._milvus.opening import another_client
from llama_index_milvus_async_ext._milvus.settings import ConnectionSettings

_LOOK_AGAIN_SECONDS = 0.1  # nobody tells when an event loop stops

_held: contextvars.ContextVar[Connected | None] = contextvars.ContextVar("held", default=None)


class Connected:
    """What a store is connected with, in the process that connected it, and the calls that need it.

    A call is begun with the port of its caller, and ended however it ends; `finish` waits for those that can end.
    """

    def __init__(self, endpoint: Endpoint, client: MilvusClient, async_client: AsyncMilvusClient | None) -> None:
        self.pid = os.getpid()
        self.endpoint = endpoint
        self.client = client
        self.async_client = async_client
        if async_client is not None:
            lite.belongs_to_store(async_client)
        self.closed = False
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._calls: dict[Port, int] = {}
        self._ending = False

    @classmethod
    def anew(cls, settings: ConnectionSettings, use_async_client: bool) -> Connected:
        """Connect in this process."""
        endpoint = Endpoint.open(settings)
        try:
            async_client = None
            if use_async_client:
                async_client = AsyncMilvusClient(uri=endpoint.uri, token=settings.token, **settings.client_options)
            return cls(endpoint, another_client(settings, endpoint.uri), async_client)
        except BaseException:
            endpoint.close()
            raise

    def begin(self, port: Port) -> None:
        """Begin a call.

        Raises:
            RuntimeError: The store is closed, or about to be.
        """
        with self._lock:  # the plain lock: a condition's own way in and out costs several times as much
            if self._ending and _held.get() is not self:
                raise RuntimeError("this AsyncMilvusVectorStore is closed; make a new one")
            self._calls[port] = self._calls.get(port, 0) + 1

    def end(self, port: Port) -> None:
        """End a call."""
        with self._lock:
            left = self._calls[port] - 1
            if left:
                self._calls[port] = left
            else:
                del self._calls[port]
            if self._ending:
                self._changed.notify_all()

    @contextlib.contextmanager
    def held(self, port: Port) -> Iterator[None]:
        """A call that consists of others: these may still begin when the store is about to be closed."""
        self.begin(port)
        token = _held.set(self)
        try:
            yield
        finally:
            _held.reset(token)
            self.end(port)

    def finish(self) -> None:
        """Let no new call begin, wait for those under way, and close.

        A call is not waited for whose event loop has stopped or was closed: it would never end.

        Raises:
            RuntimeError: Calls of the event loop that runs in this very thread are under way.
        """
        if self.pid == os.getpid():
            with self._changed:
                own = _running_port()
                if own is not None and own in self._calls:
                    raise RuntimeError(
                        f"close() would wait for ever for {self._calls[own]} calls of this event loop, which it holds "
                        "up; use `await store.aclose()`, or `async with store:`"
                    )
                self._ending = True
                while any(not isinstance(port, LoopPort) or port.is_running for port in self._calls):
                    self._changed.wait(_LOOK_AGAIN_SECONDS)
        self.close()

    async def afinish(self) -> None:
        """As `finish`, without blocking the event loop."""
        if IoThread.get().ended:  # no thread can be started any more, and nothing is under way
            self.finish()
        else:
            await asyncio.to_thread(self.finish)

    def close(self) -> None:
        """Close what was opened here; a forked child leaves its parent's connections alone."""
        if self.pid != os.getpid():  # first: the lock may have been held at the fork
            return
        with self._lock:
            if self.closed:
                return
            self.closed = True
        with forks.quiet.busy():
            self.client.close()
            self.endpoint.close()


def _running_port() -> LoopPort | None:
    with contextlib.suppress(RuntimeError):
        asyncio.get_running_loop()
        return LoopPort.current()
    return None


def close_with(store: object, connected: Connected) -> None:
    """Close the connection of a store that is dropped unclosed; at the interpreter's exit the process does."""
    weakref.finalize(store, _close_dropped, connected).atexit = False


def _close_dropped(connected: Connected) -> None:
    """Close, on another thread: this one may be any, and to let go of a file takes a while."""
    if connected.pid == os.getpid() and not connected.closed:
        with contextlib.suppress(RuntimeError):  # no thread can be started any more: the process ends
            threading.Thread(target=connected.close, name="milvus-close", daemon=True).start()
