"""Blocking work beside an event loop: in a thread of its own, or in the thread that waits for the loop."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import queue
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from llama_index_milvus_async_ext._flow.arrivals import take
from llama_index_milvus_async_ext._flow.foreign import as_error
from llama_index_milvus_async_ext._flow.starting import start

T = TypeVar("T")

_CANCEL_SECONDS = 10.0  # what a cancelled flow may take to end; more only if it can't


class Calls(Protocol):
    """Where blocking calls are made, one after the other."""

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Make a call, and wait for its result."""


class _Call:
    """One blocking call, made in one thread for an event loop in another."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._function = function
        self._arguments = arguments
        self._loop = asyncio.get_running_loop()
        self.answer: asyncio.Future[Any] = self._loop.create_future()

    def make(self) -> None:
        """Make the call; what is no mere error, such as Ctrl-C, is the business of the thread."""
        try:
            result = self._function(*self._arguments)
        except (Exception, asyncio.CancelledError) as error:  # nobody cancels what runs in a thread
            self.fail(error)
        else:
            self._deliver(result, None)

    def fail(self, raised: BaseException) -> None:
        """Answer the call with what it raised."""
        self._deliver(None, as_error(raised, "a call"))

    def _deliver(self, result: Any, error: Exception | None) -> None:
        def deliver() -> None:
            if self.answer.done():
                return
            if error is not None:
                self.answer.set_exception(error)
            else:
                self.answer.set_result(result)

        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(deliver)


class OwnThread:
    """A daemon thread for blocking calls that may never return: nobody waits for it at the end, not even Python."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """See `Calls`; it runs in the context of the first call."""
        if self._thread is None:
            run = contextvars.copy_context().run
            thread = threading.Thread(target=run, args=(self._serve,), name=self._name, daemon=True)
            start(thread)
            self._thread = thread  # not before: of one that could not be begun, calls would never come back
        call = _Call(function, arguments)
        self._calls.put(call)
        result: T = await call.answer
        return result

    def close(self) -> None:
        """Let the thread end, once the call that it makes has returned."""
        self._calls.put(None)

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call.make()
            except BaseException as error:  # else whoever waits for the answer would wait for ever
                call.fail(error)


class WaitingThread:
    """The thread that waits for a coroutine on an event loop beside it, and makes calls for it meanwhile.

    WaitingThread().run(lambda thread: flow_that_reads_by(thread.call))
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None
        self._result: Any = None
        self._error: BaseException | None = None
        self._has_begun = threading.Event()
        self._is_interrupted = False

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """See `Calls`."""
        call = _Call(function, arguments)
        self._calls.put(call)
        result: T = await call.answer
        return result

    def run(self, make: Callable[[WaitingThread], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine to its end, in a copy of this thread's context.

        If this is interrupted, by Ctrl-C, the coroutine is cancelled, and has ended, before the interruption is raised.
        """
        here = threading.current_thread()
        # Python's exit waits for the loop as long as it waits for who waits for the loop.
        daemon = here.daemon or here is threading.main_thread()
        run = contextvars.copy_context().run
        beside = threading.Thread(target=run, args=(self._run, make), name=f"{here.name}-flow", daemon=daemon)
        try:
            start(beside)  # which waits for it to begin, and may be interrupted
            while (call := take(self._calls)) is not None:
                call.make()
        except BaseException as error:
            if beside.ident is not None or not isinstance(error, RuntimeError):  # the system has no more threads
                self._cancel(beside)
            raise
        beside.join()
        if self._error is not None:
            raise self._error
        result: T = self._result
        return result

    def _run(self, make: Callable[[WaitingThread], Coroutine[Any, Any, Any]]) -> None:
        self._has_begun.set()

        async def main() -> Any:
            self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
            if self._is_interrupted and self._task is not None:  # before it had begun
                self._task.cancel()
            return await make(self)

        try:
            self._result = asyncio.run(main())
        except BaseException as error:
            self._error = error
        finally:
            self._calls.put(None)

    def _cancel(self, beside: threading.Thread) -> None:
        """Cancel the coroutine, and wait until it has ended."""
        self._is_interrupted = True
        if self._loop is not None and self._task is not None:
            with contextlib.suppress(RuntimeError):  # it has ended, and its loop is closed
                self._loop.call_soon_threadsafe(self._task.cancel)
        waiting = True
        while waiting:
            try:
                if self._has_begun.wait(_CANCEL_SECONDS):  # before, it can't be joined
                    beside.join(_CANCEL_SECONDS)
                waiting = False
            except KeyboardInterrupt:  # an impatient second Ctrl-C
                continue
