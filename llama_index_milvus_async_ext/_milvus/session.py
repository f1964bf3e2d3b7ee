"""A store's connection, from its opening to its end."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from pymilvus import AsyncMilvusClient, MilvusClient

from llama_index_milvus_async_ext._flow.uninterrupted import auninterrupted, uninterrupted
from llama_index_milvus_async_ext._lane import forks
from llama_index_milvus_async_ext._lane.port import LoopPort, Port
from llama_index_milvus_async_ext._lane.thread import IoThread
from llama_index_milvus_async_ext._lane.thread_port import ThreadPort
from llama_index_milvus_async_ext._milvus import lite
from llama_index_milvus_async_ext._milvus.endpoint import Endpoint
from llama_index_milvus_async_ext._milvus.opening import another_client
from llama_index_milvus_async_ext._milvus.settings import ConnectionSettings
from llama_index_milvus_async_ext._milvus.use import Use

_CLOSED = "this AsyncMilvusVectorStore is closed; make a new one"
_LOOK_AGAIN_SECONDS = 0.005  # nobody tells when an event loop stops, nor when a call ends

T = TypeVar("T")

# What the calls of a context are parts of.
_outer: contextvars.ContextVar[Connected | None] = contextvars.ContextVar("outer", default=None)


class Connected:
    """What a store is connected with, in the process that connected it, and the calls that need it.

    A call begins with `begin`, in a `try` whose `finally` takes it out of `calls`: `finish` waits for those that can
    end. There is no lock, and no function in between, so that no Ctrl-C, and no garbage collection that ends a call,
    can leave one behind:

        call = object()
        try:
            connected.begin(call, port)
            ...
        finally:
            connected.calls.pop(call, None)

    Attributes:
        calls: The ports of the calls under way.
        closed: Whether it is closed.

    Args:
        use: Of the endpoint; closed with this.
        settings: Its settings.
        client: A client of pymilvus's that the store has already, and that is closed with it.
    """

    def __init__(self, use: Use[Endpoint], settings: ConnectionSettings, client: MilvusClient | None = None) -> None:
        self.pid = os.getpid()
        self.endpoint = use.of
        self._use = use
        self.closed = False
        self._settings = settings
        self._client = client
        self._async_client: AsyncMilvusClient | None = None
        self._making = threading.Lock()
        self._closing = threading.Lock()
        self.calls: dict[object, Port] = {}
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

    def begin(self, call: object, port: Port) -> None:
        """Begin a call; see the class.

        Raises:
            RuntimeError: The store is closed, or about to be.
        """
        # First the call, then the look at the flag; `finish` does the reverse. So none is missed.
        self.calls[call] = port
        if self._ending and _outer.get() is not self:
            raise RuntimeError(_CLOSED)

    @contextlib.contextmanager
    def held(self, port: Port) -> Iterator[None]:
        """A call that consists of others: these may still begin when the store is about to be closed.

        Raises:
            RuntimeError: As `begin`; or the interpreter is exiting.
        """
        IoThread.get().check()  # now: a progress bar, for one, starts a thread, which would never return
        call = object()
        try:
            self.begin(call, port)
            token = _outer.set(self)
            try:
                yield
            finally:
                with contextlib.suppress(ValueError):  # in another context, where the garbage collector ends it
                    _outer.reset(token)
        finally:
            self.calls.pop(call, None)

    def while_held(self, port: Port, function: Callable[[], T]) -> T:
        """As `held`, for a blocking function: Ctrl-C as a `with` begins or ends would leave the call behind."""
        IoThread.get().check()
        call = object()
        try:
            self.begin(call, port)
            token = _outer.set(self)
            try:
                return function()
            finally:
                _outer.reset(token)
        finally:
            self.calls.pop(call, None)

    def finish(self) -> None:
        """Let no new call begin, wait for those under way, and close.

        A call is not waited for whose event loop has stopped or was closed: it would never end.

        Raises:
            RuntimeError: Calls of this very thread are under way: of the event loop that runs in it, or one that a
                signal's handler has interrupted.
        """
        if self.pid == os.getpid():
            self._check_not_within()
            self._ending = True
            while any(not isinstance(port, LoopPort) or port.is_running for port in list(self.calls.values())):
                time.sleep(_LOOK_AGAIN_SECONDS)
        self.close()

    def _check_not_within(self) -> None:
        loop, here, ports = _running_port(), threading.get_ident(), list(self.calls.values())
        own = sum(port is loop for port in ports)
        if own:
            raise RuntimeError(
                f"close() would wait for ever for {own} calls of this event loop, which it holds up; use "
                "`await store.aclose()`, or `async with store:`"
            )
        if any(isinstance(port, ThreadPort) and port.thread == here for port in ports):
            raise RuntimeError(
                "close() would wait for ever for a call of this very thread, which has been interrupted for it (in the "
                "handler of a signal?); close the store once that call has ended"
            )

    async def afinish(self) -> None:
        """As `finish`, without blocking the event loop."""
        if IoThread.get().ended:  # no thread can be started any more, and nothing is under way
            self.finish()
            return
        # In a thread of its own: the calls that it waits for may need the loop's.
        await auninterrupted("milvus-close", self.finish)
        client, self._async_client = self._async_client, None
        if client is not None:
            with contextlib.suppress(Exception):  # it may have served another event loop
                await client.close()

    def close(self) -> None:
        """Close what was opened here; a forked child leaves its parent's connections alone."""
        if self.pid == os.getpid():  # first: the lock may have been held at the fork
            uninterrupted("milvus-close", self._close)

    def _close(self) -> None:
        with self._closing:  # whoever comes second waits for the first
            if self.closed:
                return
            self.closed = True
            with forks.quiet.busy(), self._making:  # one that is just being made is closed as well
                if self._client is not None:
                    self._client.close()
            self._use.close()


def _running_port() -> LoopPort | None:
    with contextlib.suppress(RuntimeError):
        asyncio.get_running_loop()
        return LoopPort.current()
    return None
