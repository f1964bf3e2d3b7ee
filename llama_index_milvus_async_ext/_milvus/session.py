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

_CLOSED = "this AsyncMilvusVectorStore is closed; make a new one"
_LOOK_AGAIN_SECONDS = 0.1  # nobody tells when an event loop stops

_held: contextvars.ContextVar[Connected | None] = contextvars.ContextVar("held", default=None)


class Connected:
    """What a store is connected with, in the process that connected it, and the calls that need it.

    A call is begun with the port of its caller, and ended however it ends; `finish` waits for those that can end.

    Args:
        endpoint: The endpoint, open for this.
        settings: Its settings.
        client: A client of pymilvus's that the store has already, and that is closed with it.
    """

    def __init__(self, endpoint: Endpoint, settings: ConnectionSettings, client: MilvusClient | None = None) -> None:
        self.pid = os.getpid()
        self.endpoint = endpoint
        self.closed = False
        self._settings = settings
        self._client = client
        self._async_client: AsyncMilvusClient | None = None
        self._making = threading.Lock()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._calls: dict[Port, int] = {}
        self._ending = False

    # Pymilvus's clients, made when the user asks for one: each is a connection of its own, nothing here needs them,
    # and to connect them took most of the time in which a store opens.

    @property
    def client(self) -> MilvusClient:
        """A client of pymilvus's."""
        if self._client is None:
            with forks.quiet.busy(), self._making:
                self.check_open()
                if self._client is None:
                    self._client = another_client(self._settings, self.endpoint.uri)
        return self._client

    @property
    def async_client(self) -> AsyncMilvusClient:
        """An async client of pymilvus's."""
        if self._async_client is None:
            settings = self._settings
            with forks.quiet.busy(), self._making:
                self.check_open()
                if self._async_client is None:
                    self._async_client = AsyncMilvusClient(
                        uri=self.endpoint.uri, token=settings.token, **settings.client_options
                    )
                    lite.belongs_to_store(self._async_client)
        return self._async_client

    def check_open(self) -> None:
        """Raise `RuntimeError` once the store is closed."""
        if self.closed:
            raise RuntimeError(_CLOSED)

    def begin(self, port: Port) -> None:
        """Begin a call.

        Raises:
            RuntimeError: The store is closed, or about to be.
        """
        with self._lock:  # the plain lock: a condition's own way in and out costs several times as much
            if self._ending and _held.get() is not self:
                raise RuntimeError(_CLOSED)
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
            with self._making:  # one that is just being made is closed as well
                if self._client is not None:
                    self._client.close()
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
