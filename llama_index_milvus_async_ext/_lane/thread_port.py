"""The callers' way to the I/O thread and back, for blocking calls."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

from llama_index_milvus_async_ext._flow.arrivals import take
from llama_index_milvus_async_ext._lane.items import Submission
from llama_index_milvus_async_ext._lane.journey import Journey, Request
from llama_index_milvus_async_ext._lane.thread import IoThread

_CANCEL_SECONDS = 2.0  # a cancelled call's outcomes take milliseconds; this is for an I/O thread that is no more


class ThreadPort:
    """The way of one thread's blocking calls.

    Attributes:
        thread: The thread's identifier.
    """

    awaits = False

    def __init__(self) -> None:
        self._io = IoThread.get()
        self.thread = threading.get_ident()

    async def submit(self, *requests: Request) -> list[Submission[Any]]:
        """See `Port`; it never suspends."""
        return self.prepare(*requests).wait()

    def prepare(self, *requests: Request) -> Voyage:
        """Requests that are to be submitted: nothing is sent yet."""
        if self._io.is_current:
            raise RuntimeError("a blocking call on the I/O thread would wait for itself; use the async method")
        self._io.check()
        return Voyage(self._io, requests)


class Voyage:
    """Requests that a thread submits, and will wait for.

    It is made first, and sent then: so whoever has it can cancel what Ctrl-C interrupts, at any moment.
    """

    def __init__(self, io: IoThread, requests: Sequence[Request]) -> None:
        self._io = io
        self._arrivals: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.has_arrived = not requests
        self._has_begun = False
        self.journey = Journey(requests, self._arrived)

    def _arrived(self) -> None:
        self.has_arrived = True
        self._arrivals.put(None)

    def begin(self) -> None:
        """Submit the requests, if that has not been done."""
        if not self._has_begun:
            self._has_begun = True
            self._io.post(self.journey.start)

    def wait(self) -> list[Submission[Any]]:
        """Submit the requests, and block until all outcomes are there. If it is interrupted, see `Port.submit`."""
        thread = threading.current_thread()
        waited_for = not thread.daemon and thread is not threading.main_thread()
        try:
            if waited_for:
                self._io.blocked.add(thread)
            self.begin()
            if not self.has_arrived:
                take(self._arrivals)
        except BaseException as interruption:
            interruption.submissions = self.cancel()  # type: ignore[attr-defined]
            raise
        finally:
            self._io.blocked.discard(thread)
        if self.journey.error is not None:
            raise self.journey.error
        return self.journey.submissions

    def cancel(self) -> list[Submission[Any]]:
        """Give up on what has no outcome yet, and return all outcomes."""
        self._io.post(self.journey.cancel)
        until = time.monotonic() + _CANCEL_SECONDS
        while not self.has_arrived and time.monotonic() < until:
            try:
                with contextlib.suppress(queue.Empty):
                    self._arrivals.get(timeout=_CANCEL_SECONDS)
            except KeyboardInterrupt:  # an impatient second Ctrl-C
                continue
        return self.journey.submissions
