"""The callers' way to the I/O thread and back, for coroutines of any event loop."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

from llama_index_milvus_async_ext._flow.loops import forget_closed
from llama_index_milvus_async_ext._lane.items import Submission
from llama_index_milvus_async_ext._lane.journey import Journey, Request
from llama_index_milvus_async_ext._lane.thread import IoThread

T = TypeVar("T")

# Calls that cross over without waiting for the others of their turn: a request's worth, with which Milvus begins while
# the loop goes on. A thousand single adds took 100 ms so, and 115 ms when all crossed over together.
_MOST_OUTGOING = 250


class Port(Protocol):
    """One caller's way.

    A coroutine that awaits nothing but `submit` runs on either port: on a `LoopPort` it suspends, on a `ThreadPort` it
    blocks instead (see `run`). So a blocking method and its async twin are one piece of code, which runs on the
    caller's thread and in its context.
    """

    awaits: bool

    async def submit(self, *requests: Request) -> list[Submission[Any]]:
        """Submit requests, and wait for all outcomes, in the order of the requests.

        If the caller is interrupted (cancelled, or by Ctrl-C), so are its requests: their outcomes are complete when
        the interruption is raised, and stand in its attribute `submissions`. (Of a coroutine that is closed nobody is
        told.)

        Raises:
            RuntimeError: The interpreter is exiting.
        """


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine whose port is a `ThreadPort` to its end, on this thread."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    coroutine.close()
    raise RuntimeError("a blocking call can't wait for an event loop")


class LoopPort:
    """The way of one event loop's coroutines.

    What one turn of the loop submits crosses over together, in one wake-up of the I/O thread, and so do the outcomes
    on their way back: a thousand concurrent calls cost a few wake-ups, not two thousand.
    """

    awaits = True
    _ports: ClassVar[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopPort]] = weakref.WeakKeyDictionary()
    _recent: ClassVar[LoopPort | None] = None
    _lock: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def current(cls) -> LoopPort:
        """The running loop's port."""
        loop = asyncio.get_running_loop()
        port = cls._recent
        if port is None or port.loop is not loop or port._io is not IoThread._instance:
            with cls._lock:
                port = cls._ports.get(loop)
                if port is None or port._io is not IoThread._instance:  # another one after a fork
                    forget_closed(cls._ports)  # a port may still hold a call that was not sent, and so its loop
                    port = cls._ports[loop] = cls(loop, IoThread.get())
                cls._recent = port
        return port

    @classmethod
    def forget(cls) -> None:
        """Start anew, in a forked child."""
        cls._ports, cls._recent, cls._lock = weakref.WeakKeyDictionary(), None, threading.Lock()

    def __init__(self, loop: asyncio.AbstractEventLoop, io: IoThread) -> None:
        self._loop = weakref.ref(loop)
        self._io = io
        self._thread = threading.current_thread()
        self._outgoing: list[Callable[[], object]] = []
        # A call that has its answer belongs to its coroutine alone: to hold it here would be to hold its loop.
        self._incoming: deque[weakref.ref[_Waiter]] = deque()
        self._woken = False
        io.ports.add(self)

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The caller's loop; None once it is gone."""
        return self._loop()

    @property
    def is_running(self) -> bool:
        """Whether the loop runs, so that its calls may come to an end."""
        loop = self.loop
        return loop is not None and loop.is_running()

    @property
    def keeps_interpreter(self) -> bool:
        """Whether Python's exit waits for a thread that runs the loop."""
        return self._thread is not threading.main_thread() and not self._thread.daemon and self.is_running

    async def submit(self, *requests: Request) -> list[Submission[Any]]:
        """See `Port`."""
        self._io.check()
        waiter = _Waiter(self, requests)
        self._send(waiter.journey.start)
        interruption: asyncio.CancelledError | None = None
        while not waiter.has_arrived:
            waiter.future = asyncio.get_running_loop().create_future()
            try:
                await waiter.future
            except asyncio.CancelledError as cancelled:
                # Some cancel again at each turn of the loop. The outcomes come all the same: they are on their way.
                if interruption is None:
                    interruption = cancelled
                    self._send(waiter.journey.cancel)
            except GeneratorExit:  # nobody runs this coroutine any more
                self._io.post(waiter.journey.cancel)
                raise
        if interruption is not None:
            interruption.submissions = waiter.journey.submissions  # type: ignore[attr-defined]
            raise interruption
        if waiter.journey.error is not None:
            raise waiter.journey.error
        return waiter.journey.submissions

    def _send(self, function: Callable[[], object]) -> None:
        if not self._outgoing:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outgoing.append(function)
        if len(self._outgoing) >= _MOST_OUTGOING:
            self._flush()

    def _flush(self) -> None:
        outgoing, self._outgoing = self._outgoing, []
        if outgoing:
            self._io.post(*outgoing)

    def deliver(self, waiter: _Waiter) -> None:
        """Wake a waiter on the caller's loop; from the I/O thread."""
        self._incoming.append(weakref.ref(waiter))
        if not self._woken:
            # Once all outcomes of this turn are there: a caller that is woken by the first of them would, for each of
            # the others, wait for Python's lock again.
            self._woken = True
            self._io.loop.call_soon(self._wake)

    def _wake(self) -> None:
        loop = self.loop
        try:
            if loop is not None:
                loop.call_soon_threadsafe(self._receive)
        except RuntimeError:  # the loop was closed: nobody waits any more
            self._incoming.clear()
            self._woken = False

    def _receive(self) -> None:
        self._woken = False
        while self._incoming:
            waiter = self._incoming.popleft()()
            if waiter is not None:
                waiter.wake()


class _Waiter:
    """One call of a `LoopPort`, on its loop."""

    __slots__ = ("__weakref__", "_port", "future", "has_arrived", "journey")

    def __init__(self, port: LoopPort, requests: Sequence[Request]) -> None:
        self._port = port
        self.journey = Journey(requests, self._arrived)
        self.has_arrived = not requests
        self.future: asyncio.Future[None] | None = None

    def _arrived(self) -> None:
        self._port.deliver(self)

    def wake(self) -> None:
        self.has_arrived = True
        if self.future is not None and not self.future.done():
            self.future.set_result(None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=LoopPort.forget)
