"""What no Ctrl-C and no cancellation must cut in two."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from llama_index_milvus_async_ext._flow.arrivals import settled
from llama_index_milvus_async_ext._flow.starting import is_started

T = TypeVar("T")

Undo = Callable[[T], object]


def uninterrupted(name: str, function: Callable[[], T], undo: Undo[T] | None = None) -> T:
    """Call a function where no Ctrl-C comes: from the main thread, in a thread of its own.

    Whatever interrupts this, the function goes on to its end.

    Args:
        name: The thread's.
        function: The function.
        undo: Called with its result, once it is there, if this was interrupted and so nobody else gets it.
    """
    if threading.current_thread() is not threading.main_thread():
        return function()
    aside = _Aside(name, function, undo)
    try:
        if aside.is_begun():
            return settled(aside.outcome)
    except BaseException:
        aside.give_up()
        raise
    return function()


async def auninterrupted(name: str, function: Callable[[], T], undo: Undo[T] | None = None) -> T:
    """As `uninterrupted`, for a coroutine, which may be cancelled; the event loop is not blocked."""
    aside = _Aside(name, function, undo)
    if not aside.is_begun():
        return function()
    try:
        return await asyncio.wrap_future(aside.outcome)
    except BaseException:
        aside.give_up()
        raise


class _Aside(Generic[T]):
    """A function that a thread of its own calls, in a copy of this thread's context."""

    def __init__(self, name: str, function: Callable[[], T], undo: Undo[T] | None) -> None:
        self.outcome: Future[T] = Future()
        self.outcome.set_running_or_notify_cancel()  # nobody cancels it any more
        self._name = name
        self._function = function
        self._undo = undo
        self._run = contextvars.copy_context().run
        self._thread = 0

    def is_begun(self) -> bool:
        """Begin; False if the system has no more threads, or the interpreter is exiting."""
        return is_started(self._name, self._work)

    def give_up(self) -> None:
        """Have what comes of it undone, if anything does: it may not even have begun."""
        if self._undo is not None:
            self.outcome.add_done_callback(self._take_back)

    def _work(self) -> None:
        self._thread = threading.get_ident()
        try:
            self.outcome.set_result(self._run(self._function))
        except BaseException as error:
            self.outcome.set_exception(error)

    def _take_back(self, outcome: Future[T]) -> None:
        undo = self._undo
        if undo is None or outcome.exception() is not None:
            return
        if threading.get_ident() == self._thread:
            undo(outcome.result())
        else:  # this is the thread that was interrupted, and it may be an event loop's
            is_started(f"{self._name}-undo", lambda: undo(outcome.result()))
