"""Holds the I/O thread still while this process forks.

A child that is forked while some thread is inside gRPC, or imports a module, may hang in its first call or crash: 10 of
200 did. With the I/O thread held between two turns, and no answer outstanding, none of 900.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator

from llama_index_milvus_async_ext._lane.thread import IoThread

_MOST_SECONDS = 1.5  # what a fork waits for answers at the most; it mostly takes five milliseconds
_HELD_SECONDS = 5.0
_SETTLING_SECONDS = 0.001  # until gRPC's own thread, which brought the last answer, has left gRPC


class _Quiet:
    """How many requests are out, and how many forks wait for none to be."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._out = 0
        self._forks = 0
        self._is_held = False

    def began(self) -> None:
        """Note that a request is out, or a blocking call under way."""
        with self._changed:
            self._out += 1

    def ended(self, *_: object) -> None:
        """Note that it has ended; from any thread."""
        with self._changed:
            self._out -= 1
            if not self._out and self._forks:
                self._changed.notify_all()

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """For what enters gRPC on another thread than the I/O thread, as connecting: not beside a fork. Not nested."""
        with self._changed:
            self._changed.wait_for(lambda: not self._forks, _HELD_SECONDS)
            self._out += 1
        try:
            yield
        finally:
            self.ended()

    def before_fork(self) -> None:
        """Hold the I/O thread, and wait for what is out, but not for ever."""
        io = IoThread.running()
        if io is None or io.ended or io.is_current:
            return
        with self._changed:
            self._forks += 1
            if not self._is_held:
                io.post(self._hold)
            self._changed.wait_for(lambda: self._is_held and self._out <= 0, _MOST_SECONDS)
        time.sleep(_SETTLING_SECONDS)

    def after_fork(self) -> None:
        """Let the I/O thread go on, in the parent."""
        with self._changed:
            self._forks = max(self._forks - 1, 0)
            self._changed.notify_all()

    def _hold(self) -> None:
        with self._changed:
            self._is_held = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._forks, _HELD_SECONDS)
            self._is_held = False


quiet = _Quiet()


def _forget() -> None:
    global quiet
    quiet = _Quiet()


def register() -> None:
    """Do so from now on.

    To be called after all others that take locks before a fork: they are asked in reverse order, and one that the I/O
    thread waits for would keep it from being held.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=lambda: quiet.before_fork(),
            after_in_parent=lambda: quiet.after_fork(),
            after_in_child=_forget,
        )
