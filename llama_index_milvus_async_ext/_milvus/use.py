"""What is given back once, by whoever has it or by the garbage collector."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from llama_index_milvus_async_ext._flow.starting import is_started
from llama_index_milvus_async_ext._lane.thread import IoThread

_AGAIN_SECONDS = 1.0


class _Closable(Protocol):
    def close(self) -> None: ...


C = TypeVar("C", bound=_Closable)


class Use(Generic[C]):
    """One use of what others may use as well. It is given up by `close`, or when nobody has it any more.

    So a Ctrl-C that comes between its making and its first name leaves nothing open.

    Attributes:
        of: What is used.
    """

    def __init__(self, of: C) -> None:
        self.of = of
        self._dropped = closed_if_dropped(self, of.close)

    def close(self) -> None:
        """Give it up. May be called again."""
        if self._dropped.detach() is not None:
            self.of.close()


def closed_if_dropped(owner: object, close: Callable[[], None]) -> weakref.finalize[..., object]:
    """Have `close` called when `owner` is collected, in the process that made it; at its exit the process lets go.

    On another thread: the one that collects may be any, and to let go of a file takes a while.
    """
    finalizer = weakref.finalize(owner, _close, close, os.getpid())
    finalizer.atexit = False
    return finalizer


def _close(close: Callable[[], None], pid: int) -> None:
    # Without a thread for it: there are none for now, or the process ends.
    if pid == os.getpid() and not is_started("milvus-close", close) and (io := IoThread.running()) is not None:
        io.post(functools.partial(io.loop.call_later, _AGAIN_SECONDS, _close, close, pid))
