"""What Ctrl-C must not cut in two."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from llama_index_milvus_async_ext._flow.arrivals import settled

T = TypeVar("T")


def uninterrupted(name: str, function: Callable[[], T], undo: Callable[[T], object] | None = None) -> T:
    """Call a function where no Ctrl-C comes: from the main thread, in a thread of its own.

    Whatever interrupts this, the function goes on to its end.

    Args:
        name: The thread's.
        function: The function.
        undo: Called with its result, once it is there, if this was interrupted and so nobody else gets it.
    """
    if threading.current_thread() is not threading.main_thread():
        return function()
    outcome: Future[T] = Future()
    run = contextvars.copy_context().run

    def work() -> None:
        try:
            outcome.set_result(run(function))
        except BaseException as error:
            outcome.set_exception(error)

    def take_back() -> None:
        if undo is not None and outcome.exception() is None:
            undo(outcome.result())

    try:
        if _is_started(name, work):
            return settled(outcome)
    except BaseException:
        if not outcome.done() or outcome.exception() is None:
            _is_started(f"{name}-undo", take_back)
        raise
    return function()


def _is_started(name: str, work: Callable[[], None]) -> bool:
    try:
        threading.Thread(target=work, name=name, daemon=True).start()
    except RuntimeError:  # the system has no more threads, or the interpreter is exiting
        return False
    return True
